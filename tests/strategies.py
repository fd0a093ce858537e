"""What hypothesis draws from in several tests."""

import warnings

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

FLOATS = ("float32", "bfloat16", "float16")
DTYPES = (*FLOATS, "int32", "uint8", "bool", "complex64")
SIDES = st.integers(0, 4)
SHAPES = st.lists(SIDES, max_size=5).map(tuple)
MAPS = st.tuples(SIDES, *[st.sampled_from([1, 2, 4])] * 3)  # feature maps that mostly fit


def arrays(shapes=SHAPES, dtypes=DTYPES):
    """Arrays with what numbers can be: small, large, NaN, infinite."""

    def make(shape, dtype, seed, odd):
        draw = np.random.default_rng(seed)
        values = draw.normal(size=shape) * draw.choice([1e-3, 1.0, 1e3])
        if odd and values.size:
            values.flat[seed % values.size] = [np.nan, np.inf, -np.inf, 0.0][seed % 4]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return jnp.asarray(values.astype(jnp.dtype(dtype)))

    return st.builds(make, shapes, st.sampled_from(dtypes), st.integers(0, 99), st.booleans())
