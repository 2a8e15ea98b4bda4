"""Compare methods over settings, learning rates, seeds and tasks: `llava-steering compare`."""
