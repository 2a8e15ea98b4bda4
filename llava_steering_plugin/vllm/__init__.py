"""Runs MoReS adapters in vLLM, on a LLaVA in transformers' layout: a plugin that vLLM finds by its entry point."""
