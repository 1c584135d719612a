"""The diffusion model: which one, its family, how it is loaded, how pictures are drawn and noised."""
