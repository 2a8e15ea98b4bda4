"""Benchmarks of the papers: answers scored by the official rule of each, and files for their test servers."""
