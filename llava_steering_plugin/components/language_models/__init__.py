"""Language models: each file is one, or one family."""
