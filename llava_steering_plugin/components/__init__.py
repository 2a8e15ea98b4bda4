"""The parts that a LLaVA is made of, by name: vision towers, connectors and language models."""
