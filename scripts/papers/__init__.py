"""Run the papers' benchmarks whose data is there, and print their tables beside what was published."""
