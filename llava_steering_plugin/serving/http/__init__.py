"""The worker's HTTP side."""
