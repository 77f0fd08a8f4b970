"""Converts decoded outputs to the values that metrics compare.

SeqIO calls each function with the decoded text, the example (strings are bytes,
lists are arrays) and whether the text is the target's. A value that is not
legal becomes -1.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INVALID = -1

Example = Mapping[str, Any]


def _text(value: bytes | str) -> str:
  return value.decode('utf-8') if isinstance(value, bytes) else value


def label_id(
  text: str,
  labels: Sequence[str],
  other_words: Mapping[str, str] | None = None,
  example: Example | None = None,
  is_target: bool = False,
) -> int:
  """Returns the number of a label; -1 for every other text, such as '<unk>'.

  Args:
    text: The decoded text.
    labels: The labels.
    other_words: Other texts that mean a label. A prompt trained on one data set
      answers with that data set's labels on another (Lester et al., 2021,
      section 5.2): {'duplicate': 'equivalent'}.
    example: Not used.
    is_target: Not used.
  """
  del example, is_target
  text = (other_words or {}).get(text, text)
  return labels.index(text) if text in labels else INVALID


def number(
  text: str, example: Example | None = None, is_target: bool = False
) -> float:
  """Returns a finite number in ordinary notation; -1.0 for every other text.

  T5's code also accepts 'nan', 'inf' and '1_0'; a single one would spoil a
  correlation.
  """
  del example, is_target
  try:
    value = float(text)
  except ValueError:
    return float(INVALID)
  return value if math.isfinite(value) and '_' not in text else float(INVALID)


def multirc(
  text: str,
  example: Example,
  is_target: bool = False,
  then: Callable[..., int] | None = None,
):
  """MultiRC: {'value': label}, and for a target also its question."""
  then = then or functools.partial(label_id, labels=('False', 'True'))
  value = {'value': then(text, example=example, is_target=is_target)}
  if is_target:
    value['group'] = int(example['idx/question'])
  return value


def record(text: str, example: Example, is_target: bool = False):
  """ReCoRD: {'value': text}; for a target, all answers and its query."""
  if not is_target:
    return {'value': text}
  return {
    'value': answers(text, example, is_target=True),
    'group': (int(example['idx/passage']), int(example['idx/query'])),
  }


def answers(text: str, example: Example, is_target: bool = False):
  """Questions: the text; for a target, the list of all right answers."""
  if not is_target:
    return text
  return [_text(answer) for answer in example['answers']]


def first_answer(
  text: str, example: Example | None = None, is_target: bool = False
):
  """Questions whose only right answer is the target."""
  del example
  return [text] if is_target else text


_DETERMINERS = frozenset(
  'a an the this that these those some each every few many much '
  'my your his her our their which whose'.split()
)


def wsc(text: str, example: Example, is_target: bool = False) -> int:
  """WSC: whether the text names the candidate; the target is the row's label.

  It does if, without case and determiners, the words of one are among the words
  of the other ('piano', 'the old piano'), and both or neither have an
  apostrophe (not 'Bob' for "Bob's hat"). An answer that has no other word is -1
  (Raffel et al., 2020, appendix B).
  """
  if is_target:
    return int(example['label'])

  def words(phrase):
    return set(phrase.lower().split()) - _DETERMINERS

  candidate = _text(example['targets_pretokenized'])
  said, meant = words(text), words(candidate)
  if not said:
    return INVALID
  if not meant or ("'" in text) != ("'" in candidate):
    return 0
  return int(said <= meant or meant <= said)


def without_sentinel(
  text: str,
  then: Callable[..., Any] | None = None,
  example: Example | None = None,
  is_target: bool = False,
):
  """Removes '<extra_id_0>' and blanks from the start, then postprocesses."""
  text = text.lstrip().removeprefix('<extra_id_0>').lstrip()
  return then(text, example=example, is_target=is_target) if then else text


def ranked(
  text: str,
  then: Callable[..., Any],
  example: Example,
  is_target: bool = False,
):
  """Returns the scored label's value, its row, and the row's target.

  It is called only for targets, because the model's output is a score. See
  `registry.rank_labels`.
  """
  assert is_target
  return {
    'row': int(example['row']),
    'candidate': then(text, example=example, is_target=False),
    'target': then(_text(example['gold']), example=example, is_target=True),
  }
