"""The official rules, one file a family: how the answers to a benchmark become its numbers."""
