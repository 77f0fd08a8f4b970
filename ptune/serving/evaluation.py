"""Evaluation: the metrics of a task on a split, for any trained parameters."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from ptune.data import bucketing, device_feed, padding, seqio_task
from ptune.host.quiet import quiet_stderr
from ptune.model import parameters
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.serving import predictor
from ptune.serving.text_metrics import Examples, Scores, TextMetrics
from ptune.tasks.texts import TextTask
from ptune.training import selection, settings
from ptune.training.member import Stopped


class Evaluation:
  """Computes the metrics of a task or mixture on a split.

  The task defines its own metrics as functions of the model's predictions or
  scores. Every task also gets `loss` and `token_accuracy`: means over target
  tokens, under teacher forcing.

  Attributes:
    metrics: Computes the task's own metrics from given predictions; see
      `TextMetrics.__call__`.
    datasets: The examples of each part of the task; see
      `padding.eval_batches`.
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
    decoding: Decoding = Decoding(),
    num_examples: int | None = None,
    bucket_multiple: int | None = bucketing.BUCKET_MULTIPLE,
    use_cached: bool = False,
    seed: int = 0,
    directory: os.PathLike[str] | None = None,
  ):
    """Reads the examples.

    Args:
      task: The task. Each part of a mixture that has the split is evaluated by
        itself.
      plan: The parameters.
      model: The model.
      split: The split.
      feature_lengths: TASK_FEATURE_LENGTHS.
      batch_size: The rows computed at once. It does not change any result,
        except by rounding in bfloat16.
      decoding: How to decode predictions.
      num_examples: Evaluate only this many examples; None for all.
      bucket_multiple: See `padding.padded_batches`.
      use_cached: USE_CACHED_TASKS.
      seed: For sampling.
      directory: Predictions are written to `<task>/predictions-<step>.jsonl`
        below it; None to write none.

    Raises:
      ValueError: If the split is missing or empty.
    """
    self._plan, self._model = plan, model
    self.batch_size, self._multiple = batch_size, bucket_multiple
    self._seed, self.split = seed, split
    seqio_task.check(task, feature_lengths, split, use_cached)
    write = directory is not None and jax.process_index() == 0
    self._ids = plan.network.config.ids
    examples = Examples(
      split,
      dict(feature_lengths),
      num_examples,
      directory if write else None,
      self._ids,
    )
    if isinstance(task, TextTask):
      self.metrics = TextMetrics(task, examples)
    else:
      with quiet_stderr():
        from ptune.serving.seqio_metrics import SeqioMetrics
      self.metrics = SeqioMetrics(task, examples, use_cached, seed)
    self.datasets = self.metrics.datasets
    self._predictor = predictor.Predictor(
      plan, model, feature_lengths['targets'], decoding, seed
    )

  def __call__(
    self,
    trees: predictor.Trees,
    step: int,
    should_stop: Callable[[], bool] = lambda: False,
  ) -> Scores:
    """Computes all metrics.

    Args:
      trees: The parameters, in one or several trees.
      step: The step in the names of the files.
      should_stop: Called before each batch.

    Returns:
      The numeric metrics, by task.

    Raises:
      Stopped: If should_stop returned True.
    """
    scores = self.metrics(
      step,
      functools.partial(self._predict, trees, should_stop),
      functools.partial(self._score, trees, should_stop),
    )
    losses = self.losses(trees, should_stop)
    return {name: scores[name] | losses[name] for name in losses}

  def check_best(self, best_metric: str | None) -> None:
    """Checks BEST_METRIC before training.

    To learn the names of the metrics, we compute them as if every prediction
    were the target.

    Raises:
      UserError: If no metric has this name; lists all names.
    """
    always = {'loss': 0.0, 'token_accuracy': 0.0}
    if best_metric is None or best_metric.removeprefix('-') in always:
      return
    try:
      scores = self.metrics(
        None, self._targets, lambda data: [(i, 0.0) for i in self._rows(data)]
      )
    except Exception as error:  # A metric that cannot score such predictions.
      logging.info('BEST_METRIC is not known before an evaluation: %s', error)
      return
    selection.score(
      best_metric, {name: scores[name] | always for name in scores}
    )

  def _targets(self, dataset):
    """What `_predict` would return if the model predicted the targets."""
    tokens = []
    for rows, batch in self._host_batches(dataset):
      answered = batch['decoder_target_tokens']
      tokens.extend(zip(rows.tolist(), answered, strict=False))
    return tokens, {'scores': [0.0] * len(tokens)}

  def _rows(self, dataset) -> list[int]:
    return [i for rows, _ in self._host_batches(dataset) for i in rows.tolist()]

  def _host_batches(self, dataset):
    return padding.eval_batches(
      dataset, self.batch_size, self._multiple, self._ids.pad
    )

  def losses(
    self,
    trees: predictor.Trees,
    should_stop: Callable[[], bool] = lambda: False,
  ) -> Scores:
    """Computes `loss` and `token_accuracy`, means over target tokens."""
    scores: Scores = {}
    for name, dataset in self.datasets.items():
      sums: dict[str, float] = {}
      for _, found in predictor.fetched(
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
    """Yields the numbers of a batch's rows, and the batch, `copies` times over.

    Raises:
      Stopped: If should_stop returned True.
    """
    for rows, batch in self._host_batches(dataset):
      if should_stop():
        raise Stopped
      batch = {k: np.tile(x, (copies, 1)) for k, x in batch.items()}
      check = self._plan.method.check
      yield rows, device_feed.device_put(batch, self._plan.mesh, check)

  def _predict(self, trees, should_stop, dataset):
    """Returns [(row, tokens)] in any order, and their scores."""
    tokens, scores = [], []
    for rows, (ids, values) in predictor.fetched(
      (
        rows,
        self._predictor.predict(
          trees, batch, padding.repeat_last(rows, self.batch_size)
        ),
      )
      for rows, batch in self.batches(dataset, should_stop)
    ):
      tokens.extend(zip(rows.tolist(), ids, strict=False))
      scores.extend(values[: len(rows)].tolist())
    return tokens, {'scores': scores}

  def _score(self, trees, should_stop, dataset):
    """Returns [(row, log probability)] in any order."""
    scores = []
    for rows, values in predictor.fetched(
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
  """Makes the `Evaluation` that the settings describe.

  Raises:
    UserError: If BEST_METRIC is not a metric of the task; also see
      `Evaluation`.
  """
  batch_size = evaluation.batch_size or data.batch_size
  evaluate = Evaluation(
    task,
    plan,
    model,
    split=evaluation.split or '',
    feature_lengths=data.feature_lengths,
    batch_size=batch_size,
    decoding=evaluation.decoding,
    num_examples=evaluation.steps and evaluation.steps * batch_size,
    bucket_multiple=data.bucket_multiple,
    use_cached=data.use_cached,
    seed=seed,
    directory=directory,
  )
  evaluate.check_best(evaluation.best_metric)
  return evaluate
