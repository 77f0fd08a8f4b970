"""The kernels of `tpu_attention`: one step of the grid.

Keys come first in the weights [k, q], so maximum and sum run over rows of
registers, and matrix products transpose only arrays [length, kv].

The compiler schedules instructions only a little earlier or later than they are
written. So the second pass over a head's weights is written in turns with the
first pass over those of the next head (`_pipelined`): the matrix unit works for
one while the other's exponentials are computed.

A matrix unit of 256 has room beside the depth of one register. There the mask
of padding and the logarithm of the sum are further columns of the keys and rows
of the queries, so that adding them to the logits takes no instruction.

T5 drops a key for all queries of a head. The kernel does so by multiplying the
key's value in VMEM. Outside the kernel, XLA would move the values to another
layout and back.
"""

from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ptune.model.tpu import LANES, dot, matrix_unit

# Rows that summands of the logits take in the depth of a product.
SUMMANDS = 16
# Keys of a chunk, after which the passes over two heads take turns.
CHUNK = 256


def group(heads: int, head_dim: int) -> int:
  """How many heads share registers.

  The fewest that fill whole registers, or all if no such number divides them.
  """
  for n in range(1, heads):
    if heads % n == 0 and n * head_dim % LANES == 0:
      return n
  return heads


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

  def once(self, key: Hashable, make: Callable[[], jax.Array]) -> jax.Array:
    """What `make` returned when it was first called for this key."""
    if key not in self._found:
      self._found[key] = make()
    return self._found[key]

  def turned(self, ref, rows: slice, lanes: slice) -> jax.Array:
    """[length, heads * kv] -> [heads * kv, length]."""
    key = id(ref), rows.start, lanes.start
    return self.once(key, lambda: ref[0, rows, lanes].T)

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

    def make():
      k = self._k[0, :, lanes]
      return jnp.concatenate([k, self._columns], axis=1) if self._deep else k

    return self.once(('keys', lanes.start), make)

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


def forward_kernel(
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


def backward_kernel(
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
  # Of each head that shares lanes: by chunk, and of the queries of a block.
  dks, dvs, dqs = [{} for _ in chunks], [{} for _ in chunks], []

  def values(unit: _Unit) -> jax.Array:
    """Values times what dropout keeps."""
    lanes = unit.lanes

    def make():
      v = v_ref[0, :, lanes]
      if kept_ref is None:
        return v
      kept = [
        jnp.broadcast_to(kept_ref[0, head], (head_dim, v.shape[0]))
        for head in range(lanes.start // head_dim, lanes.stop // head_dim)
      ]
      return v * jnp.concatenate(kept, axis=0).astype(dtype).T

    return step.once(('values', lanes.start), make)

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
    for chunk, dk, dv in zip(chunks, dks, dvs, strict=True):
      at = place, chunk, slice(mean.shape[1])
      weights = weights_ref[at]
      dlogits = weights.astype(kind) * (dweights_ref[at] - mean)
      if dbias_ref is not None:
        dbias_ref[unit.head, chunk, unit.queries] += dlogits
      dlogits = dlogits.astype(dtype)
      head = unit.head
      dv[head] = dv.get(head, 0.0) + dot(dy, weights, (1, 1))  # [kv, k]
      dk[head] = dk.get(head, 0.0) + dot(q, dlogits, (1, 1))
      dq += dot(k[:, chunk], dlogits, (1, 0))  # [kv, q]
      if unit.queries.stop == q_ref.shape[1]:
        if kept_ref is not None:
          dv[head] *= kept_ref[0, head, :, chunk]
        if unit.last:
          for ref, found in ((dk_ref, dk), (dv_ref, dv)):
            grads = jnp.concatenate([*found.values()], axis=0).astype(dtype)
            ref[0, chunk, unit.lanes] = grads.T
            found.clear()
      yield
    dqs.append(dq)
    if unit.last:
      dq_ref[0, unit.queries, unit.lanes] = (
        jnp.concatenate(dqs, axis=0).astype(dtype).T
      )
      dqs.clear()

  units = _units(q_ref.shape[1], q_ref.shape[2], head_dim, size)
  _pipelined(units, first, second)
