"""T5's attention on a TPU: one Pallas kernel forward, and one backward.

The attention weights [batch, heads, q, k] never leave the chip. One step of the
grid computes, in VMEM, the weights of one row and of the few heads that fill
the 128 lanes of a register:

    grid            (groups of heads, rows)
    q, k, v, y      [batch, length, heads * kv], as the projections return them
    bias            [heads, k, q], read once per head because rows change faster
    mask            [batch, 1, k] for padding, else [batch, k, q]
    kept            [batch, heads, 1, k], the dropout of keys

Keys come first in the weights [k, q], so maximum and sum run over rows of
registers, and matrix products transpose only arrays [length, kv]. The backward
pass computes the weights again from the logarithm of their sum. It returns the
gradients of q, k and v, and of the bias if that is differentiated.

T5 drops a key for all queries of a head. The kernel does so by multiplying the
key's value in VMEM, where values are transposed anyway. Outside the kernel, XLA
would move the values to another layout and back.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

LANES = 128
# Queries whose weights are computed at a time: the first number that fits.
# Larger blocks let the compiler do more in parallel.
BLOCKS = (640, 384, 256, 128)
# The part of VMEM that the kernel may use; XLA keeps arrays there too.
USABLE = 0.75
# Names of the two kernels in a compiled program.
FORWARD, BACKWARD = 't5_attention', 't5_attention_backward'
# Added to the logits of masked keys. It is finite, so that a row without any
# key (the last evaluation batch is filled with such rows) gives no NaN.
MASKED = -1e10


def group(heads: int, head_dim: int) -> int:
  """How many heads one step of the grid computes.

  The fewest that fill whole registers, or all if no such number divides them.
  """
  for n in range(1, heads):
    if heads % n == 0 and n * head_dim % LANES == 0:
      return n
  return heads


def block_size(
  queries: int, keys: int, heads: int, head_dim: int, whole_mask: bool
) -> int:
  """How many queries to compute at a time; 0 if none fit into VMEM.

  Args:
    queries: Length of the queries.
    keys: Length of the keys.
    heads: Heads on one device.
    head_dim: Size of a head.
    whole_mask: Whether the mask is [batch, k, q].
  """
  for size in BLOCKS:
    size = min(size, up(queries, LANES))
    taken = _vmem_bytes(queries, keys, heads, head_dim, whole_mask, size)
    if taken <= USABLE * vmem():
      # Blocks of about the same size, unlike [0, 640) and [640, 768).
      return up(math.ceil(queries / math.ceil(queries / size)), LANES)
  return 0


def _vmem_bytes(queries, keys, heads, head_dim, whole_mask, size) -> int:
  """Estimates the VMEM of the backward kernel, which needs more."""
  n = group(heads, head_dim)
  width = up(n * head_dim, LANES)
  keys, queries = up(keys, LANES), up(queries, LANES)
  # Inputs and outputs are there twice: one copied, one in use.
  rows = 2 * 2 * (3 * queries + 4 * keys) * width
  plane = 2 * keys * queries * (4 * n + 2 * whole_mask)
  # Gradients of keys and values, and the weights of a block in several states.
  return rows + plane + 2 * 4 * keys * width + 8 * 4 * keys * size


def vmem() -> int:
  """Bytes of VMEM per core of the traced program's devices."""
  if platform() != 'tpu':
    return 128 * 2**20
  from jax.experimental.pallas import tpu as pltpu

  return pltpu.get_tpu_info().vmem_capacity_bytes


def up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


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


def values(*arguments: Any) -> tuple[jax.Array | None, ...]:
  """The arrays of a forward rule's arguments, under `symbolic_zeros`."""
  return tuple(None if x is None else x.value for x in arguments)


def materialized(cotangent: Any) -> jax.Array:
  """The cotangent of an output, zeros if nothing reads the output."""
  if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
    return jnp.zeros(cotangent.shape, cotangent.dtype)
  return cotangent


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
  return jnp.where(mask.swapaxes(1, 2), 0.0, MASKED).astype(jnp.bfloat16)


def _inputs(q, k, v, bias, mask, kept):
  """The arrays in the layouts of the kernels, listed at the top."""
  if bias is not None:  # [1, heads, q, k] -> [heads, k, q]
    bias = bias[0].swapaxes(1, 2).astype(jnp.float32)
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


