"""Rows that hold several examples, each as it would be alone (PACK).

A row is as long as PACK of the longest examples would be, with what the method
inserts in each: its prompt p q, say. More of the usual ones find room.

    alone    p q 7 8 1        p q 5 1
    packed   p q 7 8 1 p q 5 1 0 0      segments  1 1 1 1 1 2 2 2 2 0 0

No example sees another (segments), each has a prompt of its own (virtual
tokens, see `adapters.Packed`), and within an example distances are what they
were: loss and gradients are those of the examples alone, dropout aside, which
T5 draws once for a row.

Nothing is packed across the border of two epochs, or of two windows of a
stream, so each epoch holds every example once.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptune.data import batches as data
from ptune.data import padding
from ptune.data.seqio_task import FEATURES, Batch, Provider, shifted
from ptune.errors import UserError
from ptune.model import parameters
from ptune.model.adapters import VIRTUAL, Method, Packed
from ptune.model.models import EncoderDecoderModel

STACKS = {'inputs': 'encoder', 'targets': 'decoder'}


def _insertions(method: Method):
  """By feature: how many tokens the method adds to an example, and how."""
  insert = (method.packed or Packed((), {})).insert
  return {f: insert.get(STACKS[f], (0, np.asarray)) for f in FEATURES}


def room(
  method: Method, feature_lengths: Mapping[str, int], pack: int
) -> dict[str, int]:
  """The length of packed rows, which hold `pack` of the longest examples."""
  return {
    f: pack * (feature_lengths[f] + more)
    for f, (more, _) in _insertions(method).items()
  }


class PackedBatches(data.Batches):
  """As `data.Batches`, with rows of several examples: one shape for all steps.

  Step s holds the rows from s * batch_size on of all epochs laid end to end.
  How many rows an epoch takes depends on the order of its examples, so that
  the first call for a step packs the lengths of all epochs before it. Of a
  stream it reads all windows before it, from the last position that was kept.
  """

  def __init__(
    self,
    task: Provider,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    method: Method,
    pack: int = 1,
    **how: Any,
  ):
    """As `data.Batches`, which also says what else may be given.

    Args:
      task: A SeqIO task or mixture.
      feature_lengths: Longest inputs and targets of an example.
      batch_size: Rows, of several examples each.
      method: What is inserted in each example.
      pack: How many of the longest examples a row has room for.
    """
    super().__init__(
      task, feature_lengths, batch_size, bucket_multiple=None, **how
    )
    self._insert = _insertions(method)
    self._room = list(room(method, feature_lengths, pack).values())
    self._first_rows = [0]  # Of each chunk packed so far, and of the next.
    self._packed = functools.lru_cache(maxsize=2)(self._pack_chunk)

  @property
  def examples_per_step(self) -> float:
    """On average over the first epoch or window."""
    rows, packed = self._packed(0)
    del rows
    return self._batch_size * sum(map(len, packed)) / len(packed)

  @property
  def shapes(self) -> list[tuple[int, int]]:
    inputs, targets = self._room
    return [(inputs, targets)]

  def _facts(self, index: int) -> list[int]:
    """The packed rows before each window up to one, kept with a position."""
    return self._first_rows[: index + 1]

  def _pack_chunk(self, index: int):
    """Returns examples, and which of them each packed row holds."""
    examples, order = self._chunk(index)
    lengths = np.stack(
      [examples[f].lengths(order) + self._insert[f][0] for f in FEATURES], 1
    )
    packed = []
    # Of a window only: who is packed together should be a matter of chance.
    size = self._window * self._batch_size
    for start in range(0, len(order), size):
      rows = first_fit(lengths[start : start + size], self._room)
      packed += [order[start:][row] for row in rows]
    key = np.array([self._seed, index], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key).jumped())
    return examples, [packed[row] for row in rng.permutation(len(packed))]

  def __call__(self, step: int) -> Batch:
    """Returns the batch of a step >= 0.

    Returns:
      The features of seqio.EncDecFeatureConverter with packing, but for the
      positions, which T5 does not read: those of `data.Batches`, and
      encoder_segment_ids and decoder_segment_ids, 1, 2, ... for the examples
      of a row and 0 for padding.
    """
    last = (step + 1) * self._batch_size
    if len(self._first_rows) == 1 and self._positions is not None:
      for _, _, rows_before in self._positions.newest_first():
        if rows_before[-1] <= last - self._batch_size:
          self._first_rows = rows_before
          break
    first = self._first_rows
    while first[-1] < last:
      _, packed = self._packed(len(first) - 1)
      first.append(first[-1] + len(packed))
    rows = []
    for row in range(last - self._batch_size, last):
      chunk = int(np.searchsorted(first, row, 'right')) - 1
      examples, packed = self._packed(chunk)
      rows.append(self._row(examples, packed[row - first[chunk]]))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _row(self, examples, which: np.ndarray) -> dict[str, np.ndarray]:
    """One row of a batch: the examples `which`, one after the other."""
    parts: dict[str, list[np.ndarray]] = {}
    for segment, example in enumerate(which, 1):
      inputs, targets = (examples[f].row(example) for f in FEATURES)
      inputs = self._insert['inputs'][1](inputs)
      read = self._insert['targets'][1](shifted(targets, self._ids.start))
      real = read < VIRTUAL
      # Behind what is inserted nothing is asked for, but it is no padding.
      wanted = np.full_like(read, self._ids.eos)
      wanted[real] = targets
      for name, values in {
        'encoder_input_tokens': inputs,
        'encoder_segment_ids': np.full_like(inputs, segment),
        'decoder_target_tokens': wanted,
        'decoder_input_tokens': read,
        'decoder_loss_weights': (real & (wanted != self._ids.pad)).astype(
          np.int32
        ),
        'decoder_segment_ids': np.full_like(read, segment),
      }.items():
        parts.setdefault(name, []).append(values)
    inputs, targets = self._room
    row = {}
    for name, values in parts.items():
      length = inputs if name.startswith('encoder') else targets
      joined = np.concatenate(values)
      row[name] = padding.filled_up([joined], length, name, self._ids.pad)[0]
    return row


def first_fit(lengths: np.ndarray, room) -> list[np.ndarray]:
  """Puts examples into rows: the largest first, each where there is room.

  With rows of 8 and 4:
      before  (5, 1) (3, 2) (2, 2) (3, 3)
      after   [(3, 3), (5, 1)]  [(3, 2), (2, 2)]

  Args:
    lengths: [examples, 2] of inputs and targets, at most `room`.
    room: Of a row, the two lengths.

  Returns:
    For each row the indices of its examples.
  """
  size = np.max(lengths / np.asarray(room), axis=1)
  left = np.tile(np.asarray(room)[:, None], len(lengths))  # [2, rows]
  rows: list[list[int]] = []
  for i in np.argsort(-size, kind='stable'):
    inputs, targets = lengths[i]
    tried = left[:, : len(rows) + 1]
    row = int(np.argmax((tried[0] >= inputs) & (tried[1] >= targets)))
    if row == len(rows):
      rows.append([])
    left[:, row] -= lengths[i]
    rows[row].append(i)
  return [np.array(row) for row in rows]


def model_of(
  model: Callable[..., EncoderDecoderModel], plan: parameters.Plan
) -> EncoderDecoderModel:
  """The loss of packed rows.

  Args:
    model: Called with a network.
    plan: The parameters, with a method that reads packed rows.

  Raises:
    ValueError: If the method or the objective cannot read them.
  """
  packed = plan.method.packed or Packed(plan.method.placements, {})
  made = model(plan.network.clone(placements=packed.placements))
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  names = [f'encoder_{x}' for x in ('input_tokens', 'segment_ids')]
  names += [
    f'decoder_{x}'
    for x in ('input_tokens', 'target_tokens', 'loss_weights', 'segment_ids')
  ]
  params = parameters.unflatten(dict(plan.params))
  try:
    jax.eval_shape(made.loss, params, dict.fromkeys(names, tokens))
  except ValueError as error:
    raise UserError(
      f'PACK is set, and method {plan.method.name!r} or the loss cannot read'
      f' rows of several examples: {error}'
    ) from error
  return made
