"""Share parts among the benchmarks: clocks, the machine, process memory, random models, verdicts."""
