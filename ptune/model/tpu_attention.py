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

The compiler schedules instructions only a little earlier or later than they are
written. So the second pass over a head's weights is written in turns with the
first pass over those of the next head (`_pipelined`): the matrix unit works
for one while the other's exponentials are computed.

A matrix unit of 256 has room beside the depth of one register. There the mask of
padding and the logarithm of the sum are further columns of the keys and rows of
the queries, so that adding them to the logits takes no instruction.

T5 drops a key for all queries of a head. The kernel does so by multiplying the
key's value in VMEM. Outside the kernel, XLA would move the values to another
layout and back.
"""

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

LANES = 128
# Queries whose weights are computed at a time: the first number that fits.
# Larger blocks let the compiler do more in parallel.
BLOCKS = (640, 384, 256, 128)
# How many groups of heads that share registers one step computes, if the weights
# of a head have at most so many elements: the start and end of a step, which
# nothing overlaps, are then a smaller part of it.
GROUPS, FEW = 2, 2**20
# Rows of the depth of a product that summands of the logits take.
SUMMANDS = 16
# Keys of a chunk, after which the passes over two heads take turns.
CHUNK = 256
# The part of VMEM that the kernel may use; XLA keeps arrays there too.
USABLE = 0.75
# Names of the two kernels in a compiled program.
FORWARD, BACKWARD = 't5_attention', 't5_attention_backward'
# Added to the logits of masked keys. It is finite, so that a row without any
# key (the last evaluation batch is filled with such rows) gives no NaN.
MASKED = -1e10


def group(heads: int, head_dim: int) -> int:
  """How many heads share registers.

  The fewest that fill whole registers, or all if no such number divides them.
  """
  for n in range(1, heads):
    if heads % n == 0 and n * head_dim % LANES == 0:
      return n
  return heads


class Tiling(NamedTuple):
  """What one step of the grid computes.

  Attributes:
    heads: How many heads.
    block: Queries whose weights are computed at a time.
  """

  heads: int
  block: int


def tiling(
  queries: int, keys: int, heads: int, head_dim: int, whole_mask: bool
) -> Tiling | None:
  """Chooses what one step of the grid computes; None if nothing fits into VMEM.

  Args:
    queries: Length of the queries.
    keys: Length of the keys.
    heads: Heads on one device.
    head_dim: Size of a head.
    whole_mask: Whether the mask is [batch, k, q].
  """
  n = group(heads, head_dim)
  several = queries * keys <= FEW and heads % (GROUPS * n) == 0
  for size in BLOCKS:
    for at_once in (GROUPS * n, n) if several else (n,):
      size = min(size, up(queries, LANES))
      taken = _vmem_bytes(
        queries, keys, at_once * head_dim, at_once, whole_mask, size
      )
      if taken <= USABLE * vmem():
        # Blocks of about the same size, unlike [0, 640) and [640, 768).
        block = math.ceil(queries / math.ceil(queries / size))
        return Tiling(at_once, up(block, LANES))
  return None


def _vmem_bytes(queries, keys, width, heads, whole_mask, size) -> int:
  """Estimates the VMEM of the backward kernel, which needs more."""
  width = up(width, LANES)
  keys, queries = up(keys, LANES), up(queries, LANES)
  # Inputs and outputs are there twice: one copied, one in use.
  rows = 2 * 2 * (3 * queries + 4 * keys) * width
  plane = 2 * keys * queries * (4 * heads + 2 * whole_mask)
  # Gradients of keys and values, and the weights of two blocks in several
  # states.
  return rows + plane + 2 * 4 * keys * width + 8 * 4 * keys * size


def vmem() -> int:
  """Bytes of VMEM per core of the traced program's devices."""
  if platform() != 'tpu':
    return 128 * 2**20
  from jax.experimental.pallas import tpu as pltpu

  return pltpu.get_tpu_info().vmem_capacity_bytes


def matrix_unit() -> int:
  """Rows and columns of a matrix unit of the traced program's devices."""
  if platform() != 'tpu':
    return 128
  from jax.experimental.pallas import tpu as pltpu

  return pltpu.get_tpu_info().mxu_column_size


def narrow(dtype: Any) -> Any:
  """The type to compute in where the precision of `dtype` is enough.

  The chips with large matrix units also multiply bfloat16 as it is, twice as
  much in a register. Others widen it first.
  """
  return dtype if matrix_unit() > LANES else jnp.float32


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
  """Splits [0, length) into blocks."""
  return [
    slice(start, min(start + size, length)) for start in range(0, length, size)
  ]


