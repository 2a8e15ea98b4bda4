"""The authors' released checkpoints: their two layouts on disk, read without running anything in them."""
