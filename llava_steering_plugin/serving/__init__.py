"""The server: LLaVA's web page and controller, and a worker with many adapters on one model."""
