"""The official layouts of benchmarks, read as questions and answers for LLaVA: one file a family."""
