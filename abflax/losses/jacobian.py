"""Losses on the input gradients of attention (Srinivas, Fleuret, ICML 2018)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import InputError, require_same_shape
from abflax.losses.dtypes import at_least_float32, real
from abflax.losses.features import as_map, require_feature_map, unit_length


def jacobian_difference(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes ‖J_T/‖J_T‖ − J_S/‖J_S‖‖² for each example.

    Args:
      student: J_S, the gradient of one of the student's outputs with respect to the image,
        `[batch, height, width, channels]`.
      teacher: J_T, the same gradient of the teacher, of the same shape.

    Returns:
      `[batch]`, in [0, 4], at least float32. For an all-zero J, J/‖J‖ is 0 with gradient 0.

    Raises:
      ValueError: if the shapes differ, or are not those of images.

    References:
      Srinivas, Fleuret, Knowledge Transfer with Jacobian Matching, ICML 2018: the loss on the
      Jacobians of attention maps.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    require_same_shape("jacobian_difference", student, teacher)
    require_feature_map("jacobian_difference", student)
    axes = (1, 2, 3)
    return jnp.sum(jnp.square(unit_length(teacher, axes) - unit_length(student, axes)), axis=axes)


def largest_attention_pixel(features: jax.Array) -> jax.Array:
    """Finds the first position where mean_c F² is largest, for each example.

    Args:
      features: F `[batch, height, width, channels]`, or tokens `[batch, tokens, features]`.

    Returns:
      Integers `[batch]`, in [0, height · width), row by row; the number of the token.

    Raises:
      ValueError: if F is not a feature map.
    """
    features = as_map("largest_attention_pixel", at_least_float32(features))
    batch, height, width, _ = features.shape
    energy = jnp.mean(jnp.square(features), axis=-1)
    return jnp.argmax(energy.reshape(batch, height * width), axis=-1)


def attention_pixel_cotangent(features: jax.Array, index: jax.Array) -> jax.Array:
    """Computes the gradient in F of mean_c F² at one position: 2F/C there and 0 elsewhere.

    Pulled back through the network (`abflax.taps.Forward.pullback`), it gives the gradient of one
    pixel of the attention map, before normalization, with respect to the images: the J of
    `jacobian_difference`. The result depends on F, so the pulled-back gradient can itself be
    differentiated.

    Args:
      features: F `[batch, height, width, channels]`, or tokens `[batch, tokens, features]`.
      index: the position for each example, integers `[batch]` in [0, height · width), for example
        the teacher's `largest_attention_pixel`. An index outside that range gives zeros.

    Returns:
      An array of the shape and dtype of F, as a cotangent must be; computed in at least float32.

    Raises:
      ValueError: if F is not a feature map, or there is not one integer index for each example.
    """
    features, index = real(features), jnp.asarray(index)
    batch, height, width, channels = as_map("attention_pixel_cotangent", features).shape
    if index.shape != (batch,):
        raise InputError(
            f"attention_pixel_cotangent: features {features.shape} need an index of shape "
            f"{(batch,)}, not {index.shape}"
        )
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise InputError(f"attention_pixel_cotangent: an index is an integer, not {index.dtype}")
    wide = at_least_float32(features)
    chosen = jax.nn.one_hot(index, height * width, dtype=wide.dtype)
    cotangent = 2 / channels * wide * chosen.reshape(*features.shape[:-1], 1)
    return cotangent.astype(features.dtype)
