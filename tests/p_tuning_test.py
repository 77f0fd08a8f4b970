"""Methods whose trained parameters compute a prompt, and save only that."""

import functools
import json

import jax
import numpy as np
import pytest

from ptune.convert import open_checkpoint
from ptune.convert.export import PLAIN, export
from ptune.convert.prompts import read_prompt
from ptune.errors import UserError
from ptune.methods import (
  p_tuning,
  prompt,
  prompt_init,
  residual,
  superpos,
  ulpt,
)
from ptune.model import network, parameters, structure
from ptune.serving import trained_model
from ptune.training.settings import Trained
from tests import tiny
from tests.network_test import BATCH, SHALLOW, forward, random_params
from tests.state_test import ONE

SCOPE = 'encoder/prompt/prompt'
METHODS = {
  'mlp': functools.partial(p_tuning.p_tuning, encoder='mlp', hidden=6),
  'lstm': functools.partial(p_tuning.p_tuning, encoder='lstm', hidden=6),
  'residual': functools.partial(residual.residual, bottleneck=6),
  'superpos': functools.partial(
    superpos.superpos, tokens=4, population=100, seed=3
  ),
  'ulpt': functools.partial(ulpt.ulpt, rank=4, seed=3),
}
methods = pytest.mark.parametrize('name', METHODS)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def lstm(rows, kernel, bias):
  cell, output, outputs = 0, np.zeros(len(bias) // 4), []
  for row in rows:
    gates = np.concatenate([row, output]) @ kernel + bias
    put, keep, show, new = np.split(gates, 4)
    cell = sigmoid(keep + 1) * cell + sigmoid(put) * np.tanh(new)
    output = sigmoid(show) * np.tanh(cell)
    outputs.append(output)
  return np.array(outputs)


def by_hand(name, flat):
  """Computes the prompt from the modules' formulas, in float64."""
  own = {
    k.removeprefix(f'{SCOPE}/'): np.asarray(v, np.float64)
    for k, v in flat.items()
    if k.startswith(SCOPE)
  }
  draw = np.random.default_rng(3)
  if name == 'superpos':
    ids = draw.choice(100, 4, replace=False)
    return own['weights'] @ flat[parameters.EMBEDDING][ids]
  if name == 'ulpt':
    width = own['scale'].size
    projection = draw.normal(size=(4, width)) / 2
    return (own['rows'] @ projection) * own['scale'] + own['shift']
  rows = own['embedding']
  if name == 'lstm':
    cells = {
      d: [own[f'encoder/{d}/{x}'] for x in ('kernel', 'bias')]
      for d in ('forward', 'backward')
    }
    forward = lstm(rows, *cells['forward'])
    backward = lstm(rows[::-1], *cells['backward'])[::-1]
    rows = np.concatenate([forward, backward], axis=1)
  made = np.maximum(rows @ own['encoder/wi/kernel'], 0)
  made = made @ own['encoder/wo/kernel']
  if name != 'residual':
    return made
  made -= made.mean(1, keepdims=True)
  made /= np.sqrt(made.var(1, keepdims=True) + 1e-5)
  return rows + made * own['encoder/scale'] + own['encoder/bias']


@methods
def test_the_folded_prompt_is_the_formulas_and_answers_the_same(name):
  method = METHODS[name](5)
  net = network.Transformer(SHALLOW, method.placements)
  flat = parameters.flatten(random_params(net))
  trained = {k: v for k, v in flat.items() if method.trains(k)}
  assert trained.keys() == flat.keys() - structure.parameters(
    network.Transformer(SHALLOW)
  )
  table = np.asarray(flat[parameters.EMBEDDING])
  folded = method.fold(trained, lambda ids: table[list(ids)])
  assert folded.keys() == {method.prompt} == {prompt.PATH}
  assert method.name in PLAIN  # PEFT and T5X can use it.
  np.testing.assert_allclose(
    folded[prompt.PATH], by_hand(name, flat), atol=1e-5
  )
  plain = {k: v for k, v in flat.items() if k not in trained} | folded
  _, got = forward(net)(parameters.unflatten(flat), BATCH)
  _, want = forward(network.Transformer(SHALLOW, prompt.prompt(5).placements))(
    parameters.unflatten(plain), BATCH
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('read', [trained_model.check, trained_model.load])
def test_a_method_refuses_the_plain_prompt_that_it_writes(name, read, tmp_path):
  file = tmp_path / 'step_2.npy'
  np.save(file, np.zeros((3, tiny.CONFIG.emb_dim), np.float32))
  plan = parameters.plan(tiny.CONFIG, METHODS[name](3), ONE)
  trained = Trained(checkpoint_path='unread', prompt_file=str(file))
  with pytest.raises(UserError, match=r'plain prompt, .*methods/prompt\.gin'):
    read(plan, trained)


@pytest.mark.slow
def test_a_run_writes_a_plain_prompt(tmp_path):
  name = 'lstm'
  method = METHODS[name](3)
  state = tiny.run(tmp_path / 'run', method=method, train_steps=2)
  trained = parameters.flatten(jax.device_get(state.trainable))
  file = tmp_path / 'run' / 'prompts' / 'step_2.npy'
  np.testing.assert_allclose(np.load(file), by_hand(name, trained), atol=1e-5)
  # PEFT and T5X can use it like a prompt of plain prompt tuning.
  lines = export(read_prompt(tmp_path / 'run'), 'peft', tmp_path / 'peft')
  assert any('wrote' in line for line in lines)
  np.testing.assert_array_equal(
    read_prompt(tmp_path / 'peft').array, np.load(file)
  )
  # The checkpoint has no array at the path of a prompt.
  source = open_checkpoint(tmp_path / 'run')
  assert prompt.PATH not in source.leaves
  plan = parameters.plan(tiny.CONFIG, prompt.prompt(3), ONE)
  with tiny.one_device():
    trained_model.check(
      plan, Trained(checkpoint_path=tiny.base(), prompt_file=str(file))
    )
  facts = json.loads(file.with_suffix('.json').read_text())
  assert facts['method'] == method.name


def test_an_initialiser_gives_the_rows_that_the_network_reads():
  given = prompt_init.from_array(np.zeros((5, 32)))
  for name in ('mlp', 'lstm', 'residual'):
    made = METHODS[name](5, init=given)
    assert made.initial == {f'{SCOPE}/embedding': given}
  assert METHODS['ulpt'](5, init=given).initial == {f'{SCOPE}/rows': given}


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: p_tuning.p_tuning(0), 'PROMPT_LENGTH is 0'),
    (lambda: p_tuning.p_tuning(encoder='rnn'), "'rnn' is not one of .*'mlp'"),
    (lambda: p_tuning.p_tuning(hidden=0), 'hidden is 0; it must be at least 1'),
    (lambda: p_tuning.p_tuning(encoder='lstm', hidden=5), '5; .* even'),
    (lambda: residual.residual(0), 'PROMPT_LENGTH is 0'),
    (lambda: residual.residual(bottleneck=0), 'bottleneck is 0'),
    (lambda: superpos.superpos(0), 'PROMPT_LENGTH is 0'),
    (lambda: superpos.superpos(tokens=3000), '3000 and population = 2000'),
    (lambda: ulpt.ulpt(rank=0), 'rank of ULPT is 0'),
  ],
)
def test_sizes_that_cannot_be_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
