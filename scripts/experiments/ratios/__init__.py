"""Fixed shares of steered tokens beside the one that each layer chooses, on the demo's base."""
