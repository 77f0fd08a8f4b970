"""The kernels of `tpu_attention`: one step of the grid.

Keys come first in the weights [k, q], so their maximum runs over rows of
registers, and matrix products transpose only arrays [length, kv].

The weights are computed in units: as many queries of a head as the matrix unit
has columns. The compiler schedules instructions only a little earlier or later
than they are written. So the second pass over a unit is written in turns with
the first pass over a later one (`_pipelined`): the matrix unit works for one
while the other's exponentials are computed.

A matrix unit of 256 has room beside the depth of one register. There the mask
of padding and the logarithm of the sum are further columns of the keys and rows
of the queries, so that adding them to the logits takes no instruction. The sum
of the weights is a row of their product with the values and a row of ones.

T5 drops a key for all queries of a head. The kernel does so by multiplying the
key's value in VMEM. Outside the kernel, XLA would move the values to another
layout and back.
"""

import collections
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ptune.model.tpu import LANES, dot, matrix_unit, up

# Rows that summands of the logits take in the depth of a product.
SUMMANDS = 16
# Keys of a chunk, after which the passes over two units take turns.
CHUNK = 256
# How many units the first pass is ahead of the second, so that no product waits
# for what it needs. The weights of one more are kept.
AHEAD = 2


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


class _Part(NamedTuple):
  """Some queries of one head.

  Attributes:
    head: The head's number in this step of the grid.
    own: Its lanes among those that it shares with other heads.
    queries: The queries.
    columns: Where they are among those of a unit.
  """

  head: int
  own: slice
  queries: slice
  columns: slice


class _Unit(NamedTuple):
  """Weights that are computed at a time.

  Attributes:
    lanes: The lanes of heads that share registers.
    parts: Queries of one of these heads, or those of several that are left over
      where each head's do not fill the matrix unit.
    last: Whether it is the last unit of these heads.
  """

  lanes: slice
  parts: tuple[_Part, ...]
  last: bool


