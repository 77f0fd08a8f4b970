"""Each of many simultaneous runs gives the same result as a run alone."""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptune import train_many
from ptune.convert import open_checkpoint
from ptune.data import batches as data
from ptune.data import seqio_task
from ptune.methods import full, lora, prompt, prompt_init, superpos
from ptune.model import (
  frozen_weights,
  model_info,
  network,
  parameters,
  partitioning,
  structure,
)
from ptune.model.models import EncoderDecoderModel
from ptune.serving import trained_model
from ptune.training import many, optim
from ptune.training.many import Trial
from ptune.training.settings import Trained
from tests import tiny

pytestmark = pytest.mark.slow

SMALL = prompt_init.random_uniform(-0.1, 0.1)
RUNS = {
  'a': Trial('tiny', prompt.prompt(3), 0.05, seed=1),
  'longer': Trial('tiny', prompt.prompt(5), 0.02, seed=1),
  'other': Trial(
    'tiny_b',
    prompt.prompt(3, SMALL),
    optim.schedule(0.05, 'linear', 2, 10),
    seed=3,
  ),
}
STEPS = 10
NAMES = ('mixture_or_task_name', 'method', 'seed')


def settings(model_dir, **changes):
  """Returns the settings that all runs share."""
  shared = tiny.settings(model_dir, config=tiny.CONFIG, train_steps=STEPS)
  shared = {k: v for k, v in shared.items() if k not in NAMES}
  return {**shared, 'eval_period': STEPS, 'log_period': 5, **changes}


def run(model_dir, runs=RUNS, **changes):
  with tiny.one_device():
    how = settings(model_dir, **changes)
    return train_many.train_many(
      runs, **tiny.grouped(train_many.train_many, **how)
    )


@functools.cache
def together():
  """Trains all runs; returns their directory and the result."""
  path = tiny.directory() / 'many'
  return path, run(path)


@functools.cache
def alone(name):
  """Trains the same run with `ptune train`."""
  one, path = RUNS[name], tiny.directory() / 'alone' / name
  state = tiny.run(
    path,
    config=tiny.CONFIG,
    mixture_or_task_name=one.task,
    method=one.method,
    seed=one.seed,
    train_steps=STEPS,
    eval_period=STEPS,
    log_period=5,
    optimizer=functools.partial(
      optim.adafactor, learning_rate=one.learning_rate
    ),
  )
  return path, parameters.flatten(jax.device_get(state.trainable))


@pytest.mark.parametrize('name', RUNS)
def test_each_run_ends_as_it_does_alone(name):
  path, trained = together()
  there, want = alone(name)
  assert trained[name].keys() == want.keys() == {prompt.PATH}
  got = trained[name][prompt.PATH]
  np.testing.assert_allclose(got, want[prompt.PATH], atol=1e-5)
  # The prompt moved, and differently from the others.
  written = np.load(path / name / 'prompts' / f'step_{STEPS}.npy')
  np.testing.assert_array_equal(written, got)
  others = [trained[o][prompt.PATH] for o in RUNS if o != name]
  assert all(
    o.shape != got.shape or np.abs(o - got).max() > 0.01 for o in others
  )
  # The records are the same too, and so are the scores of the best prompt.
  ours, theirs = tiny.records(path / name), tiny.records(there)
  assert [r.keys() for r in ours] == [r.keys() for r in theirs]
  for mine, other in zip(ours, theirs, strict=True):
    for key, value in mine.items():
      if isinstance(value, str):
        assert value == other[key]
      else:
        np.testing.assert_allclose(value, other[key], rtol=1e-4, err_msg=key)
  ours, theirs = (
    json.loads((place / 'prompts' / 'best.json').read_text())
    for place in (path / name, there)
  )
  assert ours.keys() == theirs.keys()
  for key in ('step', 'task', 'base', 'method', 'seed', 'prompt_length'):
    assert ours[key] == theirs[key]


