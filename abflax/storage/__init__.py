"""Files on disk: checkpoints, locks, atomic writes, TensorBoard events."""
