"""What a finished training hands over: weights for other tools, the model card, the hub."""
