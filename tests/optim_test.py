"""Adafactor matches T5X's; schedules have the expected values."""

import json

import jax
import numpy as np
import optax
import pytest

from ptune.training import optim


def second_moments(state, name):
  """Returns the factored state's fields, wherever the chain has them."""
  found = [
    getattr(s, name)['p']
    for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, name))
    if hasattr(s, name)
  ]
  assert len(found) == 1
  return np.asarray(found[0])


@pytest.mark.parametrize('start', [0, 1_100_000])
@pytest.mark.parametrize('factored', [False, True])
def test_adafactor_equals_t5x(numerics, start, factored):
  folder = numerics / 'adafactor'
  meta = json.loads((folder / 'meta.json').read_text())
  name = 'factored' if factored else 'unfactored'
  with np.load(folder / f'{name}.npz') as f:
    golden = dict(f)
  optimizer = optim.adafactor(
    start,
    learning_rate=meta['learning_rate'],
    decay_rate=meta['decay_rate'],
    weight_decay_rate=meta['weight_decay_rate'],
    clipping_threshold=meta['clipping_threshold'],
    min_dim_size_to_factor=meta['min_dim_size_to_factor'],
  )
  params = {'p': golden['param0']}
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for i, grad in enumerate(golden['grads_f16'], start=1):
    grads = {'p': grad.astype(np.float32)}
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    key = f'start{start}_after{i}_'
    got = np.asarray(params['p'])
    if key + 'param' in golden:
      np.testing.assert_allclose(got, golden[key + 'param'], atol=5e-6)
    else:
      np.testing.assert_allclose(
        got[::10], golden[key + 'param_rows_every10'], atol=5e-6
      )
    for moment in ('v_row', 'v_col') if factored else ('v',):
      np.testing.assert_allclose(
        second_moments(state, moment),
        golden[key + moment],
        rtol=2e-6,
        err_msg=f'{moment} after step {i}',
      )


def test_a_step_offset_overrides_the_checkpoint():
  params = {'p': np.ones((4, 8), np.float32)}
  grads = {'p': np.full((4, 8), 0.5, np.float32)}
  a, b = (
    o.update(grads, o.init(params), params)[1]
    for o in (optim.adafactor(0), optim.adafactor(1_100_000, step_offset=0))
  )
  np.testing.assert_array_equal(second_moments(a, 'v'), second_moments(b, 'v'))


def test_schedules():
  constant = optim.schedule(0.3)
  assert constant(0) == constant(10_000) == 0.3
  warm = optim.schedule(0.3, warmup_steps=10)
  np.testing.assert_allclose([warm(0), warm(9), warm(10)], [0.03, 0.3, 0.3])
  linear = optim.schedule(1.0, 'linear', warmup_steps=10, decay_steps=110)
  np.testing.assert_allclose(
    [linear(s) for s in (10, 60, 110, 200)], [1.0, 0.5, 0.0, 0.0]
  )
  rsqrt = optim.schedule(1.0, 'rsqrt', warmup_steps=100)
  np.testing.assert_allclose([rsqrt(100), rsqrt(400)], [1.0, 0.5], rtol=1e-6)
  cosine = optim.schedule(1.0, 'cosine', decay_steps=100, end_factor=0.1)
  np.testing.assert_allclose([cosine(0), cosine(100)], [1.0, 0.1], rtol=1e-6)


def test_schedule_errors_say_what_to_set():
  with pytest.raises(ValueError, match='TRAIN_STEPS'):
    optim.schedule(decay='linear')
  with pytest.raises(ValueError, match="'rsqrt'"):
    optim.schedule(decay='exponential')


def test_a_group_is_updated_as_if_it_were_alone():
  draw = np.random.default_rng(0)
  params = {
    group: {'x': draw.normal(size=(4, 8)).astype(np.float32)} for group in 'abc'
  }
  falling = optim.schedule(0.1, 'linear', decay_steps=3)
  rates = {'a': 0.3, 'b': falling, 'c': 0.01}
  tx = optim.grouped(5, 0.01, optim.adafactor, {'a/*': 0.3, '[ab]/x': falling})
  state = tx.init(params)
  alone = {k: optim.adafactor(5, rate) for k, rate in rates.items()}
  states = {k: alone[k].init(params[k]) for k in params}
  for _ in range(2):
    grads = jax.tree.map(lambda x: draw.normal(size=x.shape), params)
    updates, state = tx.update(grads, state, params)
    for k, one in alone.items():
      want, states[k] = one.update(grads[k], states[k], params[k])
      jax.tree.map(np.testing.assert_array_equal, updates[k], want)


def test_a_pattern_that_matches_nothing_is_refused():
  tx = optim.grouped(learning_rates={'encoder/offset/*': 0.1, '*': 0.2})
  with pytest.raises(ValueError, match=r'offset.*(?s:.*)encoder/prompt/x'):
    tx.init({'encoder': {'prompt': {'x': np.ones(3, np.float32)}}})
