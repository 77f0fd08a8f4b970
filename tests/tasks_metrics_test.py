"""Cases of tasks/metrics.py that the golden values do not cover."""

import numpy as np
import pytest

from ptune.tasks import metrics


@pytest.mark.parametrize(
  ('target', 'prediction', 'right'),
  [
    (1, 1, True),
    (1, 0, False),
    (0, -1, False),
    (-1, -1, None),
    ('yes', 'yes', True),
    ({'value': 1, 'group': 3}, {'value': 1}, True),
    ({'value': 1, 'group': 3}, {'value': -1}, False),
    (['The hill', 'a hill'], 'hill.', True),
    (['The hill'], 'valley', False),
    ([], 'x', None),
    ({'value': ['An owl'], 'group': (0, 1)}, {'value': 'owl'}, True),
    (2.4, 2.4, True),
    ({'answers': ['a'], 'context': 'a b'}, 'a', None),  # From others' tasks.
    (np.array([1, 2]), 1, None),
  ],
)
def test_is_right(target, prediction, right):
  assert metrics.is_right(target, prediction) is right


def test_unlabelled_rows_count_nowhere_and_none_leaves_no_score():
  for metric in (
    metrics.accuracy,
    metrics.f1,
    metrics.matthews,
    metrics.macro_f1(3),
    metrics.pearson,
    metrics.spearman,
    metrics.exact_match,
  ):
    assert metric([-1, -1], [0, 1]) == {}
    with_one = metric([1, -1, 0], [1, 0, 0])
    assert with_one == metric([1, 0], [1, 0])
  assert metrics.squad([[], ['a b']], ['x', 'b']) == metrics.squad(
    [['a b']], ['b']
  )


def test_invalid_is_the_share_of_minus_one():
  assert metrics.invalid([1, 0], [-1, 0]) == {'invalid': 50.0}
  assert metrics.invalid([{}, {}], [{'value': -1}, {'value': -1}]) == {
    'invalid': 100.0
  }
  assert metrics.invalid([2.0], [-1.0]) == {'invalid': 100.0}


def test_several_references_of_bleu_belong_to_their_row():
  predictions = ['the cat sat on the mat .', 'a dog ran in the park .']
  targets = [[predictions[0], 'unlike'], ['other words here', predictions[1]]]
  assert metrics.bleu(targets, predictions) == {'bleu': pytest.approx(100)}
  targets[1] = ['some other words that are here .']
  assert metrics.bleu(targets, predictions)['bleu'] < 100


def test_ranked_takes_the_best_label_of_each_row():
  def row(number, target):
    return [
      {'row': number, 'candidate': label, 'target': target}
      for label in range(3)
    ]

  targets = [*row(7, 2), *row(9, 0), *row(11, -1)]
  scores = [-3.0, -2.0, -1.0, -5.0, -4.0, -6.0, 0.0, -1.0, -1.0]
  metric = metrics.ranked([metrics.accuracy, metrics.macro_f1(3)], 3)
  got = metric(targets, scores)
  assert got['accuracy'] == 50.0
  assert metric(targets, (scores, {})) == got
