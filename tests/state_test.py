"""One update: its effect, its cost, and its loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import peers
from ptune.methods import prompt, smop
from ptune.model import models, network, parameters, partitioning, sizes
from ptune.training import optim
from ptune.training import state as state_lib
from tests.network_test import SHALLOW, TINY, load, make_batch, random_params

ONE = partitioning.make_mesh(devices=jax.devices()[:1])
BATCH = make_batch([16, 9, 1], [10, 4, 1])
TOKENS = 10 + 4 + 1


@functools.cache
def plan_of(dropout_rate=0.0, make=lambda: prompt.prompt(5)):
  config = dataclasses.replace(SHALLOW, dropout_rate=dropout_rate)
  return parameters.plan(config, make(), ONE)


def start(plan, tx):
  """Returns the first state and the frozen parameters."""
  flat = parameters.flatten(random_params(plan.network))
  placed = {p: parameters.place(v, plan.params[p]) for p, v in flat.items()}
  trainable, frozen = (
    parameters.unflatten({p: placed[p] for p in paths})
    for paths in (plan.trainable, plan.frozen)
  )
  abstract = state_lib.abstract_state(tx, plan)
  return state_lib.first_state(tx, trainable, abstract), frozen, abstract


# ------------------------------------------------------------------ the update


def test_a_step_changes_only_what_is_trained():
  plan, tx = plan_of(), optim.adafactor(1_100_000)
  state, frozen, abstract = start(plan, tx)
  # Copies on the device, because views of host arrays cannot be donated.
  before = jax.tree.map(jnp.copy, state)
  base = jax.device_get(frozen)
  step = state_lib.compile_step(
    models.EncoderDecoderModel(plan.network), tx, plan, abstract
  )
  with plan.scope():
    after, _ = step(state, frozen, BATCH)

  # The state holds the prompt, its second moment and counters, and no copy of
  # frozen parameters.
  assert parameters.flatten(after.trainable).keys() == {prompt.PATH}
  sizes = [x.size for x in jax.tree.leaves(after)]
  assert sorted(sizes)[-2:] == [5 * 32] * 2
  assert sorted(sizes)[-3] == 1
  assert jax.tree.structure(after) == jax.tree.structure(before)
  (old,), (new,) = (jax.tree.leaves(s.trainable) for s in (before, after))
  assert np.all(np.asarray(old) != np.asarray(new))
  assert (before.step, after.step) == (0, 1)
  # The step donates the state's buffers, but not the frozen weights.
  assert all(x.is_deleted() for x in jax.tree.leaves(state) if x.size > 1)
  assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))
  jax.tree.map(np.testing.assert_array_equal, frozen, base)


@pytest.mark.parametrize(
  'settings', [(0.1,), (0.0, lambda: smop.smop(3))], ids=['dropout', 'smop']
)
def test_dropout_and_noise_follow_the_seed_and_the_step(settings):
  # The noise of a router does not depend on DROPOUT_RATE.
  plan, tx = plan_of(*settings), optim.adafactor()
  state, frozen, _ = start(plan, tx)
  model = models.EncoderDecoderModel(plan.network)

  @jax.jit
  def run(step, seed):
    return state_lib.train_step(
      model, tx, state.replace(step=step), frozen, BATCH, seed=seed
    )[1]['loss']

  first = run(0, 0)
  assert run(0, 0) == first
  for step, seed in ((1, 0), (0, 1)):
    assert abs(run(step, seed) - first) > 1e-3 * first


@pytest.mark.parametrize('microbatches', [1, 2])
def test_bfloat16_has_all_products_that_a_step_with_dropout_needs(microbatches):
  # XLA's CPU backend lacks some products for rows longer than in other tests.
  config = dataclasses.replace(SHALLOW, dropout_rate=0.1, dtype='bfloat16')
  plan = parameters.plan(config, prompt.prompt(3), ONE)
  tx = optim.adafactor()
  state, frozen, abstract = start(plan, tx)
  batch = make_batch([70, 70, 60, 50], [8, 8, 7, 6], 70, 8)
  step = state_lib.compile_step(
    models.EncoderDecoderModel(plan.network), tx, plan, abstract, microbatches
  )
  with plan.scope():
    _, sums = step(state, frozen, batch)
  assert np.isfinite(sums['loss'])


def test_a_prompt_step_costs_at_most_2_1_forward_passes(optimized):
  # If anything read the gradient of a frozen kernel, even a metric, XLA would
  # compute it. With all of them, a step would cost three forward passes.
  config = sizes.t5('t5_1_1_small').with_depth(2, 1)
  plan = parameters.plan(config, prompt.prompt(100), ONE)
  rows = NamedSharding(ONE, PartitionSpec('data'))
  batch = {
    name: jax.ShapeDtypeStruct((2, length), np.int32, sharding=rows)
    for name, length in {
      'encoder_input_tokens': 128,
      'decoder_input_tokens': 16,
      'decoder_target_tokens': 16,
      'decoder_loss_weights': 16,
    }.items()
  }
  step, forward, *_ = peers.compile_step(plan, batch)
  step, forward = (p.cost_analysis()['flops'] for p in (step, forward))
  assert 5e9 < forward < 7e9
  assert 1.9 < step / forward < 2.1


# -------------------------------------------------------------------- the loss


def float64_loss(logits, targets, z_loss, label_smoothing):
  """Returns cross entropy minus its minimum for smoothed labels, and z-loss."""
  logits = logits.astype(np.float64)
  log_z = np.log(np.sum(np.exp(logits), axis=-1))
  log_p = logits - log_z[..., None]
  vocab = logits.shape[-1]
  label = np.full(logits.shape, label_smoothing / (vocab - 1))
  np.put_along_axis(label, targets[..., None], 1 - label_smoothing, axis=-1)
  entropy = -np.sum(label * np.log(np.where(label > 0, label, 1)), axis=-1)
  return -np.sum(label * log_p, axis=-1) - entropy, z_loss * log_z**2


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1, 0.4])
@pytest.mark.parametrize('z_loss', [0.0, 1e-4, 0.1])
def test_token_loss_equals_float64(z_loss, label_smoothing):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 4, (3, 7, 50)).astype(np.float32)
  targets = rng.integers(0, 50, (3, 7)).astype(np.int32)
  got = models.token_loss(logits, targets, z_loss, label_smoothing)
  want = float64_loss(logits, targets, z_loss, label_smoothing)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


def test_the_best_prediction_of_a_smoothed_label_has_no_loss():
  probabilities = np.full((1, 1, 11), 0.02)
  probabilities[..., 4] = 0.8
  loss, _ = models.token_loss(
    np.log(probabilities).astype(np.float32), np.array([[4]]), 0.0, 0.2
  )
  np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_the_loss_counts_the_tokens_that_have_a_weight():
  model = models.EncoderDecoderModel(
    plan_of().network, z_loss=1e-2, label_smoothing=0.1
  )
  params = random_params(plan_of().network)
  weights = BATCH['decoder_loss_weights'].copy()
  weights[0, 3:] = 0  # Only a part of this target counts.
  batch = BATCH | {'decoder_loss_weights': weights}

  @jax.jit
  def run(params):
    return (
      model.loss(params, batch),
      model.logits(params, batch),
      model.score(params, batch),
    )

  (loss, sums), logits, score = jax.device_get(run(params))
  targets, real = batch['decoder_target_tokens'], weights > 0
  cross_entropy, z_loss = float64_loss(logits, targets, 1e-2, 0.1)
  assert sums['tokens'] == 3 + 4 + 1
  np.testing.assert_allclose(loss, np.sum((cross_entropy + z_loss)[real]), 1e-5)
  np.testing.assert_allclose(sums['z_loss'], np.sum(z_loss[real]), 1e-5)
  assert sums['correct'] == np.sum((np.argmax(logits, -1) == targets)[real])
  # The score uses neither smoothing nor z-loss.
  plain, _ = float64_loss(logits, targets, 0, 0)
  np.testing.assert_allclose(score, -np.sum(plain * real, axis=1), 1e-5)


# -------------------------------------------------------------- the normalizer


def normalized(factor):
  return models.EncoderDecoderModel(
    plan_of().network, loss_normalizing_factor=factor
  )


def test_the_normalizer_is_nothing_a_number_or_the_tokens():
  assert normalized(None).normalizer(BATCH) is None
  assert normalized(233_472).normalizer(BATCH) == 233_472
  assert normalized('NUM_REAL_TARGET_TOKENS').normalizer(BATCH) == TOKENS
  empty = {k: np.zeros_like(x) for k, x in BATCH.items()}
  assert normalized('NUM_REAL_TARGET_TOKENS').normalizer(empty) == 1


def test_an_unknown_normalizer_names_the_choices():
  with pytest.raises(
    ValueError, match=r"is 'AVERAGE'.*None, a number or 'NUM_REAL_TARGET_TOK"
  ):
    normalized('AVERAGE').normalizer(BATCH)


def test_gradients_are_divided_by_the_normalizer_and_the_loss_is_not(numerics):
  folder = numerics / 'prompt_encoder'
  case = load(folder / 'case_p5.npz')
  inputs = ('encoder_input_', 'decoder_')
  batch = {k: v for k, v in case.items() if k.startswith(inputs)}
  frozen = parameters.unflatten(load(folder / 'params.npz'))
  value = load(folder / 'prompts.npz')['prompt_p5']
  trainable = parameters.unflatten({prompt.PATH: value})
  net = network.Transformer(TINY, prompt.prompt(5).placements)
  tx = optim.adafactor()

  @jax.jit
  def run(trainable, frozen):
    state = state_lib.TrainState(np.int32(0), trainable, tx.init(trainable))
    return [
      state_lib.train_step(
        models.EncoderDecoderModel(net, loss_normalizing_factor=factor),
        tx,
        state,
        frozen,
        batch,
      )[1]
      for factor in (None, 8.0, 'NUM_REAL_TARGET_TOKENS')
    ]

  sums = jax.device_get(run(trainable, frozen))
  tokens = np.sum(batch['decoder_loss_weights'])
  np.testing.assert_allclose(
    [s['gradient_norm'] for s in sums],
    np.linalg.norm(case['grad_prompt']) / np.array([1, 8, tokens]),
    rtol=1e-5,
  )
  np.testing.assert_allclose([s['loss'] for s in sums], case['loss'], rtol=2e-6)