def test_dropout_is_that_of_the_run(tmp_path):
  runs = {k: RUNS[k] for k in ('a', 'other')}
  dropping = tiny.settings('')['config']
  shared = {'config': dropping, 'train_steps': 2, 'eval_split': None}
  trained = run(tmp_path / 'many', runs, **shared)
  state = tiny.run(
    tmp_path / 'alone',
    mixture_or_task_name='tiny_b',
    method=prompt.prompt(3, SMALL),
    seed=3,
    optimizer=functools.partial(
      optim.adafactor, learning_rate=RUNS['other'].learning_rate
    ),
    **shared,
  )
  want = parameters.flatten(state.trainable)[prompt.PATH]
  np.testing.assert_allclose(trained['other'][prompt.PATH], want, atol=1e-5)


def test_stopped_and_started_again_the_bits_are_the_same(tmp_path):
  runs = {k: RUNS[k] for k in ('a', 'other')}
  run_ = functools.partial(run, runs=runs, eval_split=None)
  whole = run_(tmp_path / 'whole')
  # 6 steps, of which the last 2 are not in a checkpoint.
  with pytest.raises(RuntimeError, match='killed'):
    run_(tmp_path / 'parts', model=functools.partial(killed, after=6))
  again = run_(tmp_path / 'parts')
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  for name in runs:
    assert tiny.records(tmp_path / 'parts' / name) == tiny.records(
      tmp_path / 'whole' / name
    )


def killed(net, after):
  """Returns a model that fails after so many steps."""
  count = iter(range(after))

  def fail(_):
    if next(count, None) is None:
      raise RuntimeError('killed')

  # A restart must have the same loss, by its name.
  @functools.wraps(EncoderDecoderModel.cross_entropy)
  def objective(model, params, batch, rng):
    jax.debug.callback(fail, batch['decoder_target_tokens'][0, 0])
    return EncoderDecoderModel.cross_entropy(model, params, batch, rng)

  return EncoderDecoderModel(net, objective=objective)


def test_other_runs_or_settings_are_refused(tmp_path):
  path, _ = together()
  before = tiny.files(path)
  with pytest.raises(ValueError, match=r"runs: .*'longer'"):
    run(path, {'a': RUNS['a']})
  changed = {**RUNS, 'longer': Trial('tiny', prompt.prompt(5), 0.06, seed=1)}
  with pytest.raises(ValueError, match=r'rate: 0\.02 there, 0\.06 here'):
    run(path, changed)
  with pytest.raises(ValueError, match='beyond TRAIN_STEPS 5'):
    run(path, train_steps=5)
  assert tiny.files(path) == before
  for changes in (
    {'microbatches': 0},
    {'keep_checkpoints': 0},
    {'eval_steps': -1},
  ):
    with pytest.raises(ValueError, match='expected a whole number of at least'):
      run(tmp_path / 'new', RUNS, **changes)
  for runs, message in (
    ({'all': Trial('tiny', full.full())}, "'all' has method 'full'"),
    ({'a/b': RUNS['a']}, r"instead of \['a/b'\]"),
    ({}, 'at least one'),
  ):
    with pytest.raises(ValueError, match=message):
      run(tmp_path / 'new', runs)
  assert not (tmp_path / 'new').exists()


def test_the_prompts_answer_together_in_a_bank():
  path, trained = together()
  with tiny.one_device():
    bank = trained_model.load_bank(
      tiny.CONFIG, tiny.base(), 4, {name: path / name for name in RUNS}
    )
  assert bank.lengths == {k: len(v[prompt.PATH]) for k, v in trained.items()}
  tokens = np.tile(np.arange(3, 12, dtype=np.int32), (len(RUNS), 1))
  mixed = bank.predict(list(RUNS), tokens)[1]
  for i, name in enumerate(RUNS):
    same = bank.predict([name] * len(RUNS), tokens)[1]
    np.testing.assert_allclose(mixed[i], same[i], rtol=1e-5)
  assert len(set(np.round(mixed, 3))) > 1


