"""The activations of MLPs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn


def identity(x: jax.Array) -> jax.Array:
  """The second activation of most gated MLPs."""
  return x


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  # The tanh approximation, with which T5 1.1 was trained.
  'gelu': nn.gelu,
  'relu': nn.relu,
  'silu': nn.silu,
  'linear': identity,
}


def precisely(
  activation: Callable[[jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
  """Computes an activation in float32, and again in the backward pass.

  In bfloat16, XLA would round after each operation, which is slower. Computing
  it again keeps only the input in memory, not the intermediate results.
  """
  if activation in (nn.relu, identity):  # They are exact in any type.
    return activation(x)
  wide = jax.checkpoint(
    lambda x: activation(x.astype(jnp.float32)).astype(x.dtype)
  )
  return wide(x)
