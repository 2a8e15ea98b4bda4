"""Parameter-efficient tuning modes for LLaVA, switched on by one flag of upstream's own scripts."""