def test_runs_together_cost_what_they_cost_alone():
  # Frozen kernels multiply the rows of all runs at once, and get no gradients.
  # We also compare memory, because a program that copied the kernels for each
  # run would have the same FLOP.
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])

  def program(count):
    runs = {str(i): Trial('', prompt.prompt(4), seed=i) for i in range(count)}
    groups = many.group(runs, tiny.CONFIG, mesh)
    plan = groups['group_0'].plan
    tx = optim.adafactor(learning_rate=0.0)
    step = many.compile_step(
      EncoderDecoderModel, optim.adafactor, 0, runs, groups
    )
    rows = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    names = ('encoder_input_tokens', 'decoder_target_tokens')
    names += ('decoder_input_tokens', 'decoder_loss_weights')
    frozen = parameters.unflatten(frozen_weights.shapes(plan))
    with plan.scope():
      return step.lower(
        many.abstract_state(tx, groups), frozen, dict.fromkeys(names, rows)
      ).compile()

  one, four = program(1), program(4)
  flops = [p.cost_analysis()['flops'] for p in (one, four)]
  assert 0.98 < flops[1] / flops[0] < 1.05
  grown = [p.memory_analysis().temp_size_in_bytes for p in (one, four)]
  params = structure.parameters(network.Transformer(tiny.CONFIG))
  base = sum(model_info.nbytes(x) for x in params.values())
  assert grown[1] - grown[0] < base


def test_methods_of_other_kinds_share_the_model(tmp_path):
  runs = {'prompt': Trial('tiny', prompt.prompt(3)), 'lora': Trial(
    'tiny', lora.lora(2), 0.01), 'superpos': Trial(
    'tiny', superpos.superpos(3, 4, 100), 0.01)}  # fmt: skip
  trained = run(tmp_path, runs, train_steps=1, eval_split=None)
  assert trained['prompt'].keys() == {prompt.PATH}
  assert all('lora' in path for path in trained['lora'])
  assert (tmp_path / 'lora' / 'prompts' / 'step_1.safetensors').exists()
  # Folding reads the shared base.
  ids = np.random.default_rng(0).choice(100, 4, replace=False)
  base = open_checkpoint(tiny.base()).leaves[parameters.EMBEDDING].read()
  [weights] = trained['superpos'].values()
  np.testing.assert_allclose(
    np.load(tmp_path / 'superpos' / 'prompts' / 'step_1.npy'),
    weights @ base[ids],
    atol=1e-6,
  )
  # Without an evaluation there is no best step, so the newest is loaded.
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  for name, one in runs.items():
    if one.method.fold:  # methods/prompt.gin reads its prompt.
      continue
    plan = parameters.plan(tiny.CONFIG, one.method, mesh)
    params, step = trained_model.load(plan, Trained(model_dir=tmp_path / name))
    flat = parameters.flatten(params)
    assert step == 1
    for path, value in trained[name].items():
      np.testing.assert_array_equal(flat[path], value)


def test_what_a_method_asks_of_inputs_is_asked_of_its_own_rows(tmp_path):
  asked = []
  checked = dataclasses.replace(
    prompt.prompt(4), check=lambda tokens: asked.append(tokens.copy())
  )
  runs = {
    'a': Trial('tiny', prompt.prompt(3)),
    'b': Trial('tiny_b', checked, seed=5),
    'c': Trial('tiny', prompt.prompt(3), seed=2),
  }
  run(tmp_path, runs, train_steps=1, eval_split=None)
  own = data.Batches(
    seqio_task.load('tiny_b', 'tests.tiny'),
    tiny.LENGTHS,
    8,
    seed=5,
    bucket_multiple=None,
  )
  np.testing.assert_array_equal(asked[0], own(0)['encoder_input_tokens'])


def test_where_the_base_lies_is_known_from_everywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(os.path.dirname(tiny.base()))
  base = os.path.basename(tiny.base())
  run(
    tmp_path,
    {'a': RUNS['a']},
    train_steps=1,
    eval_split=None,
    initial_checkpoint_path=base,
  )
  facts = json.loads((tmp_path / 'a' / 'run.json').read_text())
  assert facts['initial_checkpoint_path'] == os.path.abspath(base)


def test_batches_are_padded_to_the_longest():
  short, long = (
    {'x': np.full((2, n), n, np.int32), 'y': np.full((2, 3), n, np.int32)}
    for n in (2, 4)
  )
  joined = many.joined([short, long])
  np.testing.assert_array_equal(
    joined['x'],
    [[2, 2, 0, 0], [2, 2, 0, 0], [4, 4, 4, 4], [4, 4, 4, 4]],
  )
  assert joined['y'].shape == (4, 3)
