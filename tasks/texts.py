"""A task of texts in memory, without SeqIO and TensorFlow: a user's own rows.

    rows = {'train': [('a good film', 'positive'), ...], 'validation': [...]}
    task = files.from_rows(rows, labels=['negative', 'positive'])
    Batches(task, {'inputs': 64, 'targets': 8}, 32)

You can use a `TextTask` wherever you can use a SeqIO task: in
`MIXTURE_OR_TASK_NAME`, and as any argument that is a task. Its attributes have
the same names as those of `seqio.Task`. One vocabulary encodes inputs and
targets. Both are trimmed to TASK_FEATURE_LENGTHS and then end with EOS.

ptune defines the training order, which is the same for rows from Python, flags
or `tasks/from_files.gin`. Epoch e is numpy's permutation of the rows, drawn by
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

# One split: 'inputs' and 'targets', lists of equal length.
Texts = Mapping[str, Sequence[str]]


@gin.configurable
def chosen_vocabulary(
  path: str | None = None, extra_ids: int | None = None
) -> tuple[str, int | None]:
  """Returns the vocabulary of tasks that do not name one.

  Args:
    path: VOCABULARY: a SentencePiece file, local or on gs://, a model's
      directory that contains one, or a model's name, such as `ptune://tiny`.
      The default is the environment variable PTUNE_VOCABULARY, then T5's
      vocabulary.
    extra_ids: Sentinels to add; the default is as many as are missing.

  Returns:
    The path, and extra_ids.
  """
  return (
    path or os.environ.get(VOCABULARY_VARIABLE) or T5_VOCABULARY,
    extra_ids,
  )


def default_vocabulary() -> Vocabulary:
  """Returns `chosen_vocabulary`; its file is read on first use."""
  return open_vocabulary(*chosen_vocabulary())


class TextTask:
  """A task whose splits are texts.

  Attributes:
    name: The name in logs, files and scores.
    splits: The names of the splits.
    vocabulary: The vocabulary of inputs and targets.
    labels: All targets of a classification, None for other tasks. A row without
      a label has the target `UNLABELLED`.
    rank: Whether an evaluation scores every label of a row. If False, the model
      generates one.
    postprocess_fn: Converts a decoded text for the metrics, as in seqio.Task.
    metrics: The names in METRICS.
    metric_fns: Functions of (targets, predictions), or of (targets, scores).
    templates: The templates that made the texts; None if rows were texts.
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
    """Builds a task without reading anything.

    Args:
      name: The task's name.
      read: For each split a function that reads its texts, called at most once.
      labels: All targets of a classification.
      metrics: METRICS: names in `metrics.BY_NAME`, or 'macro_f1'. The default
        is accuracy for a classification and exact_match for other tasks.
      rank: See above.
      vocabulary: The default is VOCABULARY.
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
    if metrics is None:
      metrics = ['accuracy' if labels else 'exact_match']
    postprocess, functions = _scoring(metrics, labels)
    if rank and not labels:
      raise UserError('RANK is True, but there are no LABEL_NAMES to score')
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
    self.metrics = tuple(metrics)
    self.templates = templates
    self._read, self._texts = dict(read), {}

  def __str__(self) -> str:
    return self.name

  def texts(self, split: str) -> Texts:
    """Returns all rows of a split; they are read once."""
    if split not in self._texts:
      self._texts[split] = self._read[split]()
    return self._texts[split]

  def training(self, split: str) -> tuple[list[str], list[str], int]:
    """Returns training inputs, targets, and how many rows have no label."""
    texts = self.texts(split)
    pairs = list(zip(texts['inputs'], texts['targets'], strict=True))
    kept = [p for p in pairs if self.labels is None or p[1] != UNLABELLED]
    return [i for i, _ in kept], [t for _, t in kept], len(pairs) - len(kept)

  def examples(self, split: str) -> list[dict[str, Any]]:
    """Returns the evaluation rows: 'inputs' and 'targets' as texts, in order.

    If the task ranks, each row appears once for each label, with its number as
    `row` and its own target as `gold`. An evaluation's `loss` is then over
    all of these.
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
    """Returns a target as the vocabulary, and so a model, can write it."""
    del example
    if not is_target:
      return text
    return self.vocabulary.decode(self.vocabulary.encode(text))


def _scoring(
  metrics: Sequence[str], labels: Sequence[str] | None
) -> tuple[Callable[..., Any] | None, list[metrics_lib.Metric]]:
  """Returns the postprocessor and the functions of METRICS."""
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
      f'METRICS is {list(metrics)}, expected metrics of one kind; these are '
      f'of {", ".join(f"{name}: {kinds[name]}" for name in metrics)}'
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
