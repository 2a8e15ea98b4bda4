"""The multi-task measurement: LoRA and MixLoRA on tasks that conflict, one adapter for all of them."""
