"""Labels as the vocabulary writes them.

A model answers in token ids. If a label has a character that the vocabulary
lacks, two blanks or a line end, encoding and decoding it gives another text:
'<=50K' becomes ' ⁇ =50K'. So we compare an answer with the decoded form of each
label.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from absl import logging

from ptune.errors import UserError
from ptune.tasks import postprocessors


class Vocabulary(Protocol):
  """The needed methods of a vocabulary, SeqIO's or `ptune.convert.pieces`'."""

  def encode(self, text: str) -> Sequence[int]: ...
  def decode(self, ids: Sequence[int]) -> str: ...


def written(labels: Sequence[str], vocabulary: Vocabulary) -> dict[str, str]:
  """Returns the decoded form of each label, mapped to the label.

  Args:
    labels: All labels of a classification.
    vocabulary: The vocabulary of the task's targets.

  Returns:
    {'⁇ =50K': '<=50K', 'other': 'other'}; forms that differ are logged.

  Raises:
    UserError: Some labels have no tokens, or have the same decoded form.
  """
  by_text: dict[str, list[str]] = {}
  empty = []
  for label in labels:
    ids = list(vocabulary.encode(label))
    empty += [] if ids else [label]
    by_text.setdefault(vocabulary.decode(ids), []).append(label)
  same = [some for some in by_text.values() if len(some) > 1]
  # If the decoded form of a label is another label, it would count as that one.
  same += [
    [label, text]
    for text, (label, *_) in by_text.items()
    if text != label and text in labels
  ]
  if same or empty:
    raise UserError(
      f'LABEL_NAMES are {list(labels)}, but the vocabulary {vocabulary} cannot'
      f' distinguish or cannot write {[*same, *empty]}; choose other names'
    )
  changed = {some[0]: t for t, some in by_text.items() if some[0] != t}
  if changed:
    logging.warning(
      'the vocabulary %s writes some labels differently, and answers are'
      ' compared with these forms: %s',
      vocabulary,
      changed,
    )
  return {text: label for text, (label,) in by_text.items()}


def cut(
  labels: Sequence[str], vocabulary: Vocabulary, length: int
) -> str | None:
  """Returns a message if some labels with EOS do not fit, or None.

  Args:
    labels: The labels.
    vocabulary: The vocabulary of the task's targets.
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
    vocabulary: Returns the vocabulary of the targets, when it is first needed.
    other_words: See `postprocessors.label_id`.
  """

  labels: tuple[str, ...]
  vocabulary: Callable[[], Vocabulary] = dataclasses.field(repr=False)
  other_words: Mapping[str, str] | None = None

  @functools.cached_property
  def written(self) -> dict[str, str]:
    """See the function `written`; computed on first use."""
    return written(self.labels, self.vocabulary())

  def __call__(self, text: str, example: Any = None, is_target: bool = False):
    """See `postprocessors`."""
    if not is_target:  # A target is already in its original form.
      text = self.written.get(text, text)
    return postprocessors.label_id(text, self.labels, self.other_words)


def of(postprocessor: Any) -> LabelIds | None:
  """Returns the labels that a task's postprocessor compares with, or None."""
  while isinstance(postprocessor, functools.partial):
    postprocessor = postprocessor.keywords.get('then')
  return postprocessor if isinstance(postprocessor, LabelIds) else None
