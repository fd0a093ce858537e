"""What `experiments.analyse` prints and draws."""
