"""Metrics: functions (targets, predictions) -> {name: score}.

Scores go from 0 to 100. Rows without a label do not count, so a split without
labels has no scores. A prediction that is not a legal label is wrong, whatever
the target, and `invalid` counts these.

The metrics equal those of the reference implementation (t5 0.9.4); docstrings
name the exceptions.
"""

import collections
import importlib
import re
import string
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ptune.errors import UserError

Scores = dict[str, float]
Metric = Callable[..., Scores]

UNLABELLED = '<unk>'  # The target of a row without a label.
_UNLABELLED = (-1, UNLABELLED, [])


def _library(module: str) -> Any:
  """Imports a metric's library when the metric is first used.

  Raises:
    ValueError: It is not installed.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise UserError(
      f'a metric needs {module.split(".")[0]}: pip install "ptune[metrics]"'
    ) from error


def _value(of: Any) -> Any:
  return of.get('value', of) if isinstance(of, Mapping) else of


def _labelled(targets: Sequence[Any], predictions: Sequence[Any]):
  """Returns pairs of both, without those that have no label."""
  pairs = zip(targets, predictions, strict=True)
  return [pair for pair in pairs if _value(pair[0]) not in _UNLABELLED]


def _percent(values: Sequence[float]) -> float:
  return 100.0 * float(np.mean(values))


def _wrong_if_invalid(pairs) -> tuple[list[int], list[int]]:
  """Returns only 0 and 1: an invalid prediction becomes the wrong label."""
  targets = [_value(target) for target, _ in pairs]
  predictions = [
    _value(p) if _value(p) in (0, 1) else 1 - target
    for target, (_, p) in zip(targets, pairs, strict=True)
  ]
  return targets, predictions


def accuracy(targets, predictions) -> Scores:
  """The share that is equal. T5 takes an unlabelled target as the label -1."""
  pairs = _labelled(targets, predictions)
  if not pairs:
    return {}
  return {'accuracy': _percent([target == p for target, p in pairs])}


def invalid(targets, predictions) -> Scores:
  """The share of predictions that are not a legal label. Lower is better."""
  del targets
  if not predictions:
    return {}
  return {'invalid': _percent([_value(p) == -1 for p in predictions])}


def f1(targets, predictions) -> Scores:
  """F1 of label 1."""
  pairs = _labelled(targets, predictions)
  if not pairs:
    return {}
  score = _library('sklearn.metrics').f1_score(
    *_wrong_if_invalid(pairs), zero_division=0
  )
  return {'f1': 100.0 * float(score)}


def macro_f1(classes: int) -> Metric:
  """Makes the mean of the labels' F1 scores, all with equal weight."""

  def metric(targets, predictions) -> Scores:
    pairs = _labelled(targets, predictions)
    if not pairs:
      return {}
    score = _library('sklearn.metrics').f1_score(
      *zip(*pairs, strict=True),
      labels=range(classes),
      average='macro',
      zero_division=0,
    )
    return {f'mean_{classes}class_f1': 100.0 * float(score)}

  return metric


def matthews(targets, predictions) -> Scores:
  """Matthews' correlation of two labels; 0 if it is undefined.

  T5 makes invalid predictions a third label, so its score is no longer CoLA's
  coefficient (Warstadt et al., 2018).
  """
  pairs = _labelled(targets, predictions)
  if not pairs:
    return {}
  metrics = _library('sklearn.metrics')
  with warnings.catch_warnings():  # A warning that there is only one label.
    warnings.simplefilter('ignore')
    score = metrics.matthews_corrcoef(*_wrong_if_invalid(pairs))
  return {'matthews_corrcoef': 100.0 * float(score)}


def _correlation(name: str, targets, predictions) -> Scores:
  pairs = _labelled(targets, predictions)
  if not pairs:
    return {}
  from scipy import stats

  function = {'pearson': stats.pearsonr, 'spearman': stats.spearmanr}[name]
  columns = [np.array(column, float) for column in zip(*pairs, strict=True)]
  score = 0.0
  if all(np.ptp(column) > 0 for column in columns):
    score = function(*columns)[0]
  return {f'{name}_corrcoef': 100.0 * float(score)}


def pearson(targets, predictions) -> Scores:
  """Pearson's correlation; 0 if it is undefined, where T5's is NaN.

  An untrained prompt may predict the same for all rows. A NaN there would hide
  every later score when the best prompt is chosen.
  """
  return _correlation('pearson', targets, predictions)


def spearman(targets, predictions) -> Scores:
  """Spearman's rank correlation; 0 if it is undefined, where T5's is NaN."""
  return _correlation('spearman', targets, predictions)


def multirc_f1(targets, predictions) -> Scores:
  """MultiRC's F1a: over all answers, regardless of their questions."""
  return f1(targets, predictions)


def multirc_exact_match(targets, predictions) -> Scores:
  """MultiRC's EM: the share of questions whose answers are all judged right."""
  right = collections.defaultdict(lambda: True)
  for target, prediction in _labelled(targets, predictions):
    right[target['group']] &= target['value'] == prediction['value']
  if not right:
    return {}
  return {'exact_match': _percent(list(right.values()))}


# ---------------------------------------------------------------- answers


def _squad_form(text: str) -> str:
  """Lower case, without punctuation and articles, one blank between words."""
  text = text.lower().translate(str.maketrans('', '', string.punctuation))
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


_TRIVIA_QA_BLANKS = string.punctuation + '‘’´`'  # noqa: RUF001


