"""A task of texts in memory, without SeqIO and TensorFlow: a user's own rows.

    rows = {'train': [('a good film', 'positive'), ...], 'validation': [...]}
    task = files.from_rows(rows, labels=['negative', 'positive'])
    Batches(task, {'inputs': 64, 'targets': 8}, 32)

A `TextTask` stands wherever a SeqIO task does: `MIXTURE_OR_TASK_NAME`, and
everything that takes a task. It has the names of `seqio.Task` for what both
have. Inputs and targets are encoded by one vocabulary and end with EOS, behind
what is left after trimming to TASK_FEATURE_LENGTHS.

The order of training is ptune's own, the same for rows from Python, flags or
`tasks/from_files.gin`: epoch e is numpy's permutation of the rows, drawn by
Philox with the key (seed, e), then bucketed; see `ptune.data.batches`.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
from ptune.convert.pieces import Vocabulary
from ptune.convert.vocabulary import open_vocabulary
from ptune.errors import UserError, nearest
from ptune.tasks import labels as labels_lib
from ptune.tasks import metrics as metrics_lib
from ptune.tasks import postprocessors
from ptune.tasks.metrics import UNLABELLED
from ptune.tasks.templates import Templates

VOCABULARY_VARIABLE = 'PTUNE_VOCABULARY'
T5_VOCABULARY = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'

# For a split: 'inputs' and 'targets', lists of equal length.
Texts = Mapping[str, Sequence[str]]


@gin.configurable
def chosen_vocabulary(
  path: str | None = None, extra_ids: int | None = None
) -> tuple[str, int | None]:
  """Which vocabulary tasks have that do not name one.

  Args:
    path: VOCABULARY: a SentencePiece file, local or on gs://, a model's
      directory with one in it, or a model by its name, such as `ptune://tiny`.
      If not given, what PTUNE_VOCABULARY names, and T5's if it names none.
    extra_ids: Sentinels to add; as many as are missing if not given.

  Returns:
    The path, and extra_ids.
  """
  return (
    path or os.environ.get(VOCABULARY_VARIABLE) or T5_VOCABULARY,
    extra_ids,
  )


def default_vocabulary() -> Vocabulary:
  """The vocabulary of `chosen_vocabulary`; a file is read when it is used."""
  return open_vocabulary(*chosen_vocabulary())


class TextTask:
  """A task whose splits are texts.

  Attributes:
    name: The name in logs, files and scores.
    splits: The names of the splits.
    vocabulary: Of inputs and targets.
    labels: All targets of a classification, None for other tasks. A row without
      a label has the target `UNLABELLED`.
    rank: Whether an evaluation scores every label of a row. If not, the model
      writes one.
    postprocess_fn: A decoded text to what metrics compare, as of a seqio.Task.
    metric_fns: Functions of (targets, predictions), or of (targets, scores).
    templates: What made the texts of rows, None if they were texts.
  """

  def __init__(
    self,
    name: str,
    read: Mapping[str, Callable[[], Texts]],
    *,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    rank: bool = False,
    vocabulary: Vocabulary | None = None,
    templates: Templates | None = None,
  ):
    """Puts a task together; nothing is read.

    Args:
      name: Of the task.
      read: For each split what reads its texts, called once when needed.
      labels: All targets of a classification.
      metrics: METRICS: names in `metrics.BY_NAME`, or 'macro_f1'; if not given,
        accuracy for a classification and exact_match for other tasks.
      rank: See above.
      vocabulary: The one that VOCABULARY names if not given.
      templates: See above.

    Raises:
      UserError: The arguments do not fit together.
    """
    if not isinstance(name, str) or not re.fullmatch(
      r'(?!\.+$)[\w.:#-]{1,200}', name
    ):
      raise UserError(
        f'TASK_NAME is {name!r:.220}; expected up to 200 letters, digits and'
        ' any of _.:#-, because files are named after it'
      )
    postprocess, functions = _scoring(metrics, labels)
    if rank and not labels:
      raise UserError('RANK is True, expected LABEL_NAMES to be scored')
    if metrics_lib.exact_match in functions:
      postprocess = self._as_written
    if labels:
      postprocess = labels_lib.LabelIds(tuple(labels), lambda: self.vocabulary)
      if rank:
        postprocess = functools.partial(postprocessors.ranked, then=postprocess)
        functions = [metrics_lib.ranked(functions, len(labels))]
      else:
        functions = [*functions, metrics_lib.invalid]
    self.name, self.splits = name, tuple(read)
    self.vocabulary = vocabulary or default_vocabulary()
    self.labels, self.rank = tuple(labels) if labels else None, rank
    self.postprocess_fn, self.metric_fns = postprocess, functions
    self.templates = templates
    self._read, self._texts = dict(read), {}

  def __str__(self) -> str:
    return self.name

  def texts(self, split: str) -> Texts:
    """All rows of a split, kept when they were read."""
    if split not in self._texts:
      self._texts[split] = self._read[split]()
    return self._texts[split]

  def training(self, split: str) -> tuple[list[str], list[str], int]:
    """What is trained on: inputs, targets, and how many rows have no label."""
    texts = self.texts(split)
    pairs = list(zip(texts['inputs'], texts['targets'], strict=True))
    kept = [p for p in pairs if self.labels is None or p[1] != UNLABELLED]
    return [i for i, _ in kept], [t for _, t in kept], len(pairs) - len(kept)

  def examples(self, split: str) -> list[dict[str, Any]]:
    """What is evaluated: 'inputs' and 'targets' as texts, in order.

    To rank, a row is there once for each label, with its number as `row` and
    its own target as `gold`. An evaluation's `loss` is over all of them.
    """
    texts = self.texts(split)
    rows = zip(texts['inputs'], texts['targets'], strict=True)
    if not self.rank:
      return [{'inputs': i, 'targets': t} for i, t in rows]
    return [
      {'inputs': inputs, 'targets': label, 'row': row, 'gold': target}
      for row, (inputs, target) in enumerate(rows)
      for label in self.labels or ()
    ]

  def _as_written(
    self, text: str, example=None, is_target: bool = False
  ) -> str:
    """A target as the vocabulary writes it, which is what a model can say."""
    del example
    if not is_target:
      return text
    return self.vocabulary.decode(self.vocabulary.encode(text))


def _scoring(
  metrics: Sequence[str] | None, labels: Sequence[str] | None
) -> tuple[Callable[..., Any] | None, list[metrics_lib.Metric]]:
  """The postprocessor and the functions of METRICS."""
  if metrics is None:
    metrics = ['accuracy' if labels else 'exact_match']
  if isinstance(metrics, str) or not all(isinstance(m, str) for m in metrics):
    raise UserError(
      f"METRICS is {metrics!r}, expected a list of names, such as ['accuracy']"
    )
  kinds = {
    name: kind for kind, some in metrics_lib.BY_NAME.items() for name in some
  }
  kinds['macro_f1'] = 'label'
  unknown = [name for name in metrics if name not in kinds]
  if unknown:
    raise UserError(
      f'METRICS has {unknown}, expected some of {sorted(kinds)}'
      + nearest(unknown[0], kinds, most=0)
    )
  twice = sorted({name for name in metrics if list(metrics).count(name) > 1})
  if twice:
    raise UserError(f'METRICS is {list(metrics)}; name {twice} only once')
  compared = {kinds[name] for name in metrics}
  if len(compared) > 1:
    raise UserError(
      f'METRICS is {list(metrics)}, expected what compares the same; these '
      f'compare {", ".join(f"{name}: {kinds[name]}" for name in metrics)}'
    )
  kind = compared.pop() if compared else 'text'
  if (kind == 'label') != (labels is not None and bool(metrics)):
    raise UserError(
      f'METRICS is {list(metrics)} and LABEL_NAMES {labels}: metrics of labels '
      'and LABEL_NAMES need each other'
    )
  functions = [
    metrics_lib.macro_f1(len(labels or ()))
    if name == 'macro_f1'
    else metrics_lib.BY_NAME[kind][name]
    for name in metrics
  ]
  postprocess = {
    'number': postprocessors.number,
    'answer': postprocessors.first_answer,
  }.get(kind)
  if kind == 'number':
    functions.append(metrics_lib.invalid)
  return postprocess, functions
