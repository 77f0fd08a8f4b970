"""Naive Bayes over words: classifies a sentence by its words alone."""

import collections
import math
from collections.abc import Iterable, Mapping


def fit(rows: Iterable[tuple[str, bool]]) -> dict[str, float]:
  """Returns the log-odds of each word; '' has the prior.

  Args:
    rows: Texts, and whether they are of the second class; both occur.
  """
  counts = collections.Counter(), collections.Counter()
  texts = [0, 0]
  for text, second in rows:
    counts[second].update(set(text.split()))
    texts[second] += 1
  words = set().union(*counts)
  totals = [sum(count.values()) + len(words) for count in counts]
  odds = {
    word: math.log((counts[1][word] + 1) / totals[1])
    - math.log((counts[0][word] + 1) / totals[0])
    for word in words
  }
  return {**odds, '': math.log(texts[1] / texts[0])}


def log_odds(weights: Mapping[str, float], text: str) -> float:
  """Returns a text's log-odds by `fit`: above 0 for the second class."""
  return weights[''] + sum(weights.get(word, 0.0) for word in set(text.split()))
