"""Several processes, signals, and what is shown of progress."""
