"""What `benchmarks.gpu` measures, on a machine without Ray."""
