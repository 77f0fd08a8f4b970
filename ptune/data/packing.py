"""Packing: a row holds several examples, each trained as if alone (PACK).

A row has room for PACK of the longest examples, including what the method
inserts into each, such as its prompt p q. It usually holds more than that,
because most examples are shorter.

    alone    p q 7 8 1        p q 5 1
    packed   p q 7 8 1 p q 5 1 0 0      segments  1 1 1 1 1 2 2 2 2 0 0

Segments keep examples from seeing each other. Each example has its own prompt
(virtual tokens, see `adapters.Packed`), and distances within an example do not
change. So the loss and the gradients equal those of separate rows, except for
dropout, which T5 draws once for a row.

A row never mixes two epochs, or two windows of a stream, so each epoch holds
every example once.
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
  """For each feature: the tokens that the method inserts, and the function."""
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
  """`data.Batches` with packed rows; all steps have one shape.

  All epochs are laid end to end, and step s takes batch_size rows from row
  s * batch_size on. The number of rows in an epoch depends on the order of its
  examples. So the first call for a step packs the lengths of all epochs before
  it. For a stream, it reads all windows from the last saved position on.
  """

  def __init__(
    self,
    task: Provider,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    method: Method,
    pack: int = 1,
    **settings: Any,
  ):
    """Reads the task; see `data.Batches`.

    Args:
      task: The task.
      feature_lengths: The most tokens of an example's inputs and targets.
      batch_size: The number of packed rows.
      method: The method, which inserts tokens into each example.
      pack: The number of the longest examples that a row has room for.
      **settings: Other arguments of `data.Batches`.
    """
    super().__init__(
      task, feature_lengths, batch_size, bucket_multiple=None, **settings
    )
    self._insert = _insertions(method)
    self._room = list(room(method, feature_lengths, pack).values())
    # The first row of each chunk packed so far, and of the next chunk.
    self._first_rows = [0]
    self._packed = functools.lru_cache(maxsize=2)(self._pack_chunk)

  @property
  def examples_per_step(self) -> float:
    """The mean number of examples in a batch of the first epoch or window."""
    rows, packed = self._packed(0)
    del rows
    return self._batch_size * sum(map(len, packed)) / len(packed)

  @property
  def shapes(self) -> list[tuple[int, int]]:
    inputs, targets = self._room
    return [(inputs, targets)]

  def _facts(self, index: int) -> list[int]:
    """The number of packed rows before each window up to this one."""
    return self._first_rows[: index + 1]

  def _pack_chunk(self, index: int):
    """Returns examples, and the numbers of the examples in each packed row."""
    examples, order = self._chunk(index)
    lengths = np.stack(
      [examples[f].lengths(order) + self._insert[f][0] for f in FEATURES], 1
    )
    packed = []
    # We pack window by window, so that examples meet in a row by chance.
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
      The features of seqio.EncDecFeatureConverter with packing, without
      positions, which T5 does not read. These are the features of
      `data.Batches` and encoder_segment_ids and decoder_segment_ids: 1, 2, ...
      for the examples of a row, and 0 for padding.
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
    """Makes one row of a batch from the examples `which`."""
    parts: dict[str, list[np.ndarray]] = {}
    for segment, example in enumerate(which, 1):
      inputs, targets = (examples[f].row(example) for f in FEATURES)
      inputs = self._insert['inputs'][1](inputs)
      read = self._insert['targets'][1](shifted(targets, self._ids.start))
      real = read < VIRTUAL
      # Inserted positions have no target, but they are not padding either.
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
  """Assigns examples to rows: largest first, each to the first row with room.

  With rows of 8 and 4:
      before  (5, 1) (3, 2) (2, 2) (3, 3)
      after   [(3, 3), (5, 1)]  [(3, 2), (2, 2)]

  Args:
    lengths: [examples, 2] the lengths of inputs and targets, at most `room`.
    room: The two lengths of a row.

  Returns:
    The numbers of the examples in each row.
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
  """Makes the loss for packed rows.

  Args:
    model: Makes the loss of a network.
    plan: The parameters.

  Raises:
    ValueError: If the method or the objective cannot use packed rows.
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
