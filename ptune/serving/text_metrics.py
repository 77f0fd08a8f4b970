"""The metrics of a user's own task, computed without SeqIO."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from ptune.data import seqio_task
from ptune.data.padding import filled_up
from ptune.errors import UserError
from ptune.model.sizes import TokenIds
from ptune.serving import predictions as predictions_lib
from ptune.tasks.metrics import UNLABELLED
from ptune.tasks.texts import TextTask
from ptune.training import report as report_lib

Scores = dict[str, dict[str, float]]
# Returns for a data set [(row, tokens)] in any order, and a dict of scores.
Predict = Callable[[Any], tuple[list[Any], dict[str, Any]]]
# Returns for a data set [(row, log probability)] in any order.
Score = Callable[[Any], list[tuple[int, float]]]


class Examples(NamedTuple):
  """The examples to evaluate.

  Attributes:
    split: The split.
    lengths: TASK_FEATURE_LENGTHS.
    count: Evaluate only this many; None for all.
    directory: Where to write predictions; None to write none.
    ids: The model's special tokens.
  """

  split: str
  lengths: dict[str, int]
  count: int | None
  directory: os.PathLike[str] | None
  ids: TokenIds = TokenIds()


class TextMetrics:
  """Computes the metrics of a `TextTask` by the rules of SeqIO's evaluator.

  Attributes:
    datasets: {name of the task: [(index, model features)]}.
  """

  def __init__(self, task: TextTask, examples: Examples):
    """Reads and tokenises the examples.

    Raises:
      UserError: If there are none.
    """
    self._task, self._examples = task, examples
    split, lengths, count, _, ids = examples
    self._texts = task.examples(split)[:count]
    if not self._texts:
      raise UserError(f'split {split!r} of task {task.name!r} is empty')
    rows, trimmed = [], dict.fromkeys(seqio_task.FEATURES, 0)
    for i, texts in enumerate(self._texts):
      features, cut = _features(task, lengths, texts, ids)
      rows.append((i, features))
      for name in cut:
        trimmed[name] += 1
    targets = [texts.get('gold', texts['targets']) for texts in self._texts]
    if task.labels and (unlabelled := targets.count(UNLABELLED)):
      logging.warning(
        '%s:%s: %d of %d rows have no label, and no metric counts them.',
        task.name,
        split,
        unlabelled,
        len(targets),
      )
    say_trimmed(f'{task.name}:{split}', len(rows), trimmed, lengths)
    self.datasets = {task.name: rows}
    self._targets = [
      self._postprocess(texts['targets'], texts, True) for texts in self._texts
    ]

  def _postprocess(self, text: str, example, is_target: bool) -> Any:
    function = self._task.postprocess_fn
    if function is None:
      return text
    return function(text, example=example, is_target=is_target)

  def __call__(
    self,
    step: int | str | None,
    predict: Predict,
    score: Score,
  ) -> Scores:
    """Computes the task's own metrics from given predictions.

    Args:
      step: The step in the names of the files; None to write none.
      predict: Returns the predictions for a data set.
      score: Returns the scores of a data set's targets.

    Returns:
      The numeric metrics, by task.
    """
    task, dataset = self._task, self.datasets[self._task.name]
    found: dict[str, Any] = {}
    answers: dict[str, Sequence[Any]] = {}
    for metric in task.metric_fns:
      wants = list(inspect.signature(metric).parameters)[1]
      if wants not in answers and wants == 'scores':
        answers['scores'] = [value for _, value in sorted(score(dataset))]
      elif wants not in answers:
        tokens = dict(predict(dataset)[0])
        answers['output'] = [
          task.vocabulary.decode(np.asarray(tokens[i]).tolist())
          for i in range(len(dataset))
        ]
        answers['predictions'] = [
          self._postprocess(text, example, False)
          for text, example in zip(answers['output'], self._texts, strict=True)
        ]
      values = metric(self._targets, answers[wants])
      twice = sorted(found.keys() & values.keys())
      if twice:
        raise UserError(
          f'Task {task.name!r}: two of METRICS give a score named {twice};'
          ' remove one of them'
        )
      found |= values
    if self._examples.directory is not None and step is not None:
      self._write(self._examples.directory, step, answers)
    return {task.name: report_lib.numbers(found)}

  def _write(self, directory, step, answers: Mapping[str, Sequence[Any]]):
    names = {'scores': 'score', 'predictions': 'prediction'}
    records = [
      {
        'index': i,
        'inputs': texts['inputs'],
        'targets': texts['targets'],
        'target': target,
        **{names.get(k, k): values[i] for k, values in answers.items()},
      }
      for i, (texts, target) in enumerate(
        zip(self._texts, self._targets, strict=True)
      )
    ]
    predictions_lib.write(directory, self._task.name, step, records)


def _features(task: TextTask, lengths, texts, ids: TokenIds):
  """Model features padded to the lengths, and the names of trimmed features."""
  of, cut = {}, []
  for name in seqio_task.FEATURES:
    tokens, room = task.vocabulary.encode(texts[name]), lengths[name] - 1
    cut += [name] if len(tokens) > room else []
    of[name] = np.array([*tokens[:room], task.vocabulary.eos_id], np.int32)
  features = seqio_task.model_features(of['inputs'], of['targets'], ids)
  padded = {}
  for name, values in features.items():
    side = 'inputs' if name.startswith('encoder') else 'targets'
    padded[name] = filled_up([values], lengths[side], name, ids.pad)[0]
  return padded, cut


def say_trimmed(
  name: str, rows: int, trimmed: Mapping[str, int], lengths: Mapping[str, int]
) -> None:
  """Warns about trimmed rows, if there are any."""
  if any(trimmed.values()):
    logging.warning(
      '%s: of %d rows, %s were trimmed to TASK_FEATURE_LENGTHS %s.',
      name,
      rows,
      dict(trimmed),
      dict(lengths),
    )
