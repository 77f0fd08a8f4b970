"""A fingerprint of arrays, which tells whether two models have equal weights.

`identity.fingerprint` computes the same from a checkpoint, without devices.
"""

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ptune.convert.identity import checksum, spread

# Up to this many values, NumPy ends before XLA has compiled the sums. Beyond,
# XLA is three times as fast.
FEW = 2**24


def of_params(params: Mapping[str, jax.Array]) -> str:
  """Returns a fingerprint of a model's weights.

  It is equal for the same weights on any mesh, in float32 or bfloat16, because
  it consists of integer sums over the values rounded to bfloat16.

  Args:
    params: The base parameters, by path.

  Returns:
    16 hexadecimal digits.
  """
  if sum(x.size for x in params.values()) <= FEW and all(
    device.platform == 'cpu' and x.is_fully_addressable
    for x in params.values()
    for device in x.devices()
  ):
    sums = {path: checksum(np.asarray(x)) for path, x in params.items()}
  else:
    sums = jax.device_get(jax.jit(_checksums)(dict(params)))
  digest = hashlib.sha256()
  for path in sorted(params):
    shape = tuple(params[path].shape)
    digest.update(f'{path} {shape} {int(sums[path])}\n'.encode())
  return digest.hexdigest()[:16]


def _checksums(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
  def weighted(x):
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    bits = bits.astype(jnp.uint32)
    # A value's weight depends on its position, so permutations are detected.
    # uint32 sums wrap around, so the order of summation does not matter.
    position = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
      i = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
      position = position * np.uint32(size % 2**32) + i
    return jnp.sum(bits * spread(position))

  return {path: weighted(x) for path, x in params.items()}
