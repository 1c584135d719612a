"""LoRA and DoRA: their layers, files and shapes, of the network and of the text encoders."""
