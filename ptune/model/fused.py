"""Attention by an accelerator's fused kernel, where it takes T5's bias.

    NVIDIA GPU   cuDNN's, through jax.nn.dot_product_attention
    TPU          Pallas' flash attention

They keep no weights [batch, heads, q, k] for the backward pass, and compute
them again. Weights are summed in float32, as `layers.Attention` does; what the
kernels cannot do is left to it: float32, large heads, short sequences.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

# Added to the logits of keys that are not seen. Finite, so that a row without
# any key (a filler row of the last evaluation batch) stays free of NaN.
MASKED = -1e10

# Queries and keys from which it is worth it: Pallas' blocks are as large.
LEAST = 128
MAX_HEAD_DIM = 128


def _cudnn(q, k, v, bias) -> jax.Array:
  return jax.nn.dot_product_attention(
    q, k, v, bias.astype(q.dtype), scale=1.0, implementation='cudnn'
  )


def _pallas(q, k, v, bias) -> jax.Array:
  # Imported where it is used: it is slow to import.
  from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  return flash_attention(q, k, v, bias, sm_scale=1.0).swapaxes(1, 2)


# By platform: the kernel, and what it needs lengths to be a multiple of.
KERNELS: dict[str, tuple[Callable[..., jax.Array], int]] = {
  'cuda': (_cudnn, 2),
  'tpu': (_pallas, 128),
}


def platform() -> str | None:
  """Which of KERNELS the devices have."""
  device = jax.devices()[0]
  if device.platform == 'gpu' and 'cuda' in device.client.platform_version:
    # Before Ampere there is no bfloat16.
    return 'cuda' if float(device.compute_capability) >= 8 else None
  return device.platform if device.platform in KERNELS else None


def fits(q: jax.Array, k: jax.Array) -> bool:
  """Whether `attend` can be used, and pays.

  Args:
    q: [batch, q, heads, kv].
    k: [batch, k, heads, kv].
  """
  mesh, spec = jax.sharding.get_abstract_mesh(), _spec()
  # Without a mesh, as under T5X, it is not known how arrays are split.
  if mesh.empty and jax.device_count() > 1:
    return False
  split = [
    size % mesh.shape[axis] == 0
    for size, axis in zip((q.shape[0], q.shape[2]), spec, strict=True)
    if axis
  ]
  return (
    q.dtype == jnp.bfloat16
    and q.shape[-1] % 8 == 0
    and q.shape[-1] <= MAX_HEAD_DIM
    and min(q.shape[1], k.shape[1]) >= LEAST
    and all(split)
    and platform() is not None
  )


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array
) -> jax.Array:
  """softmax(q k^T + bias) v, for each head.

  Args:
    q: [batch, q, heads, kv]; not scaled, as T5 does not.
    k: [batch, k, heads, kv].
    v: [batch, k, heads, kv].
    bias: Broadcasts to [batch, heads, q, k]; MASKED where a key is not seen.

  Returns:
    [batch, q, heads, kv], of the type of q.
  """
  kernel, multiple = KERNELS[platform() or '']
  (rows, queries, heads, _), keys = q.shape, k.shape[1]
  bias = jnp.broadcast_to(bias, (rows, heads, queries, keys))
  more_q, more_k = -queries % multiple, -keys % multiple
  q = jnp.pad(q, ((0, 0), (0, more_q), (0, 0), (0, 0)))
  k, v = (jnp.pad(x, ((0, 0), (0, more_k), (0, 0), (0, 0))) for x in (k, v))
  bias = jnp.pad(
    bias, ((0, 0), (0, 0), (0, more_q), (0, more_k)), constant_values=MASKED
  )
  if not jax.sharding.get_abstract_mesh().empty:
    # A kernel is a whole to the compiler, which would not split it.
    batch, head = _spec()
    own = PartitionSpec(batch, None, head)
    kernel = jax.shard_map(
      kernel,
      in_specs=(own, own, own, PartitionSpec(batch, head)),
      out_specs=own,
      check_vma=False,
    )
  return kernel(q, k, v, bias)[:, :queries]


def _spec() -> tuple[str | None, str | None]:
  """The mesh axes that rows and heads are split over."""
  if jax.sharding.get_abstract_mesh().empty:
    return None, None
  batch, heads = nn.logical_to_mesh_axes(('batch', 'heads')) or (None, None)
  return batch, heads
