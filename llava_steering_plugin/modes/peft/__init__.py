"""PEFT's methods as a tuning mode, for fair comparisons: their layers and their mathematics are PEFT's own code."""
