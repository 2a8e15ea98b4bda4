"""Train every language model with every vision tower, connector and tuning method, on tiny random models."""
