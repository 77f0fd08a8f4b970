"""The metrics of a task on a split, for any trained parameters."""

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow_datasets as tfds
from etils import epath

from ptune.data import batches as data
from ptune.data import seqio_task
from ptune.errors import UserError
from ptune.model import parameters
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.serving import answers
from ptune.tasks import metrics as task_metrics
from ptune.training import report as report_lib
from ptune.training import settings

Scores = dict[str, dict[str, float]]


class Stopped(Exception):
  """An evaluation was given up because the program is asked to end."""


class Evaluation:
  """The metrics of a task or mixture on a split, as often as asked.

  SeqIO's evaluator makes them of the model's predictions and scores, as the
  task defines; beside them stand `loss` and `token_accuracy`, per target
  token under teacher forcing, which every task has.
  """

  def __init__(
    self,
    task: seqio_task.Provider,
    plan: parameters.Plan,
    model: EncoderDecoderModel,
    *,
    split: str,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    how: Decoding = Decoding(),
    num_examples: int | None = None,
    bucket_multiple: int | None = data.BUCKET_MULTIPLE,
    use_cached: bool = False,
    seed: int = 0,
    directory: os.PathLike[str] | None = None,
  ):
    """Reads the examples.

    Args:
      task: Its parts that have the split are evaluated, each by itself.
      plan: The parameters.
      model: The model.
      split: The split.
      feature_lengths: TASK_FEATURE_LENGTHS.
      batch_size: Rows that are computed at once; no result depends on it, but
        for rounding in bfloat16.
      how: How predictions are decoded.
      num_examples: Only the first so many; all if not given.
      bucket_multiple: See `data.padded_batches`.
      use_cached: USE_CACHED_TASKS.
      seed: For sampling.
      directory: Predictions are written to `<task>/predictions-<step>.jsonl`
        below it; nowhere if not given.

    Raises:
      ValueError: If the split is missing or empty.
    """
    self._plan, self._model = plan, model
    self.batch_size, self._multiple = batch_size, bucket_multiple
    self._seed, self.split = seed, split
    seqio_task.check(task, feature_lengths, split, use_cached)
    lengths = dict(feature_lengths)
    converter = seqio.EncDecFeatureConverter(pack=False)
    write = directory is not None and jax.process_index() == 0
    self._evaluator = seqio.Evaluator(
      task.name,
      converter,
      split,
      use_cached=use_cached,
      seed=seed,
      sequence_length=lengths,
      num_examples=num_examples,
      logger_cls=[PredictionLogger] if write else [],
      log_dir=os.fspath(directory) if directory is not None else None,
      async_compute_metrics=False,
    )
    # By task: what the evaluator passes on, and the same for tasks without
    # metrics, which it leaves out.
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
        dataset = converter(dataset.take(num_examples or -1), lengths)
        dataset = dataset.enumerate().cache()
      else:
        continue
      if not any(True for _ in dataset.take(1)):
        raise UserError(f'split {split!r} of task {part.name!r} is empty')
      self.datasets[part.name] = dataset
    self._predictor = answers.Predictor(
      plan, model, feature_lengths['targets'], how, seed
    )

  def __call__(
    self,
    trees: answers.Trees,
    step: int,
    should_stop: Callable[[], bool] = lambda: False,
  ) -> Scores:
    """Computes all metrics.

    Args:
      trees: The parameters, in one or several trees.
      step: Named in the files.
      should_stop: Asked before each batch.

    Returns:
      The numeric metrics, by task.

    Raises:
      Stopped: If should_stop said so.
    """
    scores = self.metrics(
      step,
      functools.partial(self._predict, trees, should_stop),
      functools.partial(self._score, trees, should_stop),
    )
    losses = self.losses(trees, should_stop)
    return {name: scores[name] | losses[name] for name in losses}

  def metrics(
    self,
    step: int | str,
    predict: Callable[[Any], tuple[list[Any], dict[str, Any]]],
    score: Callable[[Any], list[tuple[int, float]]],
  ) -> Scores:
    """The task's own metrics of what is answered, whoever does.

    Args:
      step: Named in the files.
      predict: Of a data set: [(row, tokens)] in any order, and their scores.
      score: Of a data set: [(row, log probability)], in any order.
    """
    futures, _ = self._evaluator.evaluate(
      compute_metrics=True,
      step=step,  # pyrefly: ignore[bad-argument-type]  (only written)
      predict_fn=lambda data, *_: predict(data)[0],
      predict_with_aux_fn=lambda data, *_: predict(data),
      score_fn=lambda data, *_: score(data),
    )
    metrics = futures.result() or {}
    return {
      name: report_lib.numbers(metrics.get(name, {})) for name in self.datasets
    }

  def losses(
    self,
    trees: answers.Trees,
    should_stop: Callable[[], bool] = lambda: False,
  ) -> Scores:
    """`loss` and `token_accuracy`, per target token."""
    scores: Scores = {}
    for name, dataset in self.datasets.items():
      sums: dict[str, float] = {}
      for _, found in answers.fetched(
        (rows, self._predictor.sums(trees, batch))
        for rows, batch in self.batches(dataset, should_stop)
      ):
        for key, value in found.items():
          sums[key] = sums.get(key, 0.0) + float(value)
      tokens = max(sums['tokens'], 1.0)
      scores[name] = {
        'loss': sums['loss'] / tokens,
        'token_accuracy': sums['correct'] / tokens,
      }
    return scores

  def batches(
    self,
    dataset: Any,
    should_stop: Callable[[], bool] = lambda: False,
    copies: int = 1,
  ) -> Iterator[tuple[np.ndarray, dict[str, jax.Array]]]:
    """Yields which rows a batch holds, and the batch, all of it `copies` times.

    Raises:
      Stopped: If should_stop said so.
    """
    for rows, batch in data.eval_batches(
      dataset, self.batch_size, self._multiple
    ):
      if should_stop():
        raise Stopped
      batch = {k: np.tile(x, (copies, 1)) for k, x in batch.items()}
      check = self._plan.method.check
      yield rows, data.device_put(batch, self._plan.mesh, check)

  def _predict(self, trees, should_stop, dataset):
    """What SeqIO asks for: [(row, tokens)] in any order, and their scores."""
    tokens, scores = [], []
    filled = lambda rows: np.pad(rows, (0, self.batch_size - len(rows)), 'edge')
    for rows, (ids, values) in answers.fetched(
      (rows, self._predictor.predict(trees, batch, filled(rows)))
      for rows, batch in self.batches(dataset, should_stop)
    ):
      tokens.extend(zip(rows.tolist(), ids, strict=False))
      scores.extend(values[: len(rows)].tolist())
    return tokens, {'scores': scores}

  def _score(self, trees, should_stop, dataset):
    """What SeqIO asks for: [(row, log probability)], in any order."""
    scores = []
    for rows, values in answers.fetched(
      (rows, self._predictor.score(trees, batch))
      for rows, batch in self.batches(dataset, should_stop)
    ):
      scores.extend(zip(rows.tolist(), values.tolist(), strict=False))
    return scores


