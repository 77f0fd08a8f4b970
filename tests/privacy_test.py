"""Private prompts: the update computed by hand, its cost, and the guarantee."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import optax
import pytest

from ptune.methods import lora, prompt
from ptune.model import models, parameters, sizes
from ptune.training import optim, privacy
from ptune.training import state as state_lib
from tests import tiny
from tests.network_test import make_batch
from tests.state_test import ONE, plan_of, start

BATCH = make_batch([16, 9, 1, 5], [10, 4, 1, 3])
KEY = np.array([1, 2], np.uint32)
NEVER = 1e9  # A clip without effect.


def update(private, dropout_rate=0.0, microbatches=1, tx=None, batch=BATCH):
  """Runs a step of SGD; returns the prompt before and after, and the sums."""
  plan, tx = plan_of(dropout_rate), tx or optax.sgd(1.0)
  state, frozen, abstract = start(plan, tx)
  before = np.array(parameters.flatten(state.trainable)[prompt.PATH])
  step = state_lib.compile_step(
    models.EncoderDecoderModel(plan.network),
    tx,
    plan,
    abstract,
    microbatches,
    private=private,
  )
  with plan.scope():
    after, sums = step(state, frozen, batch)
  return (
    before,
    np.array(parameters.flatten(after.trainable)[prompt.PATH]),
    sums,
  )


def private(clip, noise):
  return privacy.Private(privacy.Privacy(clip=clip, noise=noise), KEY)


def gradient_of_row(row):
  """Returns the ordinary gradient of a batch with one row."""
  plan = plan_of()
  state, frozen, _ = start(plan, optax.sgd(1.0))
  model = models.EncoderDecoderModel(plan.network)
  one = {k: x[row : row + 1] for k, x in BATCH.items()}

  def loss(trainable):
    return model.loss(parameters.merge(trainable, frozen), one)[0]

  return np.asarray(parameters.flatten(jax.grad(loss)(state.trainable))[
    prompt.PATH
  ])  # fmt: skip


@pytest.mark.parametrize(('dropout_rate', 'microbatches'), [(0.1, 1), (0, 2)])
def test_without_noise_or_a_clip_that_binds_it_is_the_ordinary_update(
  dropout_rate, microbatches
):
  how = (dropout_rate, microbatches)
  before, want, sums = update(None, *how)
  _, got, private_sums = update(private(NEVER, 0.0), *how)
  assert np.abs(want - before).max() > 0.1
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
  for name in ('loss', 'correct', 'tokens'):
    np.testing.assert_allclose(private_sums[name], sums[name], rtol=1e-5)


def test_every_row_is_clipped_by_itself():
  rows = [gradient_of_row(row) for row in range(4)]
  norms = [np.linalg.norm(g) for g in rows]
  clip = float(np.median(norms))  # Clips some of the rows.
  want = sum(g * min(1, clip / n) for g, n in zip(rows, norms, strict=True))
  before, after, _ = update(private(clip, 0.0))
  np.testing.assert_allclose(
    before - after, want, atol=2e-5 * np.abs(want).max()
  )


def test_empty_places_of_a_batch_change_nothing():
  room = {k: np.pad(x, ((0, 3), (0, 0))) for k, x in BATCH.items()}
  _, want, sums = update(private(0.01, 0.0))
  _, got, same = update(private(0.01, 0.0), batch=room)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(same['loss'], sums['loss'], rtol=1e-5)


def test_the_noise_is_of_its_size_once_a_step_and_follows_the_step():
  _, clean, _ = update(private(0.01, 0.0))
  drawn = []
  for microbatches in (1, 2):
    _, noisy, _ = update(private(0.01, 200.0), microbatches=microbatches)
    drawn.append(noisy - clean)
  np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-4)
  assert abs(drawn[0].mean()) < 4 * 2 / math.sqrt(drawn[0].size)
  assert 1.7 < drawn[0].std() < 2.3  # 200 * 0.01
  one = private(0.01, 200.0)
  zeros = {'x': np.zeros(1000, np.float32)}
  first, again, second = (one.noised(s, zeros)['x'] for s in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


def test_it_costs_one_backward_pass(optimized):
  config = sizes.t5('t5_1_1_small').with_depth(2, 1)
  plan = parameters.plan(config, prompt.prompt(100), ONE)
  tx = optim.adafactor()
  abstract = state_lib.abstract_state(tx, plan)
  shapes = {
    'encoder_input_tokens': (8, 64),
    **dict.fromkeys(
      (
        'decoder_target_tokens',
        'decoder_input_tokens',
        'decoder_loss_weights',
      ),
      (8, 8),
    ),
  }
  batch = {k: jax.ShapeDtypeStruct(s, np.int32) for k, s in shapes.items()}
  frozen = parameters.unflatten(plan.select(plan.frozen))
  flops = []
  for one in (None, private(1.0, 1.0)):
    step = state_lib.compile_step(
      models.EncoderDecoderModel(plan.network), tx, plan, abstract, private=one
    )
    with plan.scope():
      program = step.lower(abstract, frozen, batch).compile()
    flops.append(program.cost_analysis()['flops'])
  assert flops[1] < 1.01 * flops[0]


# ------------------------------------------------------------------ accounting


def test_a_row_is_counted_as_often_as_it_can_have_been_used():
  # 12 rows in batches of 4: an epoch has 3 steps.
  assert [privacy.visits(s, 4, 12) for s in (0, 1, 3, 4, 6)] == [0, 1, 1, 2, 2]
  # With 10 rows, the third batch may contain the same row twice.
  assert [privacy.visits(s, 4, 10) for s in (2, 3, 5, 6)] == [1, 4, 4, 5]


def test_epsilon_is_that_of_the_gaussian_mechanism():
  # Theorem 8 of Balle and Wang, 2018 (arXiv 1805.06083): delta of one
  # mechanism.
  phi = lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))
  for noise, visits in ((1.0, 1), (4.0, 3)):
    one = privacy.Privacy(noise=noise, delta=1e-5)
    cost, mu = privacy.epsilon(one, visits), math.sqrt(visits) / noise
    delta = phi(mu / 2 - cost / mu) - math.exp(cost) * phi(-mu / 2 - cost / mu)
    np.testing.assert_allclose(delta, 1e-5, rtol=0.01)
  assert privacy.epsilon(one, 0) == 0
  assert privacy.epsilon(privacy.Privacy(noise=0.0), 1) == math.inf
  # Poisson sampling costs less.
  assert privacy.epsilon_if_poisson(one, 30, 10, 100) < privacy.epsilon(one, 3)


def test_a_run_stops_at_epsilon_and_says_what_it_spent(tmp_path):
  # 64 rows in batches of 8: an epoch has 8 steps.
  one = privacy.Privacy(clip=0.1, noise=2.0, delta=1e-3, epsilon=1.5)
  assert privacy.epsilon(one, 1) < 1.5 < privacy.epsilon(one, 2)

  def run(where):
    return tiny.run(
      tmp_path / where, privacy=one, eval_split=None, train_steps=12
    )

  state = run('run')
  assert int(state.step) == 8
  facts = json.loads((tmp_path / 'run/prompts/step_8.json').read_text())
  spent = facts['privacy']
  assert spent['epsilon'] == privacy.epsilon(one, 1)
  assert (spent['examples'], spent['noise'], spent['delta']) == (64, 2.0, 1e-3)
  assert spent['epsilon_if_poisson'] < spent['epsilon']
  # The noise is secret, so another run draws other noise.
  other = jax.tree.leaves(run('other').trainable)[0]
  mine = jax.tree.leaves(state.trainable)[0]
  assert np.abs(mine - other).max() > 0.01
  # A private run does not resume without privacy.
  with pytest.raises(ValueError, match='private from start to end'):
    tiny.run(tmp_path / 'run', eval_split=None)


def test_poisson_sampling_is_accounted_for_and_resumes(tmp_path):
  one = privacy.Privacy(
    clip=0.1, noise=2.0, delta=1e-3, epsilon=1.5, sampling='poisson'
  )
  # Computed by hand for one step: the outcome has the density N(0, noise^2).
  # With the row, this is mixed with N(1, noise^2) by the probability that the
  # row is drawn.
  x = np.linspace(-30, 30, 600_001)
  normal = lambda mean: np.exp(-((x - mean) ** 2) / 8) / np.sqrt(8 * np.pi)
  without, mixed = normal(0), 0.875 * normal(0) + 0.125 * normal(1)
  cost = privacy.cost(one, 1, 8, 64)
  deltas = [
    np.trapezoid(np.maximum(p - np.exp(cost) * q, 0), x)
    for p, q in ((mixed, without), (without, mixed))
  ]
  np.testing.assert_allclose(max(deltas), 1e-3, rtol=0.02)
  last = privacy.last_step(one, 1000, 8, 64)
  assert privacy.cost(one, last, 8, 64) <= 1.5
  assert privacy.cost(one, last + 1, 8, 64) > 1.5
  # This is more than the number of steps with shuffled batches.
  assert last > privacy.last_step(
    dataclasses.replace(one, sampling='shuffle'), 1000, 8, 64
  )

  def run(where, steps):
    return tiny.run(
      tmp_path / where, privacy=one, eval_split=None, train_steps=steps
    )

  run('run', 2)
  shutil.copytree(tmp_path / 'run', tmp_path / 'whole')
  state = run('run', 4)
  facts = json.loads((tmp_path / 'run/prompts/step_4.json').read_text())
  assert facts['privacy'] == {
    'clip': 0.1,
    'noise': 2.0,
    'delta': 1e-3,
    'sampling': 'poisson',
    'examples': 64,
    'epsilon': privacy.cost(one, 4, 8, 64),
  }
  again = run('whole', 4)  # With the same keys.
  for a, b in zip(
    jax.tree.leaves(state.trainable),
    jax.tree.leaves(again.trainable),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  # A run cannot change its sampling.
  with pytest.raises(ValueError, match='sampling'):
    tiny.run(
      tmp_path / 'run',
      privacy=dataclasses.replace(one, sampling='shuffle'),
      eval_split=None,
      train_steps=6,
    )


def test_what_cannot_be_private_is_refused():
  model = models.EncoderDecoderModel(plan_of().network)
  with pytest.raises(ValueError, match="METHOD is 'lora'; only a prompt"):
    privacy.check(lora.lora(2), model, 0)
  with pytest.raises(ValueError, match='turn packing off'):
    privacy.check(prompt.prompt(3), model, 4)
  with pytest.raises(ValueError, match=r'(?s)CLIP_NORM is 0.*DELTA is 2'):
    privacy.Privacy(clip=0, delta=2)
  with pytest.raises(ValueError, match="SAMPLING is 'all'; it must be one of"):
    privacy.Privacy(sampling='all')
  one = privacy.Privacy(noise=1.0, delta=1e-5, epsilon=0.1)
  with pytest.raises(ValueError, match='in memory, with at least BATCH_SIZE'):
    privacy.last_step(one, 10, 8, None)
  with pytest.raises(ValueError, match='DELTA is 1e-05, not below 1 / 200000'):
    privacy.last_step(one, 10, 8, 200_000)
  with pytest.raises(ValueError, match=r'EPSILON 0.1 allows no step'):
    privacy.last_step(one, 10, 8, 1000)
