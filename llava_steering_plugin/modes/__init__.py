"""The tuning modes: one file per paper, plain torch, no models and no files."""
