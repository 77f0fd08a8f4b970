"""T5's attention on a TPU: one Pallas kernel forward, and one backward.

The attention weights [batch, heads, q, k] never leave the chip. One step of the
grid computes, in VMEM, those of one row and of a few heads, at least of as many
as fill the 128 lanes of a register:

    grid            (groups of heads, rows)
    q, k, v, y      [batch, length, heads * kv], as the projections return them
    bias            [heads, k, q], read once per head because rows change faster
    mask            [batch, 1, k] for padding, else [batch, k, q]
    kept            [batch, heads, 1, k], the dropout of keys

The backward pass computes the weights again from the logarithm of their sum. It
returns the gradients of q, k and v, and of the bias if that is differentiated.
`tpu_attention_kernels` has both kernels; here is how they are called.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ptune.model import tpu
from ptune.model.tpu import LANES, MASKED, materialized, on_mesh, up, values
from ptune.model.tpu_attention_kernels import (
  AHEAD,
  backward_kernel,
  forward_kernel,
  group,
  padded,
)

# How many groups of heads that share registers one step computes, if the
# weights of a head have at most so many elements. The start and the end of a
# step, which nothing overlaps, are then a smaller part of it.
GROUPS, FEW = 2, 2**20
# Names of the two kernels in a compiled program.
FORWARD, BACKWARD = 't5_attention', 't5_attention_backward'


def heads_at_once(
  queries: int, keys: int, heads: int, head_dim: int, whole_mask: bool
) -> int | None:
  """How many heads one step of the grid computes; None if none fit into VMEM.

  Args:
    queries: Length of the queries.
    keys: Length of the keys.
    heads: Heads on one device.
    head_dim: Size of a head.
    whole_mask: Whether the mask is [batch, k, q].
  """
  n = group(heads, head_dim)
  several = queries * keys <= FEW and heads % (GROUPS * n) == 0
  for found in (GROUPS * n, n) if several else (n,):
    taken = _vmem_bytes(queries, keys, found, head_dim, whole_mask)
    if taken <= tpu.USABLE * tpu.vmem():
      return found
  return None


def _vmem_bytes(queries, keys, heads, head_dim, whole_mask) -> int:
  """Estimates the VMEM of the backward kernel, which needs more."""
  width = up(heads * head_dim, LANES)
  keys, queries = up(keys, LANES), up(queries, LANES)
  # Inputs and outputs are there twice: one copied, one in use.
  rows = 2 * 2 * (3 * queries + 4 * keys) * width
  plane = 2 * keys * queries * (4 * heads + 2 * whole_mask)
  # Gradients of keys and values, and weights in bfloat16 beside float32.
  units = 6 * math.prod(_kept_of_units(keys))
  return rows + plane + 2 * 4 * keys * width + units


def _kept_of_units(keys: int) -> tuple[int, int, int]:
  """The shape of what a kernel keeps of the weights of units.

  It is a register wider than a unit. Of adjacent rows, the compiler for a v6e
  would hold, and spill, what it has just stored.
  """
  return AHEAD + 1, keys, tpu.matrix_unit() + LANES


@functools.partial(
  jax.custom_vjp,
  nondiff_argnums=(6,),
)
def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
  mask: jax.Array,
  kept: jax.Array | None = None,
  axes: tuple[str | None, str | None] = (None, None),
) -> jax.Array:
  """softmax(q k^T + bias) v for each head, over the keys that the mask allows.

  Args:
    q: [batch, q, heads, kv]; T5 does not scale it by the head size.
    k: [batch, k, heads, kv].
    v: [batch, k, heads, kv].
    bias: [1, heads, q, k] float32, or None.
    mask: [batch or 1, 1, q or 1, k]; True where a query may attend.
    kept: [batch, heads, k, 1], multiplies the values, or None. It has no
      gradient.
    axes: The mesh axes over which rows and heads are sharded, if any.

  Returns:
    [batch, q, heads, kv], in the type of q.
  """
  return _forward(q, k, v, bias, mask, kept, axes)[0]


def _attend_forward(q, k, v, bias, mask, kept, axes):
  # Each argument has a value, and says whether it is differentiated.
  wants_bias = bias is not None and bias.perturbed
  arrays = values(q, k, v, bias, mask, kept)
  y, log_sum = _forward(*arrays, axes)
  # Only arrays can be passed to the backward pass.
  asked = jnp.zeros(()) if wants_bias else None
  return y, (*arrays, log_sum, asked)


def _attend_backward(axes, saved, dy):
  *arrays, log_sum, asked = saved
  dy = materialized(dy)
  return *_backward(*arrays, log_sum, dy, axes, asked is not None), None, None


attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


# ---------------------------------------------------------- what kernels take


def _flat(x: jax.Array) -> jax.Array:
  """[batch, length, heads, kv] -> [batch, length, heads * kv]."""
  return x.reshape(*x.shape[:2], -1)


def _mask_of(mask: jax.Array, batch: int) -> jax.Array:
  """Makes the mask a summand of logits: [batch, 1, k] or [batch, k, q]."""
  mask = jnp.broadcast_to(mask[:, 0], (batch, *mask.shape[2:]))
  if mask.shape[1] == 1:
    return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)
  # In bfloat16, because it is as large as the weights of a head.
  mask = jnp.where(mask.swapaxes(1, 2), 0.0, MASKED).astype(jnp.bfloat16)
  return _padded(mask)


def _padded(x: jax.Array) -> jax.Array:
  """Rounds queries, the last axis, up to whole registers."""
  return padded(x, up(x.shape[-1], LANES))


def _inputs(q, k, v, bias, mask, kept):
  """The arrays in the layouts of the kernels, listed at the top."""
  if bias is not None:  # [1, heads, q, k] -> [heads, k, q]
    bias = _padded(bias[0].swapaxes(1, 2).astype(jnp.float32))
  if kept is not None:  # [batch, heads, k, 1] -> [batch, heads, 1, k]
    kept = kept.swapaxes(2, 3).astype(jnp.float32)
  mask = _mask_of(mask, q.shape[0])
  return _flat(q), _flat(k), _flat(v), bias, mask, kept


def _specs(axes):
  """Shardings of queries, keys, values, bias, mask, kept, and of log-sums."""
  rows, heads = axes
  wide, each = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
  inputs = (wide, wide, wide, PartitionSpec(heads), PartitionSpec(rows), each)
  return inputs, each


def _forward(q, k, v, bias, mask, kept, axes):
  """The output, like q, and log(sum(exp(logits))) [batch, heads, 1, q]."""
  inputs, sums = _specs(axes)
  call = functools.partial(_call_forward, head_dim=q.shape[-1])
  call = on_mesh(call, inputs, (inputs[0], sums))
  y, log_sum = call(*_inputs(q, k, v, bias, mask, kept))
  return y.reshape(q.shape), log_sum


def _backward(q, k, v, bias, mask, kept, log_sum, dy, axes, wants_bias):
  """Gradients of q, k, v and bias; None for a bias that needs none."""
  inputs, sums = _specs(axes)

  def call(*arrays):
    *grads, dbias = _call_backward(
      *arrays, head_dim=q.shape[-1], wants_bias=wants_bias
    )
    if wants_bias:
      dbias = dbias[..., : q.shape[1]]
      dbias = jax.lax.psum(dbias, axes[0]) if axes[0] else dbias
    return *grads, dbias

  call = on_mesh(call, (*inputs, sums, inputs[0]), inputs[:4])
  dq, dk, dv, dbias = call(
    *_inputs(q, k, v, bias, mask, kept), log_sum, _flat(dy)
  )
  if wants_bias:
    dbias = dbias.swapaxes(1, 2)[None].astype(bias.dtype)
  return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dbias


# ---------------------------------------------------------------------- calls


def _block_specs(q, k, v, bias, mask, kept, head_dim: int):
  """Blocks of the inputs, and of log-sums."""
  # Imported here because it is slow to import.
  from jax.experimental import pallas as pl

  n = _heads_at_once(q, k, mask, head_dim)

  def of_row(x):
    return pl.BlockSpec((1, x.shape[1], n * head_dim), lambda h, b: (b, 0, h))

  def of_heads(length):
    return pl.BlockSpec((1, n, 1, length), lambda h, b: (b, h, 0, 0))

  biases = kepts = None
  if bias is not None:
    biases = pl.BlockSpec((n, *bias.shape[1:]), lambda h, b: (h, 0, 0))
  if kept is not None:
    kepts = of_heads(k.shape[1])
  masks = pl.BlockSpec((1, *mask.shape[1:]), lambda h, b: (b, 0, 0))
  inputs = (of_row(q), of_row(k), of_row(v), biases, masks, kepts)
  return inputs, of_heads(q.shape[1])


def _heads_at_once(q, k, mask, head_dim: int) -> int:
  lengths, heads = (q.shape[1], k.shape[1]), q.shape[2] // head_dim
  found = heads_at_once(*lengths, heads, head_dim, mask.shape[1] > 1)
  assert found is not None, (q.shape, k.shape)  # `fused.fits` has asked.
  return found


def _call(name, kernel, inputs, more, head_dim, in_specs, out, kept, products):
  """Calls a kernel on one device.

  Args:
    name: Its name in a compiled program.
    kernel: `forward_kernel` or `backward_kernel`.
    inputs: Queries, keys, values, bias, mask and kept, as at the top.
    more: Other inputs of the kernel.
    head_dim: Size of a head.
    in_specs: Blocks of all inputs.
    out: Blocks, shape and type of each output.
    kept: Types of the arrays [k, q] that the kernel keeps of some units.
    products: Number of matrix products per head.
  """
  q, k, _, _, mask, _ = inputs
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  heads = q.shape[2] // head_dim
  n = _heads_at_once(q, k, mask, head_dim)
  weights = q.shape[0] * heads * q.shape[1] * k.shape[1]
  lengths = q.shape[1], k.shape[1]
  taken = _vmem_bytes(*lengths, n, head_dim, mask.shape[1] > 1)
  if len(out) > 3:  # The gradient of the bias.
    taken += 2 * 4 * math.prod(in_specs[3].block_shape)
  out_specs = [spec for spec, *_ in out]
  shapes = [jax.ShapeDtypeStruct(*shape) for _, *shape in out]
  return pl.pallas_call(
    functools.partial(kernel, head_dim=head_dim),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=shapes,
    scratch_shapes=[
      pltpu.VMEM(_kept_of_units(k.shape[1]), kind) for kind in kept
    ],
    name=name,
    **tpu.call_settings(
      (heads // n, q.shape[0]),
      ('parallel', 'arbitrary'),
      max(1.25 * taken, 16 * 2**20),
      (*inputs, *more, *shapes),
      weights,
      2 * products * weights * head_dim,
    ),
  )(*inputs, *more)


def _call_forward(*inputs, head_dim):
  """Calls the kernel on one device; arrays as at the top."""
  specs, sums = _block_specs(*inputs, head_dim)
  q = inputs[0]
  totals = (q.shape[0], q.shape[2] // head_dim, 1, q.shape[1])
  return _call(
    FORWARD,
    forward_kernel,
    inputs,
    (),
    head_dim,
    in_specs=specs,
    out=[(specs[0], q.shape, q.dtype), (sums, totals, jnp.float32)],
    kept=(jnp.float32,),
    products=2,
  )


def _call_backward(*arrays, head_dim, wants_bias):
  """Calls the kernel on one device: gradients of q, k, v, and bias or None."""
  *inputs, log_sum, dy = arrays
  specs, sums = _block_specs(*inputs, head_dim)
  q = inputs[0]
  asked = 4 if wants_bias else 3
  found = _call(
    BACKWARD,
    backward_kernel,
    inputs,
    (log_sum, dy),
    head_dim,
    in_specs=(*specs, sums, specs[0]),
    out=[
      (spec, x.shape, x.dtype)
      for spec, x in zip(specs[:asked], inputs[:asked], strict=True)
    ],
    # The gradient of a bias is summed over all rows.
    kept=(q.dtype, jnp.float32 if wants_bias else tpu.narrow(q.dtype)),
    products=5,
  )
  return tuple(found) if wants_bias else (*found, None)
