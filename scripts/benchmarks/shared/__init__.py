"""Parts that several benchmarks share: clocks, the machine, process memory, random models, verdicts."""
