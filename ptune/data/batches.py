"""Training batches: the batch of a step is a function of the step.

The batch at step s depends only on the task, the seed, s, the batch size and
the settings of `Batches`. Every process can make the whole batch, and keeps the
rows of its own devices. So hosts, devices and restarts cannot change a batch.
Rows are token ids, of one of two kinds:

    in memory  A finite task, tokenised once. Epoch e visits every row once. The
               order is NumPy's permutation, from the generator Philox with the
               key [seed, e].
    stream     A SeqIO mixture, or a SeqIO task that is endless or too large for
               memory. SeqIO shuffles, repeats and mixes. To start at step s, we
               go to the last position that is saved on disk (`positions`), then
               read and skip the rows up to s.

A user's own rows (`texts.TextTask`) are always in memory. Their order is the
same whether they come from Python, flags or a gin file. For a classification,
training uses only rows with a label.
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

_TRIMMED = '_trimmed'  # suffix of the features that mark trimming


class Batches:
  """The training batches of a task: `batches(step)` is a pure function.

  In memory, all epochs are laid end to end, and step s takes batch_size rows
  from position s * batch_size on. No batch is short. An epoch is a permutation
  of the rows. Bucketing rearranges it so that a batch holds rows of similar
  length, padded to the longest one rounded up. Only a batch that spans two
  epochs holds rows of any length. For a classification, rows are sorted by
  their inputs only, so that a batch holds labels of all lengths.

  Attributes:
    num_examples: The number of rows in memory; None for a stream.
    shapes: The possible shapes of a batch: (input length, target length).
    trimmed: For each feature, the number of rows that were longer than its
      length, out of the rows in memory or the rows read from a stream so far.
      It counts only what SeqIO itself cuts at the end of a task.
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
    """Checks the task, and tokenises it or opens its stream.

    Args:
      task: A user's task, or a SeqIO task or mixture.
      feature_lengths: TASK_FEATURE_LENGTHS; features are trimmed to it.
      batch_size: The rows in the global batch.
      split: The split to read.
      seed: For the order of the rows and for random preprocessors.
      bucket_multiple: The lengths of a batch are multiples of this. Short
        targets are rounded to its half, its quarter and so on, at least 4. None
        or 0 pads all rows to `feature_lengths`.
      window: The number of batches whose rows are sorted by length together.
      use_cached: USE_CACHED_TASKS.
      in_memory: Whether to tokenise a SeqIO task once and keep its rows. None
        does so if it has at most `seqio_rows.MAX_ROWS` rows. Pass False if
        preprocessors are random and must draw again in each epoch, as in span
        corruption.
      ids: The model's special tokens, which pad rows and start targets.
      embedding_rows: The rows of the model's embedding; larger token ids are an
        error.
      positions: A local directory where positions in a stream are saved, so
        that resuming does not read the stream from its start; see `positions`.

    Raises:
      ValueError: If the task does not fit T5 or the arguments, or is empty.
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
    # Labels often differ in length. If we sorted by it, a batch would hold one
    # label only, and training would swing between the labels.
    self._labelled = bool(getattr(task, 'labels', None))
    self._source = seqio_task.rows_of(
      task, feature_lengths, split, use_cached, seed
    )
    self.trimmed = dict.fromkeys(FEATURES, 0)
    self._embedding_rows, self._checked = embedding_rows, False
    self._eos_id = seqio_task.eos_id(task)
    self._rows = self._tokenise(self._source.limit(in_memory))
    self.num_examples = self._rows and len(self._rows['inputs'].lengths())
    # We order rows chunk by chunk: an epoch in memory, a window of a stream.
    self._chunk_size = self.num_examples or batch_size * window
    self._chunk = functools.lru_cache(maxsize=2)(self._make_chunk)
    self._next_chunk = None  # the next chunk of the open stream
    self._positions = None
    if positions is not None and not self._rows:
      key = [self._name, self._lengths, seed, batch_size, window, use_cached]
      versions = self._source.versions()
      self._positions = Positions(positions, {'of': key, **versions})
    self._writes = jax.process_index() == 0

  def _tokenise(self, limit: float) -> dict[str, Ragged] | None:
    """Reads a task of at most `limit` rows into memory; None if it is larger.

    We read at least one row, so that a broken task fails here.
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
    """Joins blocks into rows, and counts the trimmed ones."""
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
    """Refuses rows that the model cannot learn from, or warns about them."""
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
    if self._checked:  # The checks below look at the first rows only.
      return
    self._checked = True
    lengths = np.concatenate([block['targets_length'] for block in blocks])
    empty = int((lengths == 0).sum())
    if empty == len(lengths):
      raise UserError(
        f'{self._name}: no row has tokens in its targets, so there is nothing'
        ' to learn. Check what its preprocessors do to targets'
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
    """Reads a window of the stream; searches for it if it is not the next."""
    if index != self._next_chunk:
      self._stream = self._open_stream(index)
    self._next_chunk = None  # in case reading fails
    if self._positions is not None and self._writes:
      self._positions.save(index, self._stream.save, self._facts(index))
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
    """What to save with the position of a window."""
    del index

  def _open_stream(self, index: int) -> Any:
    """Opens the stream at a window: goes to a saved position, then skips."""
    stream, at = self._source.stream(self._batch_size), 0
    saved = self._positions.newest_first() if self._positions else ()
    for window, state, _ in saved:
      if window > index:
        continue
      try:
        stream.restore(state)
      except Exception as error:  # For example, from another version.
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
    """Returns rows, and their order [chunk_size]."""
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
    # Short targets get finer steps, because for each position the decoder also
    # computes the output layer, which is as wide as the vocabulary.
    finely = name == 'targets'
    return round_up(lengths, self._multiple, self._lengths[name], finely)

  @property
  def examples_per_step(self) -> float:
    """The number of examples in a batch."""
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
    return self._batch(rows, np.concatenate(which))

  def _batch(self, rows: Mapping[str, Ragged], which: np.ndarray) -> Batch:
    """Some of the rows, padded to the longest of them."""
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
