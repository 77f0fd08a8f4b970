"""Training: the reference's trajectories, sharding, changes, and resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptune.methods import prompt
from ptune.model import parameters, partitioning
from ptune.model.models import EncoderDecoderModel
from ptune.training import optim
from ptune.training import state as state_lib
from tests.network_test import TINY, load


def trajectory(numerics):
  """Returns frozen parameters, the recorded values, and the batches."""
  params = load(numerics / 'prompt_encoder' / 'params.npz')
  golden = load(numerics / 'trajectory' / 'trajectory.npz')
  batches = {
    k.removeprefix('batches/'): v
    for k, v in golden.items()
    if k.startswith('batches/')
  }
  return params, golden, batches


def one_device_plan(length=5):
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  return parameters.plan(TINY, prompt.prompt(length), mesh)


def step_function(plan, start, learning_rate):
  tx = optim.adafactor(start, learning_rate)
  model = EncoderDecoderModel(plan.network)
  return tx, jax.jit(functools.partial(state_lib.train_step, model, tx))


def second_moment(state):
  return np.asarray(
    next(
      s.v['encoder']['prompt']['prompt']['prompt']
      for s in jax.tree.leaves(
        state.opt_state, is_leaf=lambda s: hasattr(s, 'v')
      )
      if hasattr(s, 'v')
    )
  )


@pytest.mark.parametrize('start', [0, 1_100_000])
@pytest.mark.parametrize(
  ('rate', 'steps', 'atol'), [(0.01, 10, 2e-5), (0.3, 3, 1e-4)]
)
def test_ten_steps_equal_the_reference(numerics, start, rate, steps, atol):
  params, golden, batches = trajectory(numerics)
  tx, step = step_function(one_device_plan(), start, rate)
  trainable = parameters.unflatten({prompt.PATH: golden['prompt_init']})
  state = state_lib.TrainState(jnp.int32(0), trainable, tx.init(trainable))
  frozen = parameters.unflatten(params)
  name = f'start{start}_' + ('lr0.01_' if rate == 0.01 else '')
  for i in range(steps):
    batch = {k: v[i % 5] for k, v in batches.items()}
    state, sums = step(state, frozen, batch)
    np.testing.assert_allclose(
      sums['loss'], golden[name + 'loss'][i], rtol=5e-6, err_msg=f'step {i}'
    )
    got = parameters.flatten(state.trainable)[prompt.PATH]
    np.testing.assert_allclose(
      got, golden[name + 'prompt_each'][i], atol=atol, err_msg=f'step {i}'
    )
    np.testing.assert_allclose(
      second_moment(state),
      golden[name + 'v_each'][i],
      rtol=2e-3,
      atol=1e-8,
      err_msg=f'step {i}',
    )
