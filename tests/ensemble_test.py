"""Several prompts of a task: each answers as if alone, and they vote."""

import itertools
import json

import numpy as np
import pytest

from ptune import evaluate
from ptune.methods import prompt
from ptune.serving import ensemble
from tests import tiny

pytestmark = pytest.mark.slow


def test_the_majority_wins_and_the_scores_decide_a_tie():
  a, b, c = [1, 0], [2, 1], [3, 1]
  tokens = np.array([[a, a, a, a], [b, a, b, a], [b, b, c, a], [c, b, c, a]])
  scores = np.array(
    [
      [-0.1, -9, -1, -1],
      [-5, -9, -0.1, -2],
      [-6, -1, -2, -3],
      [-0.2, -1, -2, 0],
    ]
  )
  votes = ensemble.vote(tokens, scores)
  # By column: two vote b with low scores; two against two; two vote c; all vote
  # a.
  np.testing.assert_array_equal(votes.tokens, [b, b, c, a])
  np.testing.assert_array_equal(votes.count, [2, 2, 2, 4])
  np.testing.assert_allclose(votes.scores, [-5.5, -1, -2, -1.5])


def test_of_answers_with_a_vote_each_the_likeliest_wins():
  draw = np.random.default_rng(0)
  tokens = np.arange(5)[:, None, None] + 10 * np.arange(30)[None, :, None]
  scores = draw.normal(size=(5, 30))
  votes = ensemble.vote(tokens, scores)
  np.testing.assert_array_equal(votes.scores, scores.max(axis=0))
  np.testing.assert_array_equal(
    votes.tokens[:, 0], scores.argmax(axis=0) + 10 * np.arange(30)
  )


def test_the_order_of_members_matters_only_to_what_is_equal():
  draw = np.random.default_rng(1)
  tokens = draw.integers(0, 3, (4, 50, 1))
  scores = draw.normal(size=(4, 50))
  expected = ensemble.vote(tokens, scores)
  for order in itertools.permutations(range(4)):
    got = ensemble.vote(tokens[list(order)], scores[list(order)])
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.scores, expected.scores)


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  """Returns the files of an evaluation of three prompts, and the prompts."""
  path = tmp_path_factory.mktemp('evaluated')
  best = np.load(tiny.trained() / 'prompts' / 'best.npy')
  prompts = {'a': best, 'b': -2 * best, 'c': np.concatenate([best, 3 * best])}
  (path / 'prompts').mkdir()
  for name, array in prompts.items():
    np.save(path / 'prompts' / f'{name}.npy', array)
  scores = run(path / 'out', prompts=str(path / 'prompts'))
  return path, prompts, scores


def run(output_dir, **changes):
  with tiny.one_device():
    how = tiny.grouped(
      evaluate.evaluate,
      mixture_or_task_name='tiny',
      task_feature_lengths=tiny.LENGTHS,
      config=tiny.CONFIG,
      output_dir=str(output_dir),
      checkpoint_path=tiny.base(),
      batch_size=8,
      **{'method': prompt.prompt(3), **changes},
    )
    return evaluate.evaluate(**how)


def lines(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_member_is_evaluated_as_if_it_were_alone(evaluated, tmp_path):
  path, prompts, _ = evaluated
  records = {
    r.get('prompt', r.get('prompts')): r
    for r in lines(path / 'out' / 'metrics.jsonl')
  }
  assert list(records) == ['a', 'b', 'c', 'average', 'best', 'ensemble']
  for name in ('b', 'c'):
    alone = run(
      tmp_path / name,
      method=prompt.prompt(len(prompts[name])),
      prompt_file=str(path / 'prompts' / f'{name}.npy'),
    )['tiny']
    assert records[name].items() >= {'task': 'tiny', 'prompt': name}.items()
    for key, value in alone.items():
      assert records[name][key] == pytest.approx(value, rel=1e-5), key
    (file,) = (tmp_path / name / 'tiny').glob('predictions-*.jsonl')
    own = path / 'out' / 'tiny' / f'predictions-{name}.jsonl'
    for got, expected in zip(lines(own), lines(file), strict=True):
      assert got.pop('score') == pytest.approx(expected.pop('score'), rel=1e-5)
      assert got == expected


def test_average_best_and_ensemble_stand_beside_the_members(evaluated):
  path, _, scores = evaluated
  records = lines(path / 'out' / 'metrics.jsonl')
  members, (average, best, vote) = records[:3], records[3:]
  for key in ('accuracy', 'mean_score', 'loss', 'token_accuracy'):
    values = [r[key] for r in members]
    assert average[key] == pytest.approx(np.mean(values))
    assert best[key] == (min(values) if key == 'loss' else max(values))
  assert vote['accuracy'] == scores['tiny']['accuracy']
  means = [r['mean_score'] for r in members]
  assert vote['mean_score'] == pytest.approx(np.mean(means), rel=1e-5)
  # Computes the vote by hand from each member's answers.
  votes = lines(path / 'out' / 'tiny' / 'votes.jsonl')
  said = lines(path / 'out' / 'tiny' / 'predictions-ensemble.jsonl')
  targets = [label for _, label in tiny.rows('validation')]
  assert len(votes) == len(said) == len(targets)
  right = 0
  for record, row, target in zip(votes, said, targets, strict=True):
    texts = [m['prediction'] for m in record['members'].values()]
    most = max(map(texts.count, texts))
    assert record['votes'] == most
    assert texts.count(record['prediction']) == most
    assert row['prediction'] == record['prediction']
    right += record['prediction'] == target
  assert vote['accuracy'] == pytest.approx(100 * right / len(targets))


def test_contradicting_settings_are_refused(evaluated, tmp_path):
  prompts = str(evaluated[0] / 'prompts')
  for changes, message in (
    ({'model_dir': str(tiny.trained())}, 'set PROMPTS, or MODEL_DIR'),
    ({'prompts': f'ensemble={prompts}/a.npy'}, "named 'ensemble'"),
  ):
    with pytest.raises(ValueError, match=message):
      run(tmp_path / 'out', **{'prompts': prompts, **changes})
    assert not tiny.files(tmp_path)