def on_mesh(call, in_specs, out_specs):
  """Shards a kernel, which XLA cannot do by itself."""
  if jax.sharding.get_abstract_mesh().empty:
    return call
  return jax.shard_map(
    call, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


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
    if wants_bias and axes[0]:
      dbias = jax.lax.psum(dbias, axes[0])
    return *grads, dbias

  call = on_mesh(call, (*inputs, sums, inputs[0]), inputs[:4])
  dq, dk, dv, dbias = call(
    *_inputs(q, k, v, bias, mask, kept), log_sum, _flat(dy)
  )
  if wants_bias:
    dbias = dbias.swapaxes(1, 2)[None].astype(bias.dtype)
  return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dbias


# -------------------------------------------------------------------- kernels


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
  """A product of two matrices over an axis of each, summed in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((over[0],), (over[1],)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _blocks(length: int, size: int) -> list[slice]:
  """Splits [0, length) into blocks of queries."""
  return [
    slice(start, min(start + size, length)) for start in range(0, length, size)
  ]


def _heads(width: int, head_dim: int) -> list[slice]:
  """The lanes of each head of a group."""
  return [slice(i, i + head_dim) for i in range(0, width, head_dim)]


def _hidden(mask_ref, queries: slice) -> jax.Array:
  """The mask of a block as a summand of its logits, [k, q] or [k, 1]."""
  if mask_ref.shape[1] == 1:
    return mask_ref[0].T  # [1, k] -> [k, 1]
  return mask_ref[0, :, queries].astype(jnp.float32)


def _logits(q, k, bias_ref, head: int, queries: slice, hidden):
  """Logits of one head and one block of queries: [k, q] float32."""
  logits = dot(k, q, (1, 1))
  if bias_ref is not None:
    logits = logits + bias_ref[head, :, queries]
  return logits + hidden


def _forward_kernel(
  q_ref,
  k_ref,
  v_ref,
  bias_ref,
  mask_ref,
  kept_ref,
  y_ref,
  log_sum_ref,
  *,
  head_dim: int,
  size: int,
):
  values = v_ref[0].T  # [k, heads * kv] -> [heads * kv, k]
  heads = list(enumerate(_heads(q_ref.shape[2], head_dim)))
  of_head = [values[lanes] for _, lanes in heads]
  if kept_ref is not None:
    of_head = [
      (x * kept_ref[0, head]).astype(values.dtype)
      for head, x in enumerate(of_head)
    ]
  for queries in _blocks(q_ref.shape[1], size):
    hidden = _hidden(mask_ref, queries)
    outputs = []
    for head, lanes in heads:
      logits = _logits(
        q_ref[0, queries, lanes],
        k_ref[0, :, lanes],
        bias_ref,
        head,
        queries,
        hidden,
      )
      most = jnp.max(logits, axis=0, keepdims=True)
      weights = jnp.exp(logits - most)
      total = jnp.sum(weights, axis=0, keepdims=True)  # [1, q]
      log_sum_ref[0, head, :, queries] = most + jnp.log(total)
      y = dot(of_head[head], weights.astype(values.dtype), (1, 0))
      outputs.append(y / total)  # [kv, q]
    y = jnp.concatenate(outputs, axis=0).T
    y_ref[0, queries, :] = y.astype(y_ref.dtype)


def _backward_kernel(
  q_ref,
  k_ref,
  v_ref,
  bias_ref,
  mask_ref,
  kept_ref,
  log_sum_ref,
  dy_ref,
  dq_ref,
  dk_ref,
  dv_ref,
  dbias_ref=None,
  *,
  head_dim: int,
  size: int,
):
  from jax.experimental import pallas as pl

  if dbias_ref is not None:

    @pl.when(pl.program_id(1) == 0)
    def _():
      dbias_ref[...] = jnp.zeros_like(dbias_ref)

  dtype = q_ref.dtype
  heads = list(enumerate(_heads(q_ref.shape[2], head_dim)))
  # [length, heads * kv] -> [heads * kv, length]
  keys, askers, dys = k_ref[0].T, q_ref[0].T, dy_ref[0].T
  dk, dv = [0.0 for _ in heads], [0.0 for _ in heads]
  for queries in _blocks(q_ref.shape[1], size):
    hidden = _hidden(mask_ref, queries)
    dqs = []
    for head, lanes in heads:
      q, dy = q_ref[0, queries, lanes], dy_ref[0, queries, lanes]
      k, v = k_ref[0, :, lanes], v_ref[0, :, lanes]
      logits = _logits(q, k, bias_ref, head, queries, hidden)
      weights = jnp.exp(logits - log_sum_ref[0, head, :, queries])
      dweights = dot(v, dy, (1, 1))  # [k, q]
      if kept_ref is not None:
        dweights *= kept_ref[0, head].T  # [1, k] -> [k, 1]
      mean = jnp.sum(weights * dweights, axis=0, keepdims=True)
      dlogits = weights * (dweights - mean)
      if dbias_ref is not None:
        dbias_ref[head, :, queries] += dlogits
      dlogits = dlogits.astype(dtype)
      dv[head] += dot(dys[lanes, queries], weights.astype(dtype), (1, 1))
      dk[head] += dot(askers[lanes, queries], dlogits, (1, 1))
      dqs.append(dot(keys[lanes], dlogits, (1, 0)))  # [kv, q]
    dq = jnp.concatenate(dqs, axis=0).T
    dq_ref[0, queries, :] = dq.astype(dtype)
  if kept_ref is not None:
    dv = [x * kept_ref[0, head] for head, x in enumerate(dv)]
  dk_ref[0] = jnp.concatenate(dk, axis=0).T.astype(dtype)
  dv_ref[0] = jnp.concatenate(dv, axis=0).T.astype(dtype)


def _block_specs(q, k, v, bias, mask, kept, head_dim: int):
  """Blocks of the inputs, and of log-sums."""
  # Imported here because it is slow to import.
  from jax.experimental import pallas as pl

  n = group(q.shape[2] // head_dim, head_dim)

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


def _call(name, kernel, inputs, more, head_dim, in_specs, out, products):
  """Calls a kernel on one device.

  Args:
    name: Its name in a compiled program.
    kernel: `_forward_kernel` or `_backward_kernel`.
    inputs: Queries, keys, values, bias, mask and kept, as at the top.
    more: Other inputs of the kernel.
    head_dim: Size of a head.
    in_specs: Blocks of all inputs.
    out: Blocks, shape and type of each output.
    products: Number of matrix products per head.
  """
  q, k, _, _, mask, _ = inputs
  from jax.experimental import pallas as pl

  heads = q.shape[2] // head_dim
  size = block_size(q.shape[1], k.shape[1], heads, head_dim, mask.shape[1] > 1)
  weights = q.shape[0] * heads * q.shape[1] * k.shape[1]
  lengths = q.shape[1], k.shape[1]
  taken = _vmem_bytes(*lengths, heads, head_dim, mask.shape[1] > 1, size)
  if len(out) > 3:  # The gradient of the bias.
    taken += 2 * 4 * math.prod(in_specs[3].block_shape)
  out_specs = [spec for spec, *_ in out]
  shapes = [jax.ShapeDtypeStruct(*shape) for _, *shape in out]
  return pl.pallas_call(
    functools.partial(kernel, head_dim=head_dim, size=size),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=shapes,
    name=name,
    **call_settings(
      (heads // group(heads, head_dim), q.shape[0]),
      ('parallel', 'arbitrary'),
      max(1.25 * taken, 16 * 2**20),
      (*inputs, *more, *shapes),
      weights,
      2 * products * weights * head_dim,
    ),
  )(*inputs, *more)


def call_settings(
  grid: tuple[int, ...],
  semantics: tuple[str, ...],
  needed: float,
  arrays: Sequence[Any],
  weights: int,
  flops: int,
) -> dict[str, Any]:
  """Settings of `pl.pallas_call` that all our kernels share.

  Args:
    grid: Its steps.
    semantics: The axes of the grid: 'parallel' or 'arbitrary'.
    needed: Bytes of VMEM.
    arrays: All inputs and outputs, or None.
    weights: How many exponentials, or other such functions, are computed.
    flops: Operations of all products.
  """
  # Imported here because they are slow to import.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  return {
    'grid': grid,
    # `tools.tpu_compiler` reads it in the compiled program.
    'metadata': {'steps': str(math.prod(grid))},
    # Tests compute it on other devices, slowly.
    'interpret': platform() != 'tpu',
    'compiler_params': pltpu.CompilerParams(
      dimension_semantics=semantics,
      # XLA may use the rest for other arrays.
      vmem_limit_bytes=int(min(0.9 * vmem(), needed)),
    ),
    'cost_estimate': pl.CostEstimate(
      flops=flops,
      transcendentals=weights,
      bytes_accessed=sum(
        math.prod(x.shape) * x.dtype.itemsize for x in arrays if x is not None
      ),
    ),
  }


def _call_forward(*inputs, head_dim):
  """Calls the kernel on one device; arrays as at the top."""
  specs, sums = _block_specs(*inputs, head_dim)
  q = inputs[0]
  totals = (q.shape[0], q.shape[2] // head_dim, 1, q.shape[1])
  return _call(
    FORWARD,
    _forward_kernel,
    inputs,
    (),
    head_dim,
    in_specs=specs,
    out=[(specs[0], q.shape, q.dtype), (sums, totals, jnp.float32)],
    products=2,
  )


def _call_backward(*arrays, head_dim, wants_bias):
  """Calls the kernel on one device: gradients of q, k, v, and bias or None."""
  *inputs, log_sum, dy = arrays
  specs, sums = _block_specs(*inputs, head_dim)
  asked = 4 if wants_bias else 3
  found = _call(
    BACKWARD,
    _backward_kernel,
    inputs,
    (log_sum, dy),
    head_dim,
    in_specs=(*specs, sums, specs[0]),
    out=[
      (spec, x.shape, x.dtype)
      for spec, x in zip(specs[:asked], inputs[:asked], strict=True)
    ],
    products=5,
  )
  return tuple(found) if wants_bias else (*found, None)


def platform() -> str:
  """The platform of the traced program's devices."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device or jax.devices()[0]).platform
