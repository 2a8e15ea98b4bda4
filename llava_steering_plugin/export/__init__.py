"""Writes a LLaVA as a folder of transformers' own Llava class, and such a folder as a LLaVA."""
