"""The rows of a task to batches: a function of the step, on devices.

The batch at step s depends on the task, the seed, s, the batch size and the
fixed settings of `Batches`, and on nothing else. Every process can make the
whole batch and keeps the rows of its own devices, so neither hosts nor devices
nor restarts can change it. Rows are token ids, of one of two kinds:

    in memory  A finite task, tokenised once. Epoch e visits every row once,
               in an order drawn from (seed, e): NumPy's permutation, by the
               generator Philox with the key [seed, e].
    stream     A SeqIO mixture, or a SeqIO task too large for memory or without
               an end. SeqIO shuffles, repeats and mixes. To start at step s,
               the rows before it are read and skipped, from the last position
               that was kept on disk (`positions`).

Rows of a user's own (`texts.TextTask`) are always in memory, and have the same
order whether they come from Python, flags or a gin file. A classification is
trained on the rows that have a label.
"""

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from ptune.data import seqio_task
from ptune.data.bucketing import BUCKET_MULTIPLE, bucket, round_up
from ptune.data.positions import Positions
from ptune.data.ragged import Ragged, join, without_start
from ptune.data.seqio_task import FEATURES, Batch, Provider, shifted
from ptune.errors import UserError
from ptune.model.sizes import TokenIds

PathLike = str | os.PathLike[str]

_TRIMMED = '_trimmed'  # suffix of the marks that count trimming