def _trivia_qa_form(text: str) -> str:
  """As `_squad_form`, but punctuation and curly quotes become blanks."""
  blanks = str.maketrans(dict.fromkeys(_TRIVIA_QA_BLANKS, ' '))
  text = text.lower().translate(blanks)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def _token_f1(target: str, prediction: str) -> float:
  """F1 of words. For two texts without words, SQuAD's is 0, this one is 1."""
  expected, found = target.split(), prediction.split()
  if not expected or not found:
    return float(expected == found)
  same = collections.Counter(expected) & collections.Counter(found)
  return 2 * sum(same.values()) / (len(expected) + len(found))


def _best_match(targets, predictions, form: Callable[[str], str]) -> Scores:
  """Exact match and F1 with the best answer of each question."""
  em, f1s = [], []
  for answers, prediction in _labelled(targets, predictions):
    found = form(prediction)
    forms = [form(answer) for answer in answers]
    em.append(found in forms)
    f1s.append(max(_token_f1(answer, found) for answer in forms))
  if not em:
    return {}
  return {'em': _percent(em), 'f1': _percent(f1s)}


def squad(targets, predictions) -> Scores:
  """SQuAD's exact match and F1 (Rajpurkar et al., 2016), also MRQA's."""
  return _best_match(targets, predictions, _squad_form)


def trivia_qa(targets, predictions) -> Scores:
  """TriviaQA's exact match and F1 (Joshi et al., 2017)."""
  return _best_match(targets, predictions, _trivia_qa_form)


def record(targets, predictions) -> Scores:
  """ReCoRD's EM and F1: each query counts once, however many answers it has."""
  first = {}
  for target, prediction in zip(targets, predictions, strict=True):
    first.setdefault(target['group'], (target['value'], prediction['value']))
  return squad(*zip(*first.values(), strict=True)) if first else {}


# ------------------------------------------------------------------- text


def exact_match(targets, predictions) -> Scores:
  """The share of texts that are equal."""
  scores = accuracy(targets, predictions)
  return {'exact_match': scores['accuracy']} if scores else {}


def rouge(targets, predictions) -> Scores:
  """Mean F1 of ROUGE-1, -2 and -Lsum, by rouge-score without stemming.

  A line, or text that ends with ' . ', is a sentence. T5's score is the median
  of a bootstrap without a seed, which differs from call to call.
  """
  if not targets:
    return {}
  kinds = ['rouge1', 'rouge2', 'rougeLsum']
  scorer = _library('rouge_score.rouge_scorer').RougeScorer(kinds)

  def sentences(text):
    return text.replace(' . ', ' .\n')

  scores = [
    scorer.score(sentences(target), sentences(prediction))
    for target, prediction in zip(targets, predictions, strict=True)
  ]
  return {k: _percent([score[k].fmeasure for score in scores]) for k in kinds}


def bleu(targets, predictions) -> Scores:
  """Corpus BLEU by sacrebleu, tokenised by Unicode's classes.

  A target is a text, or a list of texts that are all right. T5 reads such a
  list as if it ran over the rows.
  """
  if not targets:
    return {}
  lists = [[t] if isinstance(t, str) else list(t) for t in targets]
  most = max(map(len, lists))
  streams = [
    [texts[i] if i < len(texts) else None for texts in lists]
    for i in range(most)
  ]
  score = _library('sacrebleu').corpus_bleu(
    list(predictions), streams, smooth_method='exp', tokenize='intl'
  )
  return {'bleu': float(score.score)}


def is_right(target: Any, prediction: Any) -> bool | None:
  """Returns whether one prediction is right, or None without a label.

  Answers are compared as in SQuAD, all other values directly. For generated
  text, a score is more useful. The result is also None for targets of other
  people's tasks that have no plain right or wrong.
  """
  target, prediction = _value(target), _value(prediction)
  if isinstance(target, Mapping | np.ndarray) or target in _UNLABELLED:
    return None
  if isinstance(target, list) and isinstance(prediction, str):
    return squad([target], [prediction])['em'] == 100.0
  return target == prediction


# -------------------------------------------------------------------- rank


def ranked(metrics: Sequence[Metric], labels: int) -> Metric:
  """Makes a metric of scores: each row's best label is its prediction.

  Args:
    metrics: The metrics to compute on these predictions.
    labels: How many labels each row has. If EVAL_STEPS cuts off some labels of
      a row, the row does not count.

  Returns:
    A function (targets, scores) whose targets are `postprocessors.ranked`.
  """

  def metric(targets, scores) -> Scores:
    if isinstance(scores, tuple):  # T5X also gives the intermediate values.
      scores = scores[0]
    rows = collections.defaultdict(list)
    for target, score in zip(targets, scores, strict=True):
      rows[target['row']].append((float(score), target))
    best = [
      max(row, key=lambda scored: scored[0])[1]
      for row in rows.values()
      if len(row) == labels
    ]
    found = {}
    for compute in metrics:
      found |= compute(
        [b['target'] for b in best], [b['candidate'] for b in best]
      )
    return found

  names = (m.__qualname__.split('.')[0] for m in metrics)
  metric.__qualname__ = f'ranked({", ".join(names)})'
  return metric


# The names that METRICS of tasks/from_files.gin may have, by what they compare.
BY_NAME = {
  'label': {'accuracy': accuracy, 'f1': f1, 'matthews': matthews},
  'number': {'pearson': pearson, 'spearman': spearman},
  'text': {'exact_match': exact_match, 'rouge': rouge, 'bleu': bleu},
  'answer': {'squad': squad, 'trivia_qa': trivia_qa},
}
