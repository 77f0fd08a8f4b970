"""Attention and MLPs by an accelerator's fused kernels.

    NVIDIA GPU   cuDNN's attention, through jax.nn.dot_product_attention
    TPU          our own kernels, `tpu_attention`, `tpu_cross_attention` and
                 `tpu_sublayer`

The kernels keep no weights [batch, heads, q, k] for the backward pass but
compute them again. Like `Attention`, they sum weights in float32. `Attention`
itself computes the cases that they do not support or that are too small:
float32, unusual head sizes, short sequences.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from ptune.model import (
  tpu,
  tpu_attention,
  tpu_cross_attention,
  tpu_sublayer,
)
from ptune.model.tpu import MASKED

# The smallest numbers of queries and keys for which kernels are used.
LEAST = 128
# The kernels that FUSED_ATTENTION = None uses. cuDNN's is not among them,
# because it was never run on a GPU.
DEFAULT = ('tpu',)
# The head sizes that the kernels support.
_CUDNN_LARGEST = 128
_TPU_MULTIPLE = 64


def platform() -> str | None:
  """The kernel for the devices of the traced program: 'cuda', 'tpu' or None."""
  name = tpu.platform()
  if name == 'gpu' and jax.default_backend() == 'gpu':
    device = jax.devices()[0]
    # GPUs before Ampere have no bfloat16.
    if 'cuda' in device.client.platform_version:
      return 'cuda' if float(device.compute_capability) >= 8 else None
  return 'tpu' if name == 'tpu' else None


def fits(
  wanted: bool | None,
  q: jax.Array,
  k: jax.Array,
  bias: jax.Array | None,
  mask: jax.Array,
) -> bool:
  """Whether `attend` supports these arrays, and should be used.

  Args:
    wanted: FUSED_ATTENTION; None follows `DEFAULT`.
    q: [batch, q, heads, kv].
    k: [batch, k, heads, kv].
    bias: As for `attend`.
    mask: As for `attend`.
  """
  kernel = platform()
  (rows, queries, heads, head_dim), keys = q.shape, k.shape[1]
  here = _on_device(wanted, q.dtype, rows, heads)
  if not here or min(queries, keys) < LEAST:
    return False
  if kernel == 'cuda':
    return head_dim % 8 == 0 and head_dim <= _CUDNN_LARGEST
  return (
    kernel == 'tpu'
    and head_dim % _TPU_MULTIPLE == 0
    and mask.ndim == 4
    and mask.shape[1] == 1
    and (bias is None or bias.shape == (1, heads, queries, keys))
    and tpu_attention.heads_at_once(
      queries, keys, here, head_dim, mask.shape[2] > 1
    )
    is not None
  )


def rows_joined(
  wanted: bool | None, q: jax.Array, k: jax.Array, bias: jax.Array | None
) -> int:
  """How many rows attention should compute as one; 1 where it should not.

  So many short rows fill the lanes of a TPU's registers. The products grow as
  many times, but are small still.

  Args:
    wanted: As for `fits`.
    q: [batch, q, heads, kv].
    k: [batch, k, heads, kv].
    bias: As for `attend`.
  """
  rows, heads = q.shape[0], q.shape[2]
  if (
    bias is None
    or platform() != 'tpu'
    or not _on_device(wanted, q.dtype, rows, heads)
  ):
    return 1
  here = rows // _parts('heads')[0]
  most = max(1, tpu.LANES // max(q.shape[1], k.shape[1]))
  return max(n for n in range(1, most + 1) if here % n == 0)


def fits_absorbed(
  wanted: bool | None, asked: jax.Array, x: jax.Array, mask: jax.Array
) -> bool:
  """Whether `attend_absorbed` supports these arrays, and should be used.

  Args:
    wanted: As for `fits`.
    asked: [batch, q, heads, embed].
    x: [batch, k, embed].
    mask: As for `attend_absorbed`.
  """
  (rows, queries, heads, embed), keys = asked.shape, x.shape[1]
  here = _on_device(wanted, x.dtype, rows, heads)
  return (
    here > 0
    and platform() == 'tpu'
    and keys >= LEAST
    and mask.ndim == 4
    and mask.shape[1:3] == (1, 1)
    and tpu_cross_attention.fits(queries, keys, here, embed)
  )


def fits_sublayer(
  wanted: bool | None,
  dtype: jnp.dtype,
  shape: tuple[int, ...],
  units: int,
  products: int,
  axis: str,
) -> bool:
  """Whether `mlp`, `project` or `output` supports these sizes.

  Args:
    wanted: FUSED_MLP or FUSED_ATTENTION; None follows `DEFAULT`.
    dtype: Type of the activations.
    shape: [batch, length, embed].
    units: Width of what the matrices after the norm give, or of `hidden`.
    products: Number of all matrices.
    axis: The logical axis of the units.
  """
  rows, length, embed = shape
  here = _on_device(wanted, dtype, rows, units, axis)
  return (
    here > 0
    and platform() == 'tpu'
    and length >= LEAST
    and tpu_sublayer.tile_size(embed, here, products) > 0
  )


def _on_device(
  wanted: bool | None, dtype: jnp.dtype, rows: int, n: int, axis: str = 'heads'
) -> int:
  """How many heads, or units, a device has; 0 if no kernel should be used."""
  if wanted is None:
    wanted = platform() in DEFAULT
  mesh = jax.sharding.get_abstract_mesh()
  # Without a mesh, as in T5X, we do not know how arrays are sharded.
  if (
    not wanted
    or dtype != jnp.bfloat16
    or (mesh.empty and jax.device_count() > 1)
  ):
    return 0
  split = _parts(axis)
  return 0 if rows % split[0] or n % split[1] else n // split[1]


def _parts(axis: str) -> tuple[int, int]:
  """Into how many parts rows and another axis are sharded."""
  mesh = jax.sharding.get_abstract_mesh()
  batch, other = (mesh.shape[over] if over else 1 for over in _spec(axis))
  return batch, other


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
  mask: jax.Array,
  kept: jax.Array | None,
) -> jax.Array:
  """softmax(q k^T + bias) (kept v), for each head.

  Args:
    q: [batch, q, heads, kv]; T5 does not scale it by the head size.
    k: [batch, k, heads, kv].
    v: [batch, k, heads, kv].
    bias: Broadcasts to [batch, heads, q, k], or None.
    mask: Broadcasts to [batch, heads, q, k]; True where a query may attend.
    kept: [batch, heads, k, 1], the dropout of keys, or None.

  Returns:
    [batch, q, heads, kv], in the type of q.
  """
  if platform() == 'tpu':
    return tpu_attention.attend(q, k, v, bias, mask, kept, _spec())
  if kept is not None:
    v = v * kept.swapaxes(1, 2)
  added = jnp.where(mask, jnp.zeros(()) if bias is None else bias, MASKED)
  return _cudnn(q, k, v, added)


def attend_absorbed(
  asked: jax.Array, x: jax.Array, mask: jax.Array, kept: jax.Array | None
) -> jax.Array:
  """(kept softmax(asked x^T)) x, for each head.

  Args:
    asked: [batch, q, heads, embed], queries multiplied with the key kernel.
    x: [batch, k, embed], of which keys and values would be made.
    mask: Broadcasts to [batch, 1, 1, k]; True where a query may attend.
    kept: [batch, heads, k, 1], the dropout of keys, or None.

  Returns:
    [batch, heads, q, embed], to multiply with the value kernel.
  """
  asked = asked.swapaxes(1, 2)
  return tpu_cross_attention.attend(asked, x, mask, kept, _spec())


def mlp(
  x: jax.Array,
  weights: tpu_sublayer.Weights,
  activations: tuple[Callable[[jax.Array], jax.Array], ...],
  epsilon: float,
) -> jax.Array:
  """`tpu_sublayer.mlp` over the mesh."""
  settings = tpu_sublayer.Settings(activations, epsilon, _spec('mlp'))
  return tpu_sublayer.mlp(x, weights, settings)


def project(
  x: jax.Array, weights: tpu_sublayer.Weights, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """`tpu_sublayer.project` over the mesh."""
  settings = tpu_sublayer.Settings((), epsilon, _spec('joined_kv'))
  return tpu_sublayer.project(x, weights, settings)


def output(
  x: jax.Array, y: jax.Array, weights: tpu_sublayer.Weights
) -> jax.Array:
  """`tpu_sublayer.output` of attention, over the mesh."""
  settings = tpu_sublayer.Settings(axes=_spec('joined_kv'))
  return tpu_sublayer.output(x, y, weights, settings)


def _cudnn(q, k, v, bias) -> jax.Array:
  (rows, queries, heads, _), keys = q.shape, k.shape[1]
  bias = jnp.broadcast_to(bias, (rows, heads, queries, keys)).astype(q.dtype)
  # cuDNN needs even lengths.
  more_q, more_k = queries % 2, keys % 2
  q = jnp.pad(q, ((0, 0), (0, more_q), (0, 0), (0, 0)))
  k, v = (jnp.pad(x, ((0, 0), (0, more_k), (0, 0), (0, 0))) for x in (k, v))
  bias = jnp.pad(
    bias, ((0, 0), (0, 0), (0, more_q), (0, more_k)), constant_values=MASKED
  )
  kernel = _cudnn_kernel
  if not jax.sharding.get_abstract_mesh().empty:
    # XLA cannot shard a kernel by itself.
    batch, head = _spec()
    own = PartitionSpec(batch, None, head)
    kernel = jax.shard_map(
      kernel,
      in_specs=(own, own, own, PartitionSpec(batch, head)),
      out_specs=own,
      check_vma=False,
    )
  return kernel(q, k, v, bias)[:, :queries]


def _cudnn_kernel(q, k, v, bias) -> jax.Array:
  return jax.nn.dot_product_attention(
    q, k, v, bias, scale=1.0, implementation='cudnn'
  )


def _spec(axis: str = 'heads') -> tuple[str | None, str | None]:
  """The mesh axes over which rows and heads, or another axis, are sharded."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return None, None
  axes = nn.logical_to_mesh_axes(('batch', axis)) or (None, None)
  batch, other = (
    over if over and mesh.shape[over] > 1 else None for over in axes
  )
  return batch, other