class Batches:
  """The training batches of a task: `batches(step)` is a pure function.

  In memory, step s holds the positions from s * batch_size on of all epochs
  laid end to end; no batch is short. An epoch is a permutation of the rows.
  With bucketing it is rearranged so that a batch holds rows of like length,
  padded to the longest rounded up; only the batch across the border of two
  epochs holds any rows. Rows of a classification are sorted by their inputs
  alone, so that a batch holds labels of all lengths.

  Attributes:
    num_examples: Rows in memory, or None for a stream.
    shapes: The (input length, target length) that a batch may have.
    trimmed: For each feature, the rows that were longer than its length: of
      all rows in memory, or of those read of a stream so far. Counted is what
      SeqIO itself cuts at the end of a task.
  """

  def __init__(
    self,
    task: Provider,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    split: str = 'train',
    seed: int = 0,
    bucket_multiple: int | None = BUCKET_MULTIPLE,
    window: int = 64,
    use_cached: bool = False,
    in_memory: bool | None = None,
    ids: TokenIds = TokenIds(),
    embedding_rows: int | None = None,
    positions: PathLike | None = None,
  ):
    """Checks a task and tokenises it, or opens its stream.

    Args:
      task: A user's task, or a SeqIO task or mixture.
      feature_lengths: TASK_FEATURE_LENGTHS, to which features are trimmed.
      batch_size: Rows in the global batch.
      split: The split to read.
      seed: Of the order of the rows and of random preprocessors.
      bucket_multiple: Lengths of batches are multiples of this, or for short
        targets its half, its quarter and so on, 4 at least; None or 0 pads
        all to `feature_lengths`.
      window: Batches among which rows are sorted by length.
      use_cached: USE_CACHED_TASKS.
      in_memory: Whether to tokenise a SeqIO task once. None: if it has at most
        `seqio_rows.MAX_ROWS` rows. Pass False if preprocessors are random and
        should draw anew in each epoch, as for span corruption.
      ids: The model's special tokens: what rows are padded with, and where
        targets start.
      embedding_rows: Rows of the model's embedding; token ids beyond it are an
        error.
      positions: A local directory where the positions of a stream are kept, so
        that resuming does not read all rows before it again; see `positions`.

    Raises:
      ValueError: The task does not suit T5 or these arguments, or is empty.
    """
    seqio_task.check(task, feature_lengths, split, use_cached)
    for name, value, least in (
      ('BATCH_SIZE', batch_size, 1),
      ('RANDOM_SEED', seed, 0),
      ('window', window, 1),
      ('bucket_multiple', bucket_multiple or 0, 0),
    ):
      if value < least:
        raise UserError(f'{name} is {value}, expected at least {least}.')
    self._name = f'{task.name}:{split}'
    self._lengths = {name: feature_lengths[name] for name in FEATURES}
    self._batch_size, self._seed, self._ids = batch_size, seed, ids
    self._multiple, self._window = bucket_multiple, window
    # The length of a label tells which one it is: batches of like lengths would
    # hold one label each, and training would swing between the labels.
    self._labelled = bool(getattr(task, 'labels', None))
    self._source = seqio_task.rows_of(
      task, feature_lengths, split, use_cached, seed
    )
    self.trimmed = dict.fromkeys(FEATURES, 0)
    self._embedding_rows, self._looked_at = embedding_rows, False
    self._eos_id = seqio_task.eos_id(task)
    self._rows = self._tokenise(self._source.limit(in_memory))
    self.num_examples = self._rows and len(self._rows['inputs'].lengths())
    # Rows are ordered in chunks: an epoch in memory, a window of a stream.
    self._chunk_size = self.num_examples or batch_size * window
    self._chunk = functools.lru_cache(maxsize=2)(self._make_chunk)
    self._next_chunk = None  # the one that an open stream comes to next
    self._positions = None
    if positions is not None and not self._rows:
      key = [self._name, self._lengths, seed, batch_size, window, use_cached]
      versions = self._source.versions()
      self._positions = Positions(positions, {'of': key, **versions})
    self._writes = jax.process_index() == 0

  def _tokenise(self, limit: float) -> dict[str, Ragged] | None:
    """Reads a task of at most `limit` rows into memory, None if it is larger.

    At least one row is read, so that what is wrong with a task shows here.
    """
    blocks, count = [], 0
    for block in self._source.read(rows=1024 if limit else 1):
      count += len(block['inputs'])
      if count > limit:
        logging.info('%s: streamed, it is not kept in memory.', self._name)
        return None
      blocks.append(block)
    if not count:
      raise UserError(
        f'{self._name} has no examples after its preprocessors, expected at '
        'least one. Check its source and what its preprocessors filter out.'
      )
    logging.info('%s: %d rows in memory.', self._name, count)
    return self._collect(blocks)

  def _collect(self, blocks: Sequence[dict[str, np.ndarray]]):
    """Joins blocks to rows, and counts those that were trimmed."""
    self._check(blocks)
    first = not any(self.trimmed.values())
    for name in FEATURES:
      self.trimmed[name] += sum(int(b[name + _TRIMMED].sum()) for b in blocks)
    rows = {name: join(blocks, name) for name in FEATURES}
    if self._ids.has_own_start:
      rows['targets'] = without_start(rows['targets'], self._ids.start)
    if first and any(self.trimmed.values()):
      logging.warning(
        '%s: of the first %d rows, %s were trimmed to TASK_FEATURE_LENGTHS %s.',
        self._name,
        len(rows['inputs'].lengths()),
        self.trimmed,
        self._lengths,
      )
    return rows

  def _check(self, blocks: Sequence[dict[str, np.ndarray]]) -> None:
    """Refuses or warns of rows that a model cannot learn from."""
    if self._embedding_rows is not None:
      for name in FEATURES:
        most = max(int(block[name].max(initial=0)) for block in blocks)
        if most >= self._embedding_rows:
          raise UserError(
            f'{self._name} has {name} with token id {most}, expected ids below'
            f" the {self._embedding_rows} rows of the model's embedding. The"
            " task's vocabulary is not the model's; give the task that of the"
            ' model'
          )
    if self._looked_at:  # Warned once, of the first rows.
      return
    self._looked_at = True
    lengths = np.concatenate([block['targets_length'] for block in blocks])
    empty = int((lengths == 0).sum())
    if empty == len(lengths):
      raise UserError(
        f'{self._name}: no row has tokens in its targets, so there is nothing'
        ' to learn. Look at what its preprocessors make of targets'
      )
    if empty:
      logging.warning(
        '%s: of the first %d rows, %d have no tokens in their targets, and'
        ' teach nothing.',
        self._name,
        len(lengths),
        empty,
      )
    ends = sum(
      int(np.sum(np.any(block['targets'] == self._eos_id, axis=1)))
      for block in blocks
    )
    cut = sum(int(block['targets' + _TRIMMED].sum()) for block in blocks)
    if self._eos_id is not None and not ends and cut < len(lengths):
      logging.warning(
        '%s: none of the first %d targets ends with the end of sequence (id'
        ' %d), so the model will not learn to end its answers. Is'
        ' seqio.preprocessors.append_eos_after_trim missing?',
        self._name,
        len(lengths),
        self._eos_id,
      )

  def _next_window(self, index: int) -> dict[str, Ragged]:
    """Reads a window of the stream, which is searched if it is not the next."""
    if index != self._next_chunk:
      self._stream = self._open_stream(index)
    self._next_chunk = None  # in case reading fails
    if self._positions is not None and self._writes:
      self._positions.keep(index, self._stream.save, self._facts(index))
    blocks = list(itertools.islice(self._stream, self._window))
    count = sum(len(b['inputs']) for b in blocks)
    if count < self._chunk_size:
      ended = index * self._chunk_size + count
      raise UserError(
        f'The stream of {self._name} ended after {ended} rows, expected no end.'
        ' A task of the mixture may have an empty split.'
      )
    self._next_chunk = index + 1
    return self._collect(blocks)

  def _facts(self, index: int) -> Any:
    """What is kept with the position of a window."""
    del index

  def _open_stream(self, index: int) -> Any:
    """Opens the stream at a window: at a kept position, then by skipping."""
    stream, at = self._source.stream(self._batch_size), 0
    kept = self._positions.newest_first() if self._positions else ()
    for window, state, _ in kept:
      if window > index:
        continue
      try:
        stream.restore(state)
      except Exception as error:  # Of a version that cannot read it.
        logging.info('a position is not used: %.300s', error)
        stream = self._source.stream(self._batch_size)
        continue
      at = window
      break
    skip = (index - at) * self._window
    if index:
      logging.info(
        '%s: skipping %d rows to resume, of which %d are read again.',
        self._name,
        index * self._chunk_size,
        skip * self._batch_size,
      )
    for _ in itertools.islice(stream, skip):
      pass
    return stream

  def _make_chunk(self, index: int) -> tuple[dict[str, Ragged], np.ndarray]:
    """Returns rows, and the order [chunk_size] in which they come."""
    key = np.array([self._seed, index], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    if self._rows:
      rows, order = self._rows, rng.permutation(self._chunk_size)
    else:
      rows, order = self._next_window(index), np.arange(self._chunk_size)
    if self._multiple:
      lengths = [self._rounded(f, rows[f].lengths(order)) for f in FEATURES]
      if self._labelled:
        lengths[1] = np.zeros_like(lengths[1])
      head = -index * self._chunk_size % self._batch_size
      bucketed = bucket(lengths, head, self._batch_size, self._window, rng)
      order = order[bucketed]
    return rows, order

  def _rounded(self, name: str, lengths: np.ndarray) -> np.ndarray:
    # The decoder computes what is added to a label of three tokens too, and
    # the output layer, as wide as the vocabulary.
    finely = name == 'targets'
    return round_up(lengths, self._multiple, self._lengths[name], finely)

  @property
  def examples_per_step(self) -> float:
    """How many examples a batch holds, as far as is known without reading."""
    return self._batch_size

  @property
  def shapes(self) -> list[tuple[int, int]]:
    sizes = []
    for name in FEATURES:
      every = np.arange(1, self._lengths[name] + 1)
      lengths = self._rows[name].lengths() if self._rows else every
      sizes.append(np.unique(self._rounded(name, lengths)))
    return list(itertools.product(*(size.tolist() for size in sizes)))

  def __call__(self, step: int) -> Batch:
    """Returns the batch of a step >= 0.

    Returns:
      The features of seqio.EncDecFeatureConverter without packing, int32:
      encoder_input_tokens [batch, input length], and decoder_target_tokens,
      decoder_input_tokens, decoder_loss_weights [batch, target length].

    Raises:
      ValueError: A stream ended.
    """
    positions = step * self._batch_size + np.arange(self._batch_size)
    chunks, offsets = np.divmod(positions, self._chunk_size)
    which = []
    for chunk in np.unique(chunks).tolist():
      rows, order = self._chunk(chunk)
      which.append(order[offsets[chunks == chunk]])
    which = np.concatenate(which)
    inputs, targets = (
      rows[f].padded(
        which,
        self._rounded(f, rows[f].lengths(which)).max(),
        self._ids.pad,
      )
      for f in FEATURES
    )
    return {
      'encoder_input_tokens': inputs,
      'decoder_target_tokens': targets,
      'decoder_input_tokens': shifted(targets, self._ids.start),
      'decoder_loss_weights': (targets != self._ids.pad).astype(np.int32),
    }
