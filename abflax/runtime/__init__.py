"""Several processes, signals, and progress reports."""
