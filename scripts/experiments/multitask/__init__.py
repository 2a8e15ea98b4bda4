"""Compare LoRA and MixLoRA on tasks that conflict, one adapter for all of them."""
