"""The diffusion model: loading, sampling, losses, the pair data, the trainer and its checkpoints."""
