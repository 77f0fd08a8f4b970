"""Importance of a prompt's rows, compared with evaluations without them."""

import csv
import json

import jax
import numpy as np
import pytest

import gin
from ptune import cli, evaluate
from ptune.analysis import ablate
from ptune.convert.prompts import read_prompt
from ptune.methods import ia3, prompt
from ptune.model import parameters, partitioning
from tests import tiny

pytestmark = pytest.mark.slow

LENGTH = 4
ARRAY = np.random.default_rng(0).normal(size=(LENGTH, 16)).astype(np.float32)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('ablate')


@pytest.fixture(scope='module')
def values(folder):
  """Returns each row's importance by leave-one-out; the two best are kept."""
  return ablated(folder, keep_rows=2, output_dir=str(folder / 'kept'))


def settings(folder, array, **changes):
  """Returns settings to evaluate or ablate a prompt in batches of 8."""
  file = folder / 'p.npy'
  np.save(file, array)
  return {
    'mixture_or_task_name': 'tiny_no_metrics',
    'task_feature_lengths': tiny.LENGTHS,
    'config': tiny.CONFIG,
    'method': prompt.prompt(len(array)),
    'checkpoint_path': tiny.base(),
    'prompt_file': str(file),
    'output_dir': str(folder / 'out'),
    'batch_size': 8,
    'bucket_multiple': None,
    **changes,
  }


def ablated(folder, array=ARRAY, **changes):
  with tiny.one_device():
    return ablate.ablate(
      **tiny.grouped(ablate.ablate, **settings(folder, array, **changes))
    )


def loss(folder, array, **changes):
  with tiny.one_device():
    how = settings(folder, array, **changes)
    found = evaluate.evaluate(**tiny.grouped(evaluate.evaluate, **how))
  return found['tiny_no_metrics']['loss']


def test_a_row_is_worth_what_the_loss_is_without_it(folder, values):
  without = loss(folder, np.delete(ARRAY, 2, axis=0))
  assert values[2] == pytest.approx(without - loss(folder, ARRAY), abs=1e-5)


def test_the_best_rows_are_kept_in_their_order(folder, values):
  kept = sorted(np.argsort(-values)[:2].tolist())
  pruned = read_prompt(folder / 'kept' / 'pruned.npy')
  assert (pruned.array == ARRAY[kept]).all()
  assert pruned.facts['kept_rows'] == kept
  assert pruned.facts['prompt_length'] == 2
  scores = pruned.facts['scores_of_rows']
  assert scores['pruned'] == pytest.approx(-loss(folder, ARRAY[kept]), abs=1e-5)
  text = (folder / 'kept' / 'ablation.csv').read_text()
  table = list(csv.DictReader(text.splitlines()))
  assert [int(row['row']) for row in table if row['kept'] == '1'] == kept
  np.testing.assert_allclose(
    [float(row['importance']) for row in table], values, rtol=1e-6
  )
  assert (folder / 'kept' / 'ablation.png').read_bytes()[:4] == b'\x89PNG'


def test_the_gradient_is_what_the_loss_changes_by(folder):
  # With a single example, the mean of absolute values is its absolute value.
  one = {'batch_size': 1, 'eval_steps': 1}
  array = 3 * ARRAY  # Otherwise the loss hardly changes.
  gradients = ablated(folder, array, importance='gradient', **one)
  tokens = len(tiny.rows('validation')[0][1]) + 1
  change = np.zeros_like(array)
  change[1] = 0.05 * array[1]
  up, down = (loss(folder, array + s * change, **one) for s in (1, -1))
  assert gradients[1] == pytest.approx(abs(up - down) * tokens / 0.1, rel=0.02)


def zeroed(array, kept, pieces):
  """Returns the prompt with zeros in all pieces except `kept`."""
  cut = array.reshape(len(array) * pieces, -1).copy()
  cut[np.setdiff1d(np.arange(len(cut)), kept)] = 0
  return cut.reshape(array.shape)


def test_a_piece_is_worth_what_the_loss_is_without_it(folder):
  how = {'keep_rows': 2, 'keep_pieces': 5, 'pieces': 4}
  ablated(folder, output_dir=str(folder / 'pieces'), **how)
  pruned = read_prompt(folder / 'pieces' / 'pruned.npy')
  rows, kept = pruned.facts['kept_rows'], pruned.facts['kept_pieces']
  array = ARRAY[rows]
  text = (folder / 'pieces' / 'ablation_of_pieces.csv').read_text()
  table = list(csv.DictReader(text.splitlines()))
  assert [int(line['row']) for line in table] == np.repeat(rows, 4).tolist()
  worth = np.array([float(line['importance']) for line in table])
  without = zeroed(array, np.delete(np.arange(8), 6), 4)
  change = loss(folder, without) - loss(folder, array)
  assert worth[6] == pytest.approx(change, abs=1e-5)
  assert kept == sorted(np.argsort(-worth)[:5].tolist())
  assert (pruned.array == zeroed(array, kept, 4)).all()
  score = pruned.facts['scores_of_rows']['pruned']
  assert score == pytest.approx(-loss(folder, pruned.array), abs=1e-5)
  drawn = folder / 'pieces' / 'ablation_of_pieces.png'
  assert drawn.read_bytes()[:4] == b'\x89PNG'


