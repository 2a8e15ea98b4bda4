"""Weights and activations tuned at once, beside either alone, on the demo's base."""
