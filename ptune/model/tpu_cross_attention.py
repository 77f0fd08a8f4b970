"""Cross-attention with absorbed kernels on a TPU: a Pallas kernel each way.

    weights = softmax(asked x^T),    seen = weights x

`Attention._absorbed` makes `asked` of the queries and the key kernel, and
multiplies `seen` with the value kernel. All heads of all queries then attend to
the same rows x, so that one step of the grid computes one row of the batch, and
the weights never leave the chip:

    grid            (rows,)
    asked, seen     [heads, batch, q, embed], as a product by head leaves them
    x               [batch, k, embed]
    mask            [batch, 1, k]
    kept            [batch, heads, k], the dropout of keys

The backward pass computes the weights again. It adds what x gets as keys and
what it gets as values before it writes the sum.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ptune.model import tpu
from ptune.model.tpu import LANES, MASKED, dot, on_mesh, up

# Queries that fill a register in bfloat16: heads are merged with them in place.
SUBLANES = 16
# Columns of a product that are computed at a time.
COLUMNS = 512
# Names of the two kernels in a compiled program.
FORWARD = 't5_cross_attention'
BACKWARD = 't5_cross_attention_backward'


def fits(queries: int, keys: int, heads: int, embed: int) -> bool:
  """Whether the kernels support these sizes: tiles are full, and VMEM holds it.

  Args:
    queries: Length of the queries.
    keys: Length of the keys.
    heads: Heads on one device.
    embed: Width of the keys.
  """
  taken = _vmem_bytes(queries * heads, keys, embed)
  return (
    queries % SUBLANES == 0
    and embed % LANES == 0
    and taken <= tpu.USABLE * tpu.vmem()
  )


def _vmem_bytes(queries: int, keys: int, embed: int) -> int:
  """Estimates the VMEM of the backward kernel, for queries of all heads."""
  keys = up(keys, LANES)
  # Inputs and outputs are there twice: one copied, one in use.
  rows = 2 * 2 * (3 * queries + 2 * keys) * embed
  # Weights in several states, and products before they are rounded.
  return rows + 8 * 4 * queries * keys + 4 * (queries + keys) * embed


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
  asked: jax.Array,
  x: jax.Array,
  mask: jax.Array,
  kept: jax.Array | None = None,
  axes: tuple[str | None, str | None] = (None, None),
) -> jax.Array:
  """(kept softmax(asked x^T)) x for each head, over the keys of the mask.

  Args:
    asked: [batch, heads, q, embed].
    x: [batch, k, embed], keys and values of all heads.
    mask: [batch or 1, 1, 1, k]; True where a query may attend.
    kept: [batch, heads, k, 1], multiplies the weights, or None. It has no
      gradient.
    axes: The mesh axes over which rows and heads are sharded, if any.

  Returns:
    [batch, heads, q, embed], in the type of asked.
  """
  return _forward(asked, x, mask, kept, axes)


def _forward(asked, x, mask, kept, axes):
  heads, rows = _specs(axes)
  specs = heads, rows, rows, PartitionSpec(*axes)
  call = on_mesh(_call_forward, specs, heads)
  return call(*_inputs(asked, x, mask, kept)).swapaxes(0, 1)


def _attend_forward(asked, x, mask, kept, axes):
  # Each argument has a value, and says whether it is differentiated. Only
  # arrays can be passed to the backward pass.
  wants_x = jnp.zeros(()) if x.perturbed else None
  arrays = tpu.values(asked, x, mask, kept)
  return _forward(*arrays, axes), (*arrays, wants_x)


def _attend_backward(axes, saved, dseen):
  *arrays, wants_x = saved
  dseen = tpu.materialized(dseen)
  heads, rows = _specs(axes)

  def call(*arrays):
    dasked, *dx = _call_backward(*arrays, wants_x=wants_x is not None)
    if dx and axes[1]:  # Each device has the sum over its heads.
      dx = [jax.lax.psum(dx[0], axes[1])]
    return dasked, dx

  specs = heads, rows, rows, PartitionSpec(*axes), heads
  call = on_mesh(call, specs, (heads, rows))
  dasked, dx = call(*_inputs(*arrays), dseen.swapaxes(0, 1))
  return dasked.swapaxes(0, 1), dx[0] if dx else None, None, None


attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _specs(axes) -> tuple[PartitionSpec, PartitionSpec]:
  """Shardings of [heads, batch, ...], and of [batch, ...]."""
  return PartitionSpec(axes[1], axes[0]), PartitionSpec(axes[0])


def _inputs(asked, x, mask, kept):
  """The arrays in the layouts of the kernels, listed at the top."""
  mask = jnp.broadcast_to(mask[:, 0], (x.shape[0], 1, x.shape[1]))
  mask = jnp.where(mask, 0.0, MASKED).astype(jnp.float32)
  if kept is not None:
    kept = kept[..., 0].astype(jnp.float32)
  return asked.swapaxes(0, 1), x, mask, kept


# -------------------------------------------------------------------- kernels


def _merged(ref) -> jax.Array:
  """[heads, 1, q, embed] -> [heads * q, embed]."""
  return ref[...].reshape(-1, ref.shape[-1])


def _columns(width: int) -> list[slice]:
  return [
    slice(start, min(start + COLUMNS, width))
    for start in range(0, width, COLUMNS)
  ]


def _weights(asked, x, mask_ref, heads: int) -> jax.Array:
  """softmax(asked x^T): [heads, q, k] float32."""
  logits = dot(asked, x, (1, 1)) + mask_ref[0]
  logits = logits.reshape(heads, -1, logits.shape[-1])
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _forward_kernel(asked_ref, x_ref, mask_ref, kept_ref, seen_ref):
  heads, _, queries, width = asked_ref.shape
  weights = _weights(_merged(asked_ref), x_ref[0], mask_ref, heads)
  if kept_ref is not None:
    weights *= kept_ref[0][:, None]
  weights = weights.reshape(heads * queries, -1).astype(x_ref.dtype)
  for at in _columns(width):
    seen = dot(weights, x_ref[0, :, at], (1, 0))
    seen_ref[..., at] = seen.astype(seen_ref.dtype).reshape(
      heads, 1, queries, -1
    )


def _backward_kernel(
  asked_ref,
  x_ref,
  mask_ref,
  kept_ref,
  dseen_ref,
  dasked_ref,
  dx_ref=None,
):
  heads, _, queries, width = asked_ref.shape
  dtype = x_ref.dtype
  asked, dseen = _merged(asked_ref), _merged(dseen_ref)
  weights = _weights(asked, x_ref[0], mask_ref, heads)
  dweights = dot(dseen, x_ref[0], (1, 1)).reshape(weights.shape)
  dropped = weights
  if kept_ref is not None:
    dropped = weights * kept_ref[0][:, None]
    dweights *= kept_ref[0][:, None]
  mean = jnp.sum(weights * dweights, axis=-1, keepdims=True)
  dlogits = (weights * (dweights - mean)).reshape(heads * queries, -1)
  dlogits = dlogits.astype(dtype)
  dropped = dropped.reshape(heads * queries, -1).astype(dtype)
  of_keys, of_values = dlogits.T, dropped.T  # [k, heads * q]
  for at in _columns(width):
    dasked = dot(dlogits, x_ref[0, :, at], (1, 0))
    dasked_ref[..., at] = dasked.astype(dtype).reshape(heads, 1, queries, -1)
    if dx_ref is not None:
      dx = dot(of_keys, asked[:, at], (1, 0))
      dx += dot(of_values, dseen[:, at], (1, 0))
      dx_ref[0, :, at] = dx.astype(dtype)


def _call(name, kernel, inputs, more, outputs, products: int):
  """Calls a kernel on one device.

  Args:
    name: Its name in a compiled program.
    kernel: `_forward_kernel` or `_backward_kernel`.
    inputs: asked, x, mask and kept, as at the top.
    more: Other inputs, like asked.
    outputs: Which inputs the outputs are like.
    products: Number of matrix products.
  """
  # Imported here because it is slow to import.
  from jax.experimental import pallas as pl

  asked, x, _, kept = inputs
  heads, rows, queries, width = asked.shape
  keys = x.shape[1]
  of_heads = pl.BlockSpec((heads, 1, queries, width), lambda b: (0, b, 0, 0))
  of_row = [
    pl.BlockSpec((1, *shape), lambda b: (b, 0, 0))
    for shape in ((keys, width), (1, keys), (heads, keys))
  ]
  specs = [of_heads, of_row[0], of_row[1], None if kept is None else of_row[2]]
  weights = rows * heads * queries * keys
  shapes = [jax.ShapeDtypeStruct(inputs[i].shape, x.dtype) for i in outputs]
  return pl.pallas_call(
    kernel,
    in_specs=[*specs, *(of_heads for _ in more)],
    out_specs=[specs[i] for i in outputs],
    out_shape=shapes,
    name=name,
    **tpu.call_settings(
      (x.shape[0],),
      ('parallel',),
      1.25 * _vmem_bytes(heads * queries, keys, width),
      (*inputs, *more, *shapes),
      weights,
      2 * products * weights * width,
    ),
  )(*inputs, *more)


def _call_forward(*inputs):
  """Calls the kernel on one device; arrays as at the top."""
  return _call(FORWARD, _forward_kernel, inputs, (), (0,), products=2)[0]


def _call_backward(*arrays, wants_x: bool):
  """Calls the kernel on one device: gradients of asked, and of x if wanted."""
  *inputs, dseen = arrays
  outputs = (0, 1) if wants_x else (0,)
  return _call(
    BACKWARD,
    _backward_kernel,
    inputs,
    (dseen,),
    outputs,
    products=1 + 2 * len(outputs),
  )