def test_a_row_of_one_piece_has_the_gradient_of_the_row(folder):
  how = {'importance': 'gradient', 'keep_pieces': 3, 'pieces': 1}
  rows = ablated(folder, output_dir=str(folder / 'one'), **how)
  text = (folder / 'one' / 'ablation_of_pieces.csv').read_text()
  table = list(csv.DictReader(text.splitlines()))
  np.testing.assert_allclose(
    [float(line['importance']) for line in table], rows, rtol=1e-5
  )
  pruned = np.load(folder / 'one' / 'pruned.npy')
  assert (
    pruned.any(axis=1).nonzero()[0] == np.sort(np.argsort(-rows)[:3])
  ).all()


def test_how_rows_are_batched_changes_nothing(folder, values, monkeypatch):
  monkeypatch.setattr(ablate, 'AT_ONCE', 48)  # Three prompts, then one.
  again = ablated(folder, batch_size=16)
  np.testing.assert_allclose(again, values, atol=1e-5)
  one, other = (
    ablated(folder, importance='gradient', batch_size=size) for size in (8, 16)
  )
  np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_metric_that_is_evaluated_row_by_row_is_the_same(folder, values):
  # On a task without metrics, None means the loss, evaluated prompt by prompt.
  slow = ablated(folder, best_metric=None)
  np.testing.assert_allclose(slow, values, atol=1e-5)


@pytest.mark.parametrize(
  'how', [{}, {'position': 'before_eos'}, {'causal': True}]
)
def test_a_shorter_prompt_stands_where_the_longer_did(how):
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(tiny.CONFIG, prompt.prompt(4, **how), mesh)
  shorter = ablate._shortened(plan, 3)
  assert shorter.method.name == plan.method.name
  assert shorter.params[prompt.PATH].shape == (3, 16)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'keep_rows': 4}, 'KEEP_ROWS is 4; expected 1 to 3'),
    ({'keep_rows': 0}, 'KEEP_ROWS is 0'),
    (
      {'keep_pieces': 64},
      'KEEP_PIECES is 64; expected 1 to 63: the 4 rows',
    ),
    ({'keep_rows': 2, 'keep_pieces': 32}, 'the 2 rows have 16 pieces'),
    ({'keep_pieces': 2, 'pieces': 3}, 'PIECES is 3; expected a divisor of 16'),
    ({'importance': 'x'}, "IMPORTANCE is 'x'; expected one of"),
    ({'method': ia3.ia3()}, "'ia3' is not a plain prompt"),
    ({'method': prompt.prompt(1)}, 'the prompt has one row'),
    ({'best_metric': 'x'}, "'x' is not among the metrics"),
    ({'method': prompt.prompt(5)}, 'PROMPT_LENGTH'),
  ],
)
def test_bad_input_is_told_and_nothing_written(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    ablated(tmp_path, **changes)
  out = tmp_path / 'out'
  assert not out.exists() or not list(out.iterdir())


def test_a_prompt_is_ablated_by_command(folder, capsys):
  np.save(folder / 'named.npy', ARRAY)
  (folder / 'named.json').write_text(json.dumps({'task': 'tiny', 'step': 12}))
  out = folder / 'command'
  gin.clear_config()
  with tiny.one_device():
    status = cli.main(
      tiny.arguments(
        'ablate',
        CHECKPOINT_PATH=tiny.base(),
        PROMPT_FILE=str(folder / 'named.npy'),
        PROMPT_LENGTH=LENGTH,
        EVAL_OUTPUT_DIR=str(out),
        IMPORTANCE='gradient',
        KEEP_ROWS=1,
        EVAL_STEPS=1,
      )
    )
  gin.clear_config()
  captured = capsys.readouterr()
  assert status == 0, captured.err
  assert 'of the 1 rows kept' in captured.out
  facts = json.loads((out / 'pruned.json').read_text())
  assert facts['task'] == 'tiny' and facts['step'] == 12
  assert (np.load(out / 'pruned.npy') == ARRAY[facts['kept_rows']]).all()
