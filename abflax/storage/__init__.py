"""What is written to the disk: checkpoints, locks, whole files, TensorBoard events."""