def evaluation_of(
  task: seqio_task.Provider,
  plan: parameters.Plan,
  model: EncoderDecoderModel,
  data: settings.Data,
  evaluation: settings.Evaluation,
  seed: int = 0,
  directory: os.PathLike[str] | None = None,
) -> Evaluation:
  """The `Evaluation` of a task as the settings say; see there."""
  batch_size = evaluation.batch_size or data.batch_size
  return Evaluation(
    task,
    plan,
    model,
    split=evaluation.split or '',
    feature_lengths=data.feature_lengths,
    batch_size=batch_size,
    how=evaluation.decoding,
    num_examples=evaluation.steps and evaluation.steps * batch_size,
    bucket_multiple=data.bucket_multiple,
    use_cached=data.use_cached,
    seed=seed,
    directory=directory,
  )


class PredictionLogger(seqio.loggers.Logger):
  """Writes each example with what the model made of it, as JSON lines."""

  def __call__(self, task_name, step, metrics, dataset, inferences, targets):
    """Called by SeqIO's evaluator for each task."""
    del metrics
    directory = epath.Path(self.output_dir) / task_name
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
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
      # Of labels and texts; other things have no plain right or wrong.
      if isinstance(record.get('prediction'), str | int | float):
        record['right'] = task_metrics.is_right(
          record.get('target'), record['prediction']
        )
      lines.append(to_json(record))
    report_lib.write_atomically(
      directory / f'predictions-{step}.jsonl', '\n'.join([*lines, ''])
    )


def to_json(record: Mapping[str, Any]) -> str:
  """One line of JSON from what tasks hold: bytes, NumPy values, anything."""

  def plain(value):
    if isinstance(value, np.ndarray | np.generic):
      value = value.tolist()
    if isinstance(value, bytes):
      return value.decode('utf-8', errors='replace')
    if isinstance(value, Mapping):
      return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
      return [plain(v) for v in value]
    simple = value is None or isinstance(value, str | int | float)
    return value if simple else str(value)

  return json.dumps(plain(record), ensure_ascii=False)
