"""The scores of ptune/serving/classes.py equal those of scikit-learn."""

import csv
import re

import numpy as np
import pytest

from ptune.serving import classes, predictions

NAMES = ['billing', 'login', 'other topic']


def of_numbers(seed=0, rows=60):
  """Returns records with label numbers; -1 is no label or an illegal answer."""
  draw = np.random.default_rng(seed)
  records = []
  for i in range(rows):
    target = int(draw.integers(-1, 3))
    answer = target if draw.random() < 0.6 else int(draw.integers(-1, 3))
    targets = NAMES[target] if target >= 0 else '<unk>'
    targets = targets.encode() if i % 2 else targets  # SeqIO has bytes.
    records.append(
      {'index': i, 'targets': targets, 'target': target, 'prediction': answer}
    )
  return records


def test_the_figures_are_those_of_scikit_learn():
  sklearn = pytest.importorskip('sklearn.metrics')
  found = classes.pairs(of_numbers())
  names, counts = classes.confusion(found)
  assert names == [*NAMES, classes.OTHER]
  labels, answers = zip(*found, strict=True)
  np.testing.assert_array_equal(
    counts, sklearn.confusion_matrix(labels, answers, labels=names)
  )
  values = sklearn.precision_recall_fscore_support(
    labels, answers, labels=NAMES, zero_division=0
  )
  table = classes.table(names, counts)
  assert [c.label for c in table] == NAMES
  np.testing.assert_allclose(
    np.array([c[1:4] for c in table]).T, 100 * np.array(values[:3])
  )
  assert [c.support for c in table] == values[3].tolist()


def test_a_class_that_is_never_answered_has_no_precision():
  names, counts = classes.confusion([('a', 'b'), ('b', 'b')])
  assert classes.table(names, counts)[0] == ('a', 0.0, 0.0, 0.0, 1)


def test_the_best_label_of_a_ranked_row_is_its_answer():
  records = [
    {
      'targets': name,
      'score': score,
      'target': {'row': row, 'candidate': k, 'target': target},
    }
    for row, (target, scores) in enumerate(
      [(0, (-1.0, -2.0)), (0, (-3.0, -1.0)), (1, (-2.0, -1.0)), (-1, (0, 1))]
    )
    for k, (name, score) in enumerate(zip(('no', 'yes'), scores, strict=True))
  ]
  assert classes.pairs(records) == [('no', 'no'), ('no', 'yes'), ('yes', 'yes')]


def test_texts_are_classes_only_if_they_repeat():
  texts = [{'target': t, 'targets': t, 'prediction': 'x'} for t in 'aabb']
  assert classes.pairs(texts) == [(t, classes.OTHER) for t in 'aabb']
  free = [{'target': t, 'targets': t, 'prediction': t} for t in 'abcd']
  assert classes.pairs(free) == []
  answers = {'target': {'answers': ['a']}, 'prediction': 'a'}
  assert classes.pairs([answers]) == []


def test_an_evaluation_leaves_table_matrix_and_picture(tmp_path):
  predictions.write(tmp_path, 'task', 7, of_numbers())
  place = tmp_path / 'task'
  assert (place / 'confusion-7.png').read_bytes().startswith(b'\x89PNG')
  with (place / 'confusion-7.csv').open() as lines:
    rows = list(csv.reader(lines))
  assert rows[0] == ['label', *NAMES, classes.OTHER]
  names, counts = classes.confusion(classes.pairs(of_numbers()))
  assert [[int(x) for x in row[1:]] for row in rows[1:]] == counts.tolist()
  for read, made in zip(
    classes.read(place, 7), classes.table(names, counts), strict=True
  ):
    assert read.label == made.label and read.support == made.support
    np.testing.assert_allclose(read[1:4], made[1:4], atol=0.006)
  assert classes.read(place, 8) == [] and classes.text(place, 8) == ''
  lines = classes.text(place, 7).splitlines()
  told = [re.split(r'\s{2,}', line) for line in lines]
  assert told[0] == ['class', 'precision', 'recall', 'F1', 'support']
  blank = lines.index('')
  assert [line[0] for line in told[1:blank]] == names[: blank - 1]
  assert told[blank + 1][1:] == names
  matrix = [[int(x) for x in line[1:]] for line in told[blank + 2 :]]
  assert matrix == [row for row in counts.tolist() if any(row)]


def test_predictions_have_names_beside_numbers(tmp_path):
  records = of_numbers()
  predictions.write(tmp_path, 'task', 7, records)
  lines = (tmp_path / 'task' / 'predictions-7.jsonl').read_text().splitlines()
  line = lines[next(i for i, r in enumerate(records) if r['prediction'] == 0)]
  assert '"prediction_name": "billing"' in line
  line = lines[next(i for i, r in enumerate(records) if r['prediction'] < 0)]
  assert 'prediction_name' not in line