class _Unit(NamedTuple):
  """The weights of one head, for one block of queries.

  Attributes:
    head: The head's number in this step of the grid.
    queries: The block.
    lanes: The lanes that hold the head and those that share registers with it.
    own: The head's lanes among them.
    last: Whether it is the last of these heads.
  """

  head: int
  queries: slice
  lanes: slice
  own: slice
  last: bool


def _units(queries: int, width: int, head_dim: int, size: int) -> list[_Unit]:
  n = group(width // head_dim, head_dim)
  return [
    _Unit(
      start // head_dim + i,
      block,
      slice(start, start + n * head_dim),
      slice(i * head_dim, (i + 1) * head_dim),
      i == n - 1,
    )
    for start in range(0, width, n * head_dim)
    for block in _blocks(queries, size)
    for i in range(n)
  ]


_Pass = Generator[None, None, Any]


def _pipelined(
  units: Sequence[_Unit],
  first: Callable[[_Unit, int], _Pass],
  second: Callable[[_Unit, int, Any], _Pass],
) -> None:
  """Writes two passes over each unit, the second beside the next unit's first.

  Args:
    units: What to compute.
    first: Gets a unit, and 0 or 1: where to keep its weights. Yields wherever
      the other pass may go on.
    second: Also gets what the first pass returned.
  """
  before = None
  for i, unit in enumerate(units):
    result = _in_turns(first(unit, i % 2), before)
    before = second(unit, i % 2, result)
  _in_turns(before)


def _in_turns(one: _Pass | None, other: _Pass | None = None) -> Any:
  """Runs generators a step at a time; returns what the first one returns."""
  running, result = [x for x in (one, other) if x], None
  while running:
    for x in list(running):
      try:
        next(x)
      except StopIteration as end:
        running.remove(x)
        result = end.value if x is one else result
  return result


class _Step:
  """What both kernels compute of a step's inputs, each piece once.

  Args:
    q_ref: The queries.
    k_ref: The keys.
    bias_ref: The bias, or None.
    mask_ref: The mask.
    head_dim: Size of a head.
  """

  def __init__(self, q_ref, k_ref, bias_ref, mask_ref, head_dim: int):
    self._q, self._k, self._bias, self._mask = q_ref, k_ref, bias_ref, mask_ref
    self._found = {}
    self._padding = mask_ref.shape[1] == 1
    n = group(k_ref.shape[2] // head_dim, head_dim)
    # Whether the depth of a product has room for what is added to the logits.
    self._deep = n * head_dim + SUMMANDS <= matrix_unit()
    if self._deep:
      ones = jnp.ones((1, k_ref.shape[1]), jnp.float32)
      hidden = mask_ref[0] if self._padding else 0.0 * ones
      self._columns = _summands([hidden, ones, ones, ones], k_ref.dtype).T
    elif self._padding:
      self._hidden = mask_ref[0].T  # [1, k] -> [k, 1]

  def turned(self, ref, rows: slice, lanes: slice) -> jax.Array:
    """[length, heads * kv] -> [heads * kv, length]."""
    key = id(ref), rows.start, lanes.start
    if key not in self._found:
      self._found[key] = ref[0, rows, lanes].T
    return self._found[key]

  def alone(self, ref, unit: _Unit) -> jax.Array:
    """The head's queries, or dy, turned; zeros for those that share its lanes.

    A product of it and all lanes of keys is that of the head's lanes alone.
    """
    x = self.turned(ref, unit.queries, unit.lanes)
    before = jnp.zeros((unit.own.start, x.shape[1]), x.dtype)
    after = jnp.zeros((x.shape[0] - unit.own.stop, x.shape[1]), x.dtype)
    parts = (before, x[unit.own], after)
    return jnp.concatenate([x for x in parts if x.size], axis=0)

  def _keys(self, lanes: slice) -> jax.Array:
    """Keys, and columns that are multiplied with summands of the logits."""
    if lanes.start not in self._found:
      k = self._k[0, :, lanes]
      k = jnp.concatenate([k, self._columns], axis=1) if self._deep else k
      self._found[lanes.start] = k
    return self._found[lanes.start]

  def logits(
    self, unit: _Unit, less: jax.Array | None = None
  ) -> Callable[[slice], jax.Array]:
    """The masked logits less a row [1, q]: a function of a chunk of keys."""
    q = self.alone(self._q, unit)
    if self._deep:
      rows = [jnp.ones((1, q.shape[1]), jnp.float32)]
      rows += [] if less is None else _split(-less)
      q = jnp.concatenate([q, _summands(rows, q.dtype)], axis=0)
    product = dot(self._keys(unit.lanes), q, (1, 0))

    def of(chunk: slice) -> jax.Array:
      logits = product[chunk]
      if self._bias is not None:
        logits += self._bias[unit.head, chunk, unit.queries]
      if not self._padding:
        logits += self._mask[0, chunk, unit.queries].astype(jnp.float32)
      elif not self._deep:
        logits += self._hidden[chunk]
      return logits if less is None or self._deep else logits - less

    return of


def _summands(rows: Sequence[jax.Array], dtype: Any) -> jax.Array:
  """Rows [1, n] and zeros, which fill a register of bfloat16."""
  zeros = jnp.zeros((SUMMANDS - len(rows), rows[0].shape[1]), jnp.float32)
  return jnp.concatenate([*rows, zeros], axis=0).astype(dtype)


def _split(x: jax.Array) -> list[jax.Array]:
  """Three numbers of bfloat16 whose sum is one of float32."""
  parts = []
  for _ in range(3):
    parts.append(x.astype(jnp.bfloat16).astype(jnp.float32))
    x = x - parts[-1]
  return parts


def _forward_kernel(
  q_ref,
  k_ref,
  v_ref,
  bias_ref,
  mask_ref,
  kept_ref,
  y_ref,
  log_sum_ref,
  logits_ref,
  *,
  head_dim: int,
  size: int,
):
  step = _Step(q_ref, k_ref, bias_ref, mask_ref, head_dim)
  chunks = _blocks(k_ref.shape[1], CHUNK)
  everything = slice(0, k_ref.shape[1])
  outputs = []

  def first(unit: _Unit, place: int):
    logits = step.logits(unit)
    most = -jnp.inf
    for chunk in chunks:
      some = logits(chunk)
      logits_ref[place, chunk, : some.shape[1]] = some
      most = jnp.maximum(most, jnp.max(some, axis=0, keepdims=True))
      yield
    return most

  def second(unit: _Unit, place: int, most: jax.Array):
    v = step.turned(v_ref, everything, unit.lanes)[unit.own]
    if kept_ref is not None:
      v = (v * kept_ref[0, unit.head]).astype(v.dtype)
    total, y = 0.0, 0.0
    for chunk in chunks:
      weights = jnp.exp(logits_ref[place, chunk, : most.shape[1]] - most)
      total += jnp.sum(weights, axis=0, keepdims=True)
      y += dot(v[:, chunk], weights.astype(v.dtype), (1, 0))  # [kv, q]
      yield
    log_sum_ref[0, unit.head, :, unit.queries] = most + jnp.log(total)
    outputs.append(y / total)
    if unit.last:
      y = jnp.concatenate(outputs, axis=0).astype(y_ref.dtype)
      y_ref[0, unit.queries, unit.lanes] = y.T
      outputs.clear()

  units = _units(q_ref.shape[1], q_ref.shape[2], head_dim, size)
  _pipelined(units, first, second)


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
  *refs,
  head_dim: int,
  size: int,
):
  from jax.experimental import pallas as pl

  dbias_ref = refs[0] if len(refs) > 2 else None
  weights_ref, dweights_ref = refs[-2:]
  if dbias_ref is not None:

    @pl.when(pl.program_id(1) == 0)
    def _():
      dbias_ref[...] = jnp.zeros_like(dbias_ref)

  dtype = q_ref.dtype
  step = _Step(q_ref, k_ref, bias_ref, mask_ref, head_dim)
  chunks = _blocks(k_ref.shape[1], CHUNK)
  everything = slice(0, k_ref.shape[1])
  # By chunk, of each head that shares lanes; and of the queries of a block.
  dks, dvs, dqs, of_lanes = {}, {}, [], {}

  def values(unit: _Unit) -> jax.Array:
    """Values times what dropout keeps."""
    v = v_ref[0, :, unit.lanes]
    if kept_ref is None:
      return v
    if unit.lanes.start not in of_lanes:
      n = v.shape[1] // head_dim
      first = unit.lanes.start // head_dim
      kept = [
        jnp.broadcast_to(kept_ref[0, first + i], (head_dim, v.shape[0]))
        for i in range(n)
      ]
      kept = jnp.concatenate(kept, axis=0).astype(dtype).T
      of_lanes[unit.lanes.start] = v * kept
    return of_lanes[unit.lanes.start]

  def first(unit: _Unit, place: int):
    logits = step.logits(unit, log_sum_ref[0, unit.head, :, unit.queries])
    product = dot(values(unit), step.alone(dy_ref, unit), (1, 0))
    mean = 0.0
    for chunk in chunks:
      weights, dweights = jnp.exp(logits(chunk)), product[chunk]
      mean += jnp.sum(weights * dweights, axis=0, keepdims=True)
      at = place, chunk, slice(weights.shape[1])
      weights_ref[at] = weights.astype(weights_ref.dtype)
      dweights_ref[at] = dweights.astype(dweights_ref.dtype)
      yield
    return mean

  def second(unit: _Unit, place: int, mean: jax.Array):
    q, dy = (
      step.turned(x, unit.queries, unit.lanes)[unit.own]
      for x in (q_ref, dy_ref)
    )
    k = step.turned(k_ref, everything, unit.lanes)[unit.own]
    kind = dweights_ref.dtype
    mean, dq = mean.astype(kind), 0.0
    for chunk in chunks:
      at = place, chunk, slice(mean.shape[1])
      weights = weights_ref[at]
      dlogits = weights.astype(kind) * (dweights_ref[at] - mean)
      if dbias_ref is not None:
        dbias_ref[unit.head, chunk, unit.queries] += dlogits
      dlogits = dlogits.astype(dtype)
      key = unit.own.start, chunk.start
      dvs[key] = dvs.get(key, 0.0) + dot(dy, weights, (1, 1))  # [kv, k]
      dks[key] = dks.get(key, 0.0) + dot(q, dlogits, (1, 1))
      dq += dot(k[:, chunk], dlogits, (1, 0))  # [kv, q]
      if unit.queries.stop == q_ref.shape[1]:
        if kept_ref is not None:
          dvs[key] *= kept_ref[0, unit.head, :, chunk]
        if unit.last:
          for ref, found in ((dk_ref, dks), (dv_ref, dvs)):
            of_chunk = [
              found.pop(k) for k in sorted(found) if k[1] == chunk.start
            ]
            grads = jnp.concatenate(of_chunk, axis=0).astype(dtype)
            ref[0, chunk, unit.lanes] = grads.T
      yield
    dqs.append(dq)
    if unit.last:
      dq_ref[0, unit.queries, unit.lanes] = (
        jnp.concatenate(dqs, axis=0).astype(dtype).T
      )
      dqs.clear()

  units = _units(q_ref.shape[1], q_ref.shape[2], head_dim, size)
  _pipelined(units, first, second)


def _block_specs(q, k, v, bias, mask, kept, head_dim: int):
  """Blocks of the inputs, and of log-sums."""
  # Imported here because it is slow to import.
  from jax.experimental import pallas as pl

  n = _tiling_of(q, k, mask, head_dim).heads

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


def _tiling_of(q, k, mask, head_dim: int) -> Tiling:
  heads = q.shape[2] // head_dim
  found = tiling(q.shape[1], k.shape[1], heads, head_dim, mask.shape[1] > 1)
  assert found is not None, (q.shape, k.shape)  # `fused.fits` has asked.
  return found


def _call(name, kernel, inputs, more, head_dim, in_specs, out, kept, products):
  """Calls a kernel on one device.

  Args:
    name: Its name in a compiled program.
    kernel: `_forward_kernel` or `_backward_kernel`.
    inputs: Queries, keys, values, bias, mask and kept, as at the top.
    more: Other inputs of the kernel.
    head_dim: Size of a head.
    in_specs: Blocks of all inputs.
    out: Blocks, shape and type of each output.
    kept: Types of the arrays [k, q] that the kernel keeps of each of two units.
    products: Number of matrix products per head.
  """
  q, k, _, _, mask, _ = inputs
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  heads = q.shape[2] // head_dim
  n, size = _tiling_of(q, k, mask, head_dim)
  weights = q.shape[0] * heads * q.shape[1] * k.shape[1]
  lengths = q.shape[1], k.shape[1]
  taken = _vmem_bytes(*lengths, n * head_dim, n, mask.shape[1] > 1, size)
  if len(out) > 3:  # The gradient of the bias.
    taken += 2 * 4 * math.prod(in_specs[3].block_shape)
  out_specs = [spec for spec, *_ in out]
  shapes = [jax.ShapeDtypeStruct(*shape) for _, *shape in out]
  return pl.pallas_call(
    functools.partial(kernel, head_dim=head_dim, size=size),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=shapes,
    scratch_shapes=[pltpu.VMEM((2, k.shape[1], size), kind) for kind in kept],
    name=name,
    **call_settings(
      (heads // n, q.shape[0]),
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
    _backward_kernel,
    inputs,
    (log_sum, dy),
    head_dim,
    in_specs=(*specs, sums, specs[0]),
    out=[
      (spec, x.shape, x.dtype)
      for spec, x in zip(specs[:asked], inputs[:asked], strict=True)
    ],
    # The gradient of a bias is summed over all rows.
    kept=(q.dtype, jnp.float32 if wants_bias else narrow(q.dtype)),
    products=5,
  )
  return tuple(found) if wants_bias else (*found, None)


def platform() -> str:
  """The platform of the traced program's devices."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device or jax.devices()[0]).platform
