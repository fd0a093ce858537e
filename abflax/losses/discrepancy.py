"""The maximum mean discrepancy of two samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import InputError, require_same_shape
from abflax.losses.dtypes import at_least_float32


def maximum_mean_discrepancy(source: jax.Array, target: jax.Array) -> jax.Array:
    """Computes mean_j of K(s_i, s_j) + K(t_i, t_j) − K(s_i, t_j) − K(t_i, s_j) for each row i.

    The mean of the shares is the biased estimate of the squared discrepancy. K is Σ_k
    exp(−d²/(b·2^k)), k = 0, …, 4, for rows at distance d; b is a quarter of the mean d² over all
    pairs of different rows, of both samples together, through which no gradient flows. This is the
    form in published code of domain adaptation. If all rows are equal the result is 0.

    Args:
      source: s `[batch, features]`.
      target: t of the same shape.

    Returns:
      `[batch]`, at least float32. A share depends on the whole batch.

    Raises:
      ValueError: if the shapes differ, or are not `[batch, features]`.

    References:
      Gretton et al., A Kernel Two-Sample Test, JMLR 2012, equation (5); Long et al., Learning
      Transferable Features with Deep Adaptation Networks, ICML 2015, for the sum of kernels.
    """
    kernel = _kernels("maximum_mean_discrepancy", source, target)
    batch = len(source)
    sign = jnp.where(jnp.arange(2 * batch) < batch, 1.0, -1.0).astype(kernel.dtype)
    shares = sign * jnp.sum(kernel * sign, axis=1) / batch
    return shares[:batch] + shares[batch:]


def linear_time_discrepancy(source: jax.Array, target: jax.Array) -> jax.Array:
    """Computes K(s_i, s_j) + K(t_i, t_j) − K(s_i, t_j) − K(t_i, s_j) of neighbours, j = i + 1.

    The last row's neighbour is the first. The mean of the numbers is an unbiased estimate of the
    squared discrepancy from one pair of rows each; K is that of `maximum_mean_discrepancy`, and so
    is the bandwidth, which takes all pairs.

    Args:
      source: s `[batch, features]`.
      target: t of the same shape.

    Returns:
      `[batch]`, at least float32; a number may be below 0.

    Raises:
      ValueError: if the shapes differ, or are not `[batch, features]`.

    References:
      Gretton et al., A Kernel Two-Sample Test, JMLR 2012, section 6.
    """
    kernel = _kernels("linear_time_discrepancy", source, target)
    batch = len(source)
    one = jnp.arange(batch)
    other = (one + 1) % batch
    within = kernel[one, other] + kernel[batch + one, batch + other]
    return within - kernel[one, batch + other] - kernel[batch + one, other]


def _kernels(name: str, source: jax.Array, target: jax.Array) -> jax.Array:
    """K of all pairs of rows of both samples, `[2·batch, 2·batch]`."""
    source, target = at_least_float32(source), at_least_float32(target)
    require_same_shape(name, source, target)
    if source.ndim != 2 or not source.size:
        raise InputError(f"{name}: samples are [batch, features], not {source.shape}")
    rows = jnp.concatenate([source, target])
    squared = jnp.sum(jnp.square(rows[:, None] - rows), axis=-1)
    bandwidth = jax.lax.stop_gradient(squared.sum()) / (4 * len(rows) * (len(rows) - 1))
    bandwidth = jnp.maximum(bandwidth, jnp.finfo(rows.dtype).tiny)
    bandwidths = bandwidth * 2 ** jnp.arange(5, dtype=rows.dtype)
    return jnp.exp(-squared[..., None] / bandwidths).sum(axis=-1)
