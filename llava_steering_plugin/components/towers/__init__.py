"""Vision towers: each file is one."""
