"""Layers that several methods share.

Call these functions in a compact method of the Flax module that owns the
parameters.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from ptune.model.layers import Dense, Initializer, kernel_init

# Logical axes of a kernel from the width of a prompt to hidden units.
PROMPT_AXES = ('prompt_embed', 'adapter_hidden')


def vector(name: str, init: Initializer, size: int, axis: str) -> jax.Array:
  """A parameter [size], float32, returned as [1, size]."""
  return partitioning.param_with_axes(
    name, init, (size,), jnp.float32, axes=(axis,)
  )[None, :]


def narrow_mlp(
  x: jax.Array,
  hidden: int,
  names: tuple[str, str] = ('wi', 'wo'),
  axes: tuple[str, str, str] = (*PROMPT_AXES, PROMPT_AXES[0]),
  *,
  features: int | None = None,
  bias: jax.Array | None = None,
  last_init: Initializer = kernel_init,
) -> jax.Array:
  """relu(x A + bias) B: [..., embed] -> [..., hidden] -> [..., features].

  Args:
    x: The input; the matrix products are computed in its dtype.
    hidden: The number of columns of A.
    names: The names of the two kernels.
    axes: The logical axes of embed, hidden and features.
    features: The number of columns of B; None for the width of x.
    bias: Added before the relu; broadcasts to [..., hidden].
    last_init: The initialiser of B. With zeros, the result starts at 0.
  """
  h = Dense(hidden, axes[:2], x.dtype, name=names[0])(x)
  if bias is not None:
    h = h + bias
  return Dense(
    features or x.shape[-1],
    axes[1:],
    x.dtype,
    kernel_init=last_init,
    name=names[1],
  )(nn.relu(h))
