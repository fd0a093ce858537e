"""What `experiments.bench` measures: the same work here and in PyTorch, and how it is timed."""
