"""Rows of text with a known attribute, for pre-training.

Without labels, a corpus still shows the source of a text, and whether the text
asks, counts, denies or uses the first person. Two of its files also show
whether a text praises or complains, because they put all texts of one kind
after those of the other (FIRST_PRAISE). This label holds for a whole document,
but many sentences of a review only tell the plot. So a sentence counts as
praise or complaint only if naive Bayes, trained on other documents of the
corpus, agrees.

This module imports neither SeqIO nor TensorFlow.
"""

import collections
import functools
import glob
import logging
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import corpus_text
import naive_bayes

from ptune.tasks import prefixes

# The first line of praise; all lines before it are complaints. The film reviews
# are 2,000 documents, and this line is the first of the second thousand. The
# file of products has first all cons and then all pros.
FIRST_PRAISE = {
  'movie_reviews': 'films adapted from comic books have had plenty of success',
  'pros_cons': "digital is where it 's at",
}
SOURCES = {
  'movie_reviews': 'films',
  'pros_cons': 'products',
  'abc': 'news',
  'webtext': 'forums',
  'state_union': 'speeches',
  'inaugural': 'speeches',
  'wikitext_valid': 'encyclopedia',
  'wikitext_test': 'encyclopedia',
}
SIGNS = {
  'question': re.compile(r'\?'),
  'number': re.compile(r'\d'),
  'denial': re.compile(r"\b(n't|not|no|never|nothing|none)\b"),
  'speaker': re.compile(r'\b(i|my|me|we|our)\b'),
}
VALUES = {
  'polarity': ('complaint', 'praise'),
  'source': tuple(dict.fromkeys(SOURCES.values())),
  **dict.fromkeys(SIGNS, ('no', 'yes')),
}
WEIGHTS = {'polarity': 6, 'source': 2}
# One line in this many is held out, as in `pretraining.text_files`.
HELD_OUT = 100
# Folds are blocks of lines, and few documents cross a block's border.
BLOCK, FOLDS, MARGIN = 100, 5, 1.0
GRAM = 8


class Text(NamedTuple):
  """A text of the corpus.

  Attributes:
    text: Its words.
    source: One of the values of SOURCES.
    polarity: One of VALUES['polarity'], or None if it is not known.
    held_out: Whether it is for validation.
  """

  text: str
  source: str
  polarity: str | None
  held_out: bool

  def value(self, attribute: str) -> str | None:
    """Returns the text's value of an attribute."""
    if attribute in SIGNS:
      return 'yes' if SIGNS[attribute].search(self.text) else 'no'
    return getattr(self, attribute)


# ------------------------------------------------------------------ leak guard


class Withheld:
  """Texts that no row may contain a part of.

  Args:
    texts: The texts of downstream tasks, in all splits.
  """

  def __init__(self, texts: Iterable[str]):
    self._grams = {gram for text in texts for gram in _grams(text)}

  def __contains__(self, text: str) -> bool:
    """Whether a text shares eight words in a row, or is equal if shorter."""
    return any(gram in self._grams for gram in _grams(text))


def _grams(text: str) -> Iterator[tuple[str, ...]]:
  words = corpus_text.normalised(text).split()
  words = [word for word in words if any(map(str.isalnum, word))]
  for i in range(max(len(words) - GRAM, 0) + 1):
    yield tuple(words[i : i + GRAM])


def read_withheld(pattern: str) -> Withheld:
  """Reads TSV files with a header, in which the last column is a label.

  Raises:
    ValueError: No file matches the glob.
  """
  files = sorted(glob.glob(pattern))
  if not files:
    raise ValueError(
      f'WITHHELD is {pattern!r}, which no file matches: expected the TSV files'
      ' of all downstream tasks, so that pre-training reads none of their rows.'
    )
  lines = [
    line for f in files for line in pathlib.Path(f).read_text().split('\n')[1:]
  ]
  return Withheld(text for line in lines for text in line.split('\t')[:-1])


# ----------------------------------------------------------------------- texts


@functools.cache
def texts(corpus: str, withheld: str) -> tuple[Text, ...]:
  """Returns all texts of a corpus with a known source.

  Args:
    corpus: A glob of files that `corpus_text` wrote.
    withheld: A glob, see `read_withheld`.

  Raises:
    ValueError: Files are missing or have other names.
  """
  files = corpus_text.read(corpus)
  if missing := set(SOURCES) - set(files):
    raise ValueError(
      f'CORPUS is {corpus!r}, but {sorted(missing)} are missing; expected a'
      ' glob of text files with these names.'
    )
  guard = read_withheld(withheld)
  found: dict[str, Text] = {}
  dropped = collections.Counter()
  for name in SOURCES:
    for text in _texts(name, files[name]):
      if text.text in guard:
        dropped[text.source] += 1
      # If one copy of a text is held out, no copy is trained on.
      elif text.text not in found or text.held_out:
        found[text.text] = text
  logging.info('%d texts; withheld: %s', len(found), dict(dropped))
  return tuple(found.values())


def _texts(name: str, lines: Sequence[str]) -> Iterator[Text]:
  judged = judge(name, lines) if name in FIRST_PRAISE else None
  for i, line in enumerate(lines):
    for text in corpus_text.chunks(line):
      polarity = judged(i, text) if judged else None
      yield Text(text, SOURCES[name], polarity, (i + 1) % HELD_OUT == 0)


def judge(name: str, lines: Sequence[str]):
  """Returns a function (line number, text of the line) -> polarity or None.

  Raises:
    ValueError: The line where praise begins was not found.
  """
  starts = [
    i for i, line in enumerate(lines) if line.startswith(FIRST_PRAISE[name])
  ]
  if len(starts) != 1:
    raise ValueError(
      f'{len(starts)} lines of {name} begin with {FIRST_PRAISE[name]!r},'
      ' expected 1, where the complaints end and the praise begins. Is this'
      ' another release of the corpus?'
    )
  [border] = starts
  fold = lambda i: i // BLOCK % FOLDS
  weights = [
    naive_bayes.fit(
      (line, i >= border) for i, line in enumerate(lines) if fold(i) != number
    )
    for number in range(FOLDS)
  ]

  def polarity(i: int, text: str) -> str | None:
    odds = naive_bayes.log_odds(weights[fold(i)], text)
    if abs(odds) < MARGIN or (odds > 0) != (i >= border):
      return None
    return VALUES['polarity'][i >= border]

  return polarity


# ------------------------------------------------------------------------ rows


def prefix_rows(
  seed: str,
  count: int,
  tasks: Sequence[prefixes.PrefixTask],
  known: Iterable[Text],
) -> list[tuple[int, str, str]]:
  """Draws (number of the task, text, label).

  All tasks are equally likely, as are the values of a task, and the sources
  of texts with a value.

  Raises:
    ValueError: No text has a value that a task asks for.
  """
  rng = random.Random(f'corpus rows {seed}')
  pools = {a: {v: {} for v in values} for a, values in VALUES.items()}
  for text in known:
    for attribute, values in pools.items():
      if (value := text.value(attribute)) is not None:
        values[value].setdefault(text.source, []).append(text.text)
  rows = []
  for _ in range(count):
    number = rng.randrange(len(tasks))
    task = tasks[number]
    value = rng.choice(list(task.labels))
    pool = pools[task.attribute][value]
    if not pool:
      raise ValueError(
        f'no text has {task.attribute} {value}: use a larger CORPUS'
      )
    text = rng.choice(pool[rng.choice(list(pool))])
    rows.append((number, text, task.labels[value]))
  return rows