def _units(queries: int, width: int, head_dim: int) -> list[_Unit]:
  """Splits the weights of heads of a width altogether into units."""
  size = matrix_unit()
  # Only whole registers can stand beside each other.
  rest = queries % size if queries % LANES == 0 else 0
  n = group(width // head_dim, head_dim)

  def part(head: int, block: slice, column: int = 0) -> _Part:
    start = head % n * head_dim
    columns = slice(column, column + block.stop - block.start)
    return _Part(head, slice(start, start + head_dim), block, columns)

  units = []
  for start in range(0, width // head_dim, n):
    heads = range(start, start + n)
    whole = _blocks(queries - rest, size)
    parts = [(part(head, block),) for block in whole for head in heads]
    if rest:
      left = slice(queries - rest, queries)
      parts += [
        tuple(part(head, left, j * rest) for j, head in enumerate(heads[some]))
        for some in _blocks(n, size // rest)
      ]
    lanes = slice(start * head_dim, (start + n) * head_dim)
    units += [_Unit(lanes, x, x is parts[-1]) for x in parts]
  return units


_Pass = Generator[None, None, Any]


def _pipelined(
  units: Sequence[_Unit],
  first: Callable[[_Unit, int], _Pass],
  second: Callable[[_Unit, int, Any], _Pass],
) -> None:
  """Writes two passes over each unit, the second beside a later unit's first.

  Args:
    units: What to compute.
    first: Gets a unit, and where to keep its weights: up to AHEAD. Yields
      wherever the other pass may go on.
    second: Also gets what the first pass returned.
  """
  behind = collections.deque([None] * AHEAD)
  for i, unit in enumerate(units):
    place = i % (AHEAD + 1)
    result = _in_turns(first(unit, place), behind.popleft())
    behind.append(second(unit, place, result))
  for rest in behind:
    _in_turns(rest)


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
    queries: How many queries to compute, at least all.
  """

  def __init__(
    self, q_ref, k_ref, bias_ref, mask_ref, head_dim: int, queries: int
  ):
    self._q, self._k, self._bias, self._mask = q_ref, k_ref, bias_ref, mask_ref
    self._queries = queries
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

  def turned(self, ref, lanes: slice) -> jax.Array:
    """[length, heads * kv] -> [heads * kv, length]."""
    return self.once((id(ref), lanes.start), lambda: ref[0, :, lanes].T)

  def queries(self, ref, lanes: slice) -> jax.Array:
    """Queries, or dy, turned, and zeros for those that are too many."""
    return self.once(
      ('queries', id(ref), lanes.start),
      lambda: padded(self.turned(ref, lanes), self._queries),
    )

  def alone(self, ref, unit: _Unit) -> jax.Array:
    """The unit's queries, or dy; zeros for other heads that share its lanes.

    A product of it and all lanes of keys is that of each head's lanes alone.
    """

    def of(part: _Part) -> jax.Array:
      x = self.queries(ref, unit.lanes)[:, part.queries]
      before = jnp.zeros((part.own.start, x.shape[1]), x.dtype)
      after = jnp.zeros((x.shape[0] - part.own.stop, x.shape[1]), x.dtype)
      parts = (before, x[part.own], after)
      return jnp.concatenate([x for x in parts if x.size], axis=0)

    return _beside(of(part) for part in unit.parts)

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
    keys, parts = self._keys(unit.lanes), unit.parts

    def of(chunk: slice) -> jax.Array:
      logits = dot(keys[chunk], q, (1, 0))
      if self._bias is not None:
        logits += _beside(self._bias[x.head, chunk, x.queries] for x in parts)
      if not self._padding:
        mask = _beside(self._mask[0, chunk, x.queries] for x in parts)
        logits += mask.astype(jnp.float32)
      elif not self._deep:
        logits += self._hidden[chunk]
      return logits if less is None or self._deep else logits - less

    return of


def _beside(arrays: Iterable[jax.Array]) -> jax.Array:
  """Puts the columns of a unit's parts beside each other."""
  arrays = list(arrays)
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=1)


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


def padded(x: jax.Array, length: int) -> jax.Array:
  """Zeros behind the last axis."""
  more = length - x.shape[-1]
  zeros = jnp.zeros((*x.shape[:-1], more), x.dtype)
  return jnp.concatenate([x, zeros], axis=-1) if more else x


class _Writer:
  """Writes what is found of heads that share registers, when all is there."""

  def __init__(self, ref):
    self._ref = ref
    self._found = {}

  def add(self, unit: _Unit, part: _Part, x: jax.Array) -> None:
    """Takes [kv, q] of a part."""
    found = self._found.setdefault(part.queries.start, [])
    found.append(x)
    width = unit.lanes.stop - unit.lanes.start
    if len(found) * x.shape[0] < width:
      return
    stop = min(part.queries.stop, self._ref.shape[1])
    rows = slice(part.queries.start, stop)
    x = jnp.concatenate(found, axis=0).astype(self._ref.dtype).T
    self._ref[0, rows, unit.lanes] = x[: rows.stop - rows.start]
    found.clear()


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
):
  _, queries, width = q_ref.shape
  keys = k_ref.shape[1]
  step = _Step(q_ref, k_ref, bias_ref, mask_ref, head_dim, queries)
  chunks, outputs = _blocks(keys, CHUNK), _Writer(y_ref)

  def values(unit: _Unit, part: _Part) -> jax.Array:
    """[kv, k], and rows of which the first is ones."""

    def make():
      v = step.turned(v_ref, unit.lanes)[part.own]
      if kept_ref is not None:
        v = (v * kept_ref[0, part.head]).astype(v.dtype)
      ones = _summands([jnp.ones((1, keys), jnp.float32)], v.dtype)
      return jnp.concatenate([v, ones], axis=0)

    return step.once(('values', part.head), make)

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
    sums = [0.0 for _ in unit.parts]
    for chunk in chunks:
      weights = jnp.exp(logits_ref[place, chunk, : most.shape[1]] - most)
      weights = weights.astype(v_ref.dtype)
      for i, part in enumerate(unit.parts):
        v = values(unit, part)[:, chunk]
        sums[i] += dot(v, weights[:, part.columns], (1, 0))  # [kv and more, q]
      yield
    for found, part in zip(sums, unit.parts, strict=True):
      y, total = found[:head_dim], found[head_dim : head_dim + 1]
      log_sum = most[:, part.columns] + jnp.log(total)
      log_sum_ref[0, part.head, :, part.queries] = log_sum
      outputs.add(unit, part, y / total)

  _pipelined(_units(queries, width, head_dim), first, second)


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
):
  from jax.experimental import pallas as pl

  dbias_ref = refs[0] if len(refs) > 2 else None
  weights_ref, dweights_ref = refs[-2:]
  if dbias_ref is not None:

    @pl.when(pl.program_id(1) == 0)
    def _():
      dbias_ref[...] = jnp.zeros_like(dbias_ref)

  dtype = q_ref.dtype
  # Those that are too many have no gradient, because their dy is zero.
  queries = up(q_ref.shape[1], LANES)
  step = _Step(q_ref, k_ref, bias_ref, mask_ref, head_dim, queries)
  chunks = _blocks(k_ref.shape[1], CHUNK)
  # Of each head that shares lanes, by chunk.
  dks, dvs, dqs = [{} for _ in chunks], [{} for _ in chunks], _Writer(dq_ref)

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
    log_sum = _beside(
      padded(log_sum_ref[0, x.head], queries)[:, x.queries] for x in unit.parts
    )
    logits = step.logits(unit, log_sum)
    v, dy = values(unit), step.alone(dy_ref, unit)
    mean = 0.0
    for chunk in chunks:
      weights, dweights = jnp.exp(logits(chunk)), dot(v[chunk], dy, (1, 0))
      mean += jnp.sum(weights * dweights, axis=0, keepdims=True)
      at = place, chunk, slice(weights.shape[1])
      weights_ref[at] = weights.astype(weights_ref.dtype)
      dweights_ref[at] = dweights.astype(dweights_ref.dtype)
      yield
    return mean

  def second(unit: _Unit, place: int, mean: jax.Array):
    kind = dweights_ref.dtype
    mean, sums = mean.astype(kind), [0.0 for _ in unit.parts]
    q, dy = (step.queries(x, unit.lanes) for x in (q_ref, dy_ref))
    k = step.turned(k_ref, unit.lanes)
    for chunk, dk, dv in zip(chunks, dks, dvs, strict=True):
      at = place, chunk, slice(mean.shape[1])
      all_weights = weights_ref[at]
      all_dlogits = all_weights.astype(kind) * (dweights_ref[at] - mean)
      for i, (head, own, block, columns) in enumerate(unit.parts):
        weights, dlogits = all_weights[:, columns], all_dlogits[:, columns]
        if dbias_ref is not None:
          dbias_ref[head, chunk, block] += dlogits
        dlogits = dlogits.astype(dtype)
        dv[head] = dv.get(head, 0.0) + dot(dy[own, block], weights, (1, 1))
        dk[head] = dk.get(head, 0.0) + dot(q[own, block], dlogits, (1, 1))
        sums[i] += dot(k[own, chunk], dlogits, (1, 0))  # [kv, q]
      if unit.last:
        if kept_ref is not None:
          for head in dv:
            dv[head] *= kept_ref[0, head, :, chunk]
        for ref, found in ((dk_ref, dk), (dv_ref, dv)):
          grads = jnp.concatenate([*found.values()], axis=0).astype(dtype)
          ref[0, chunk, unit.lanes] = grads.T
          found.clear()
      yield
    for dq, part in zip(sums, unit.parts, strict=True):
      dqs.add(unit, part, dq)

  _pipelined(_units(queries, q_ref.shape[2], head_dim), first, second)
