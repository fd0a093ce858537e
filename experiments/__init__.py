"""The commands."""

import os

# XLA's log is quiet but for what ends a process, unless the environment has said otherwise before
# JAX is imported. On some CPUs it takes its own tuning for features that the CPU lacks, whenever it
# reads the compilation cache, and warns of SIGILL in pages (jax-ml/jax#38445). Errors are raised.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Where a standard stream was closed (`>&-`), a file that is opened would take its number.
for _descriptor in range(3):
    try:
        os.fstat(_descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
