"""Make tables and pictures of results.jsonl, without any model."""
