"""Measure what the plugin costs: `python scripts/benchmarks COMMAND`. `commands` lists the benchmarks."""
