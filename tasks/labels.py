"""Labels as the vocabulary writes them.

A model answers in token ids. A label with a character that the vocabulary
lacks, with two blanks or with a line end in it is decoded to another text than
it was: '<=50K' becomes ' ⁇ =50K'. So an answer is compared with what the
vocabulary makes of each label.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from absl import logging

from ptune.errors import UserError
from ptune.tasks import postprocessors


class Vocabulary(Protocol):
  """What is needed of a vocabulary, SeqIO's or `ptune.convert.pieces`'."""

  def encode(self, text: str) -> Sequence[int]: ...
  def decode(self, ids: Sequence[int]) -> str: ...


def written(labels: Sequence[str], vocabulary: Vocabulary) -> dict[str, str]:
  """What the vocabulary writes for each label, to the label.

  Args:
    labels: All labels of a classification.
    vocabulary: That of the task's targets.

  Returns:
    {'⁇ =50K': '<=50K', 'other': 'other'}; those that differ are logged.

  Raises:
    UserError: Some labels have no tokens, or become the same text.
  """
  by_text: dict[str, list[str]] = {}
  empty = []
  for label in labels:
    ids = list(vocabulary.encode(label))
    empty += [] if ids else [label]
    by_text.setdefault(vocabulary.decode(ids), []).append(label)
  same = [some for some in by_text.values() if len(some) > 1]
  # A label that another one becomes would count as that one.
  same += [
    [label, text]
    for text, (label, *_) in by_text.items()
    if text != label and text in labels
  ]
  if same or empty:
    raise UserError(
      f'LABEL_NAMES are {list(labels)}, and the vocabulary {vocabulary} cannot'
      f' tell apart or cannot write {[*same, *empty]}; choose other names'
    )
  changed = {some[0]: t for t, some in by_text.items() if some[0] != t}
  if changed:
    logging.warning(
      'the vocabulary %s writes some labels in another way, and answers are'
      ' compared with that: %s',
      vocabulary,
      changed,
    )
  return {text: label for text, (label,) in by_text.items()}


def cut(
  labels: Sequence[str], vocabulary: Vocabulary, length: int
) -> str | None:
  """Says which labels do not fit into targets with their EOS, if any.

  Args:
    labels: The labels.
    vocabulary: That of the task's targets.
    length: TASK_FEATURE_LENGTHS['targets'].
  """
  sizes = {label: len(vocabulary.encode(label)) + 1 for label in labels}
  longer = [label for label, size in sizes.items() if size > length]
  if not longer:
    return None
  return (
    f'the labels {longer} do not fit TASK_FEATURE_LENGTHS, whose targets are'
    f' {length}; they need {max(sizes.values())} tokens with the end of'
    ' sequence'
  )


@dataclasses.dataclass(frozen=True)
class LabelIds:
  """A postprocessor: the number of a label, -1 for every other text.

  Attributes:
    labels: The labels.
    vocabulary: Makes the vocabulary of the targets, when an answer comes.
    other_words: See `postprocessors.label_id`.
  """

  labels: tuple[str, ...]
  vocabulary: Callable[[], Vocabulary] = dataclasses.field(repr=False)
  other_words: Mapping[str, str] | None = None

  @functools.cached_property
  def written(self) -> dict[str, str]:
    """See `written`; read when it is first needed."""
    return written(self.labels, self.vocabulary())

  def __call__(self, text: str, example: Any = None, is_target: bool = False):
    """See `postprocessors`."""
    if not is_target:  # The target is a label as it was given.
      text = self.written.get(text, text)
    return postprocessors.label_id(text, self.labels, self.other_words)


def of(postprocessor: Any) -> LabelIds | None:
  """The labels that a task's postprocessor compares with, if it does."""
  while isinstance(postprocessor, functools.partial):
    postprocessor = postprocessor.keywords.get('then')
  return postprocessor if isinstance(postprocessor, LabelIds) else None
