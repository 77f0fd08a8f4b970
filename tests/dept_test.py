"""Additions to the embedded inputs (DePT, ADePT) match their formulas."""

import functools

import jax
import numpy as np
import pytest

from ptune.methods import adept, dept, prompt
from ptune.model import network, parameters
from ptune.training import optim
from ptune.training import state as state_lib
from tests.network_test import SHALLOW, make_batch, random_params
from tests.state_test import ONE

METHODS = {
  'dept': functools.partial(dept.dept, 3, rank=2, positions=18),
  'adept': functools.partial(adept.adept, 3, bottleneck=4),
}
methods = pytest.mark.parametrize('name', METHODS)


def encoder_reads(net, params, tokens):
  """Returns site `encoder/embed`: [batch, prompt + length, embed]."""
  _, sown = net.apply(
    {'params': params},
    tokens,
    enable_dropout=False,
    method='encode',
    mutable=['intermediates'],
  )
  return sown['intermediates']['encoder']['embed_site'][0]


def by_hand(name, flat, tokens):
  """Computes [P; X + additions] from the modules' formulas, in float64."""
  flat = {k: np.asarray(v, np.float64) for k, v in flat.items()}
  own = {
    k.removeprefix('encoder/offset/'): v
    for k, v in flat.items()
    if k.startswith('encoder/offset')
  }
  x = flat[parameters.EMBEDDING][tokens]
  if name == 'dept':
    x[:, :18] += (own['a'] @ own['b'])[: x.shape[1]]
  else:
    hidden = np.maximum(x @ own['down/kernel'] + own['down_bias'], 0)
    x += hidden @ own['up/kernel'] + own['up_bias']
  rows = np.broadcast_to(flat[prompt.PATH], (len(x), 3, x.shape[2]))
  return np.concatenate([rows, x], axis=1)


@methods
@pytest.mark.parametrize('length', [16, 20])
def test_the_encoder_reads_what_the_formula_says(name, length):
  net = network.Transformer(SHALLOW, METHODS[name]().placements)
  params = random_params(net)
  tokens = make_batch([16, 9, 1], [4, 3, 1], length, 6)['encoder_input_tokens']
  np.testing.assert_allclose(
    encoder_reads(net, params, tokens),
    by_hand(name, parameters.flatten(params), tokens),
    atol=1e-5,
  )


@methods
def test_it_starts_as_the_prompt_alone(name):
  plan = parameters.plan(SHALLOW, METHODS[name](), ONE)
  added = parameters.initialize(plan, plan.adapters, seed=0)
  base = random_params(network.Transformer(SHALLOW))
  params = parameters.merge(base, parameters.unflatten(added))
  plain = network.Transformer(SHALLOW, prompt.prompt(3).placements)
  tokens = make_batch([16, 9], [4, 3], 16, 6)['encoder_input_tokens']
  np.testing.assert_array_equal(
    encoder_reads(plan.network, params, tokens),
    encoder_reads(plain, params, tokens),
  )


def test_inputs_beyond_the_positions_are_refused():
  check = METHODS['dept']().check
  check(make_batch([18, 9], [4, 3], 20, 6)['encoder_input_tokens'])
  with pytest.raises(ValueError, match=r'19 tokens, .* for 18; .*positions'):
    check(make_batch([19, 9], [4, 3], 20, 6)['encoder_input_tokens'])


@methods
def test_the_additions_learn_at_their_own_rate(name):
  plan = parameters.plan(SHALLOW, METHODS[name](), ONE)
  tx = optim.grouped(
    learning_rate=0.3,
    optimizer=functools.partial(optim.adamw, max_norm=None),
    learning_rates={'encoder/offset/*': 0.001},
  )
  trainable = parameters.unflatten(
    {p: np.zeros(x.shape, np.float32) for p, x in plan.select(
      plan.trainable).items()}
  )  # fmt: skip
  abstract = state_lib.abstract_state(tx, plan)
  state = state_lib.first_state(tx, trainable, abstract)
  grads = jax.tree.map(np.ones_like, trainable)
  updates, _ = tx.update(grads, state.opt_state, trainable)
  for path, x in parameters.flatten(updates).items():
    rate = 0.3 if path == prompt.PATH else 0.001
    np.testing.assert_allclose(x, -rate, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: dept.dept(0), 'PROMPT_LENGTH is 0'),
    (lambda: dept.dept(rank=0), 'DePT got rank = 0'),
    (lambda: dept.dept(positions=0), 'positions = 0'),
    (lambda: adept.adept(bottleneck=0), 'bottleneck is 0'),
  ],
)
def test_sizes_that_cannot_be_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
