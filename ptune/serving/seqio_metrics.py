"""The metrics of a SeqIO task, computed by SeqIO's evaluator."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow_datasets as tfds

from ptune.data import seqio_rows
from ptune.errors import UserError
from ptune.serving import predictions as predictions_lib
from ptune.serving.text_metrics import (
  Examples,
  Predict,
  Score,
  Scores,
  say_trimmed,
)
from ptune.training import report as report_lib


class SeqioMetrics:
  """Computes the metrics of a SeqIO task or mixture on a split.

  Attributes:
    datasets: The enumerated model features of each task that has the split.
  """

  def __init__(
    self,
    task: seqio_rows.Provider,
    examples: Examples,
    use_cached: bool,
    seed: int,
  ):
    """Reads the examples.

    Raises:
      UserError: If the split is missing or empty.
    """
    split, lengths, count, directory, ids = examples
    converter = seqio_rows.FeatureConverter(ids)
    self._evaluator = seqio.Evaluator(
      task.name,
      converter,
      split,
      use_cached=use_cached,
      seed=seed,
      sequence_length=lengths,
      num_examples=count,
      logger_cls=[PredictionLogger] if directory is not None else [],
      log_dir=os.fspath(directory) if directory is not None else None,
      async_compute_metrics=False,
    )
    # The evaluator leaves out tasks without metrics: make their data sets here.
    measured = {t.name for t in self._evaluator.eval_tasks}
    self.datasets = {}
    for part in seqio.get_subtasks(task):
      if part.name in measured:
        dataset = self._evaluator.cached_model_datasets[part.name]
      elif split in part.splits:
        dataset = part.get_dataset(
          lengths,
          split,
          shuffle=False,
          num_epochs=1,
          use_cached=use_cached,
          seed=seed,
        )
        dataset = converter(dataset.take(count or -1), lengths)
        dataset = dataset.enumerate().cache()
      else:
        continue
      rows, full = _count(dataset, ids.pad)
      if not rows:
        raise UserError(f'split {split!r} of task {part.name!r} is empty')
      if full:  # Some rows may have been trimmed: read them again and count.
        source = seqio_rows.SeqioRows(part, lengths, split, use_cached, seed)
        trimmed = source.trimmed(count)
        say_trimmed(f'{part.name}:{split}', rows, trimmed, lengths)
      self.datasets[part.name] = dataset

  def __call__(
    self,
    step: int | str | None,
    predict: Predict,
    score: Score,
  ) -> Scores:
    """See `TextMetrics.__call__`."""
    try:
      futures, _ = self._evaluator.evaluate(
        compute_metrics=True,
        step=step,  # pyrefly: ignore[bad-argument-type]  (only written)
        predict_fn=lambda data, *_: predict(data)[0],
        predict_with_aux_fn=lambda data, *_: predict(data),
        score_fn=lambda data, *_: score(data),
      )
    except ValueError as error:
      if isinstance(error.__cause__, UserError):
        raise error.__cause__ from error
      if 'Duplicate metric key' in str(error):
        raise UserError(
          f'{error} Two of its metric_fns give a score of the same name; rename'
          ' one of them'
        ) from error
      raise
    metrics = futures.result() or {}
    return {
      name: report_lib.numbers(metrics.get(name, {})) for name in self.datasets
    }


def _count(dataset: Any, pad: int) -> tuple[int, bool]:
  """Counts the rows of a data set, and whether any row fills its length."""
  names = ('encoder_input_tokens', 'decoder_target_tokens')
  rows, full = 0, False
  for _, example in dataset.as_numpy_iterator():
    rows += 1
    full = full or any(
      len(example[name]) and example[name][-1] != pad for name in names
    )
  return rows, full


class PredictionLogger(seqio.loggers.Logger):
  """Writes each example and the model's results for it as JSON lines."""

  def __call__(self, task_name, step, metrics, dataset, inferences, targets):
    """Called by SeqIO's evaluator for each task."""
    del metrics
    if step is None:
      return
    records = []
    for i, example in enumerate(tfds.as_numpy(dataset)):
      record: dict[str, Any] = {'index': i}
      for key in ('inputs_pretokenized', 'targets_pretokenized'):
        if key in example:
          record[key.removesuffix('_pretokenized')] = example[key]
      if targets is not None:
        record['target'] = targets[i]
      for kind, values in (inferences or {}).items():
        if isinstance(values, Sequence | np.ndarray):
          record[kind] = values[i]
      records.append(record)
    predictions_lib.write(self.output_dir, task_name, step, records)
