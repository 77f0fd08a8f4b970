"""The properties of every method; this test finds the modules itself."""

import dataclasses
import functools
import inspect
import json
import math
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ptune import cli, methods
from ptune.convert import open_checkpoint, restore, with_rows
from ptune.convert.safetensors_files import open_file
from ptune.methods import (
  bottleneck,
  ia3,
  lora,
  norms,
  per_layer,
  prefix,
  prompt,
  prompt_init,
)
from ptune.model import (
  adapters,
  network,
  parameters,
  partitioning,
  sizes,
  structure,
)
from ptune.model.models import EncoderDecoderModel
from ptune.serving import trained_model
from ptune.tools import list_methods
from ptune.training import checkpoints, optim
from ptune.training import state as state_lib
from ptune.training.settings import Trained
from tests import tiny
from tests.network_test import (
  SHALLOW,
  TIED,
  TINY,
  load,
  make_batch,
  nested,
  random_params,
)

GOLDEN = 'The reference gives other values; ours may not change.'
# Sizes for a tiny model, for methods that have these arguments.
SMALL = {'length': 3, 'hidden': 8, 'size': 4, 'rank': 2, 'bottleneck': 4}
SMALL |= {'vocab_size': 128, 'tasks': 126}  # Any token may be a task token.
SMALL |= {'tokens': 4, 'population': 100, 'positions': 32, 'prompts': 3}


def small(function, **changes):
  """Returns a method with small sizes and otherwise its defaults."""
  known = inspect.signature(function).parameters
  sizes = {k: v for k, v in SMALL.items() if k in known and known[k].default}
  return function(**{**sizes, **changes})


METHODS = {
  name: small(function) for name, function in methods.functions().items()
}
METHODS |= {
  'per_layer, replace': small(per_layer.per_layer, combine='replace'),
  'prefix, mlp': small(prefix.prefix, hidden=8),
  'prefix, decoder': small(
    prefix.prefix, attentions=['self_attention', 'encoder_decoder_attention']
  ),
  'bottleneck, parallel': small(bottleneck.bottleneck, place='parallel'),
  'lora, everywhere': small(
    lora.lora,
    alpha=2,
    sites=['query', 'key', 'value', 'out', 'wi_0', 'wi_1', 'wo'],
  ),
  'norms, bias': norms.norms(relative_bias=True),
  'prompt+lora': adapters.combine([prompt.prompt(3), lora.lora(2)]),
  'ia3+lora': adapters.combine(
    [ia3.ia3(), lora.lora(2, alpha=6, sites=['wo', 'key', 'value'])]
  ),
  'lora+lora+ia3': adapters.combine(
    [lora.lora(2, 6, ['query']), lora.lora(3, 2, ['wo']), ia3.ia3()]
  ),
  'lora+norms': adapters.combine([lora.lora(2, alpha=6), norms.norms()]),
}
IDENTITY = ['full', 'ia3', 'norms', 'lora', 'bottleneck']
IDENTITY += ['bottleneck, parallel', 'lora, everywhere', 'norms, bias']
each = pytest.mark.parametrize('name', METHODS)


def no_rows(ids):
  raise AssertionError(f'nothing is to be read of the base, not {ids}')


# For tests that compile.
several = pytest.mark.parametrize(
  'name', [*methods.functions(), 'prefix, mlp', 'lora+norms']
)
mergeable = pytest.mark.parametrize(
  'name', [name for name, method in METHODS.items() if method.merge]
)


@functools.cache
def network_of(name, config=SHALLOW):
  return network.Transformer(config, METHODS[name].placements)


@functools.cache
def first_values(name):
  """Returns random values of the base, and the method's initial values."""
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(SHALLOW, METHODS[name], mesh)
  added = parameters.initialize(plan, plan.adapters, seed=0)
  return parameters.merge(
    random_params(network.Transformer(SHALLOW)), parameters.unflatten(added)
  )


# ------------------------------------------------- equal to the reference


@pytest.mark.parametrize(
  ('case', 'method'),
  {
    'per_layer_replace': per_layer.per_layer(5, combine='replace'),
    'per_layer_add': per_layer.per_layer(5, combine='add'),
    'ia3': ia3.ia3(),
  }.items(),
)
def test_golden_values_and_gradients(numerics, case, method):
  want = load(numerics / 'extended' / f'{case}.npz')

  def part(name):
    return {
      k.removeprefix(f'{name}/'): v
      for k, v in want.items()
      if k.startswith(f'{name}/')
    }

  base = load(numerics / 'prompt_encoder' / 'params.npz')
  net = network.Transformer(TINY, method.placements)
  assert set(structure.parameters(net)) == {*base, *part('param')}
  assert set(filter(method.trains, structure.parameters(net))) == set(
    part('param')
  )
  batch = part('batch')
  model = EncoderDecoderModel(net)

  @jax.jit
  def values(trained, base):
    def loss(trained):
      return model.loss(parameters.merge(trained, base), batch)

    params = parameters.merge(trained, base)
    answers = model.logits(params, batch), model.score(params, batch)
    return answers, jax.value_and_grad(loss, has_aux=True)(trained)

  (logits, score), ((loss, _), grads) = values(
    nested(part('param')), nested(base)
  )
  real = batch['decoder_loss_weights'] > 0
  np.testing.assert_allclose(
    np.asarray(logits)[real], want['logits'][real], atol=5e-5, err_msg=GOLDEN
  )
  np.testing.assert_allclose(loss, want['loss'], rtol=2e-6, err_msg=GOLDEN)
  np.testing.assert_allclose(
    score, want['score_batch'], atol=1e-4, rtol=1e-6, err_msg=GOLDEN
  )
  flat = parameters.flatten(grads)
  assert set(flat) == set(part('grad'))
  for path, grad in part('grad').items():
    np.testing.assert_allclose(
      flat[path],
      grad,
      atol=2e-5 * np.abs(grad).max(),
      err_msg=f'{path}: {GOLDEN}',
    )


# ------------------------------------------------------------------ values


def logits_of(net, params, batch):
  """Runs without compiling, because methods share most single operations."""
  logits = EncoderDecoderModel(net).logits(params, batch)
  return np.asarray(logits)[batch['decoder_loss_weights'] > 0]


@pytest.mark.parametrize('name', IDENTITY)
def test_starts_as_the_base(name):
  plain = network.Transformer(SHALLOW)
  batch = make_batch([16, 9, 1], [4, 3, 1], 16, 6)
  want = logits_of(plain, random_params(plain), batch)
  got = logits_of(network_of(name), first_values(name), batch)
  np.testing.assert_array_equal(got, want)


@each
def test_padding_never_changes_logits(name):
  net = network_of(name)
  params = random_params(net)
  short, long = (
    logits_of(net, params, make_batch([16, 9, 1], [4, 3, 1], length, 6))
    for length in (16, 20)
  )
  np.testing.assert_allclose(short, long, atol=2e-5)


@each
def test_cached_decoding_equals_the_whole_forward_pass(name):
  net = network_of(name)
  params = random_params(net)
  batch = make_batch([16, 9, 1], [4, 3, 1], 16, 6)
  want = EncoderDecoderModel(net).logits(params, batch)
  inputs, shifted = (
    batch[f'{of}_input_tokens'] for of in ('encoder', 'decoder')
  )
  encoded = net.apply(
    {'params': params}, inputs, enable_dropout=False, method='encode'
  )

  def decode(tokens, cache):
    return net.apply(
      {'params': params, **cache},
      encoded,
      inputs,
      tokens,
      tokens,
      enable_dropout=False,
      decode=True,
      mutable=['cache'],
      method='decode',
    )

  _, cache = decode(np.ones_like(shifted), {})
  got = []
  for step in range(4):
    logits, cache = decode(shifted[:, step : step + 1], cache)
    got.append(np.asarray(logits[:, 0]))
  real = batch['decoder_loss_weights'][:, :4] > 0
  np.testing.assert_allclose(
    np.stack(got, axis=1)[real], np.asarray(want)[:, :4][real], atol=5e-5
  )


# ------------------------------------------------------------------- steps


@pytest.mark.slow
@several
def test_a_step_is_the_same_when_sharded_and_after_a_restart(name, tmp_path):
  """The step also changes all trained parameters, and nothing else."""
  mesh = partitioning.make_mesh(2)
  plan = parameters.plan(SHALLOW, METHODS[name], mesh)
  model = EncoderDecoderModel(plan.network)
  tx = optax.sgd(0.01)  # Adam would magnify rounding errors.
  batch = make_batch([16, 9, 1, 7] * 2, [4, 3, 1, 2] * 2, 16, 6)
  values = parameters.flatten(first_values(name))
  # Random values, because initial zeros keep other parameters from moving in
  # the first step.
  rng = np.random.default_rng(0)
  values |= {
    path: rng.normal(size=x.shape, scale=0.3).astype(np.float32)
    for path, x in plan.select(plan.adapters).items()
  }

  def state_and_frozen(place):
    parts = [
      parameters.unflatten({path: place(path) for path in paths})
      for paths in (plan.trainable, plan.frozen)
    ]
    return state_lib.TrainState(jnp.int32(0), parts[0], tx.init(parts[0])), (
      parts[1]
    )

  # On one device and not compiled; see `logits_of`.
  state, frozen = state_and_frozen(lambda path: jnp.asarray(values[path]))
  one, sums = state_lib.train_step(model, tx, state, frozen, batch)
  one = parameters.flatten(one.trainable)
  idle = {p for p, x in one.items() if np.array_equal(x, values[p])}
  # Layer 0 replaces this prompt. The reference has it too.
  assert idle == ({prompt.PATH} if name == 'per_layer, replace' else set())

  abstract = state_lib.abstract_state(tx, plan)
  update = state_lib.compile_step(model, tx, plan, abstract)
  state, frozen = state_and_frozen(
    lambda path: parameters.place(np.asarray(values[path]), plan.params[path])
  )
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))
  with plan.scope():
    many, sharded_sums = update(state, frozen, batch)
  np.testing.assert_allclose(sharded_sums['loss'], sums['loss'], rtol=1e-5)
  for path, x in parameters.flatten(many.trainable).items():
    np.testing.assert_allclose(x, one[path], atol=1e-5, err_msg=path)
  for path, x in parameters.flatten(frozen).items():
    np.testing.assert_array_equal(x, values[path], err_msg=path)

  # A checkpoint is enough to continue with the same bits.
  with checkpoints.Checkpoints(tmp_path, start=0) as saved:
    saved.save(many, {})
  restored = checkpoints.restore(tmp_path, abstract)
  on_disk = open_checkpoint(tmp_path / '1').shapes
  assert on_disk == {p: plan.params[p].shape for p in plan.trainable}
  with plan.scope():
    want, _ = update(many, frozen, batch)
    got, _ = update(restored[0], frozen, batch)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@each
def test_parameters_of_adapters_are_on_every_device(name):
  mesh = partitioning.make_mesh(2)
  plan = parameters.plan(SHALLOW, METHODS[name], mesh)
  for path, x in plan.select(plan.adapters).items():
    assert x.sharding.is_fully_replicated, path
  # The base is the network without adapters; its paths are not traced again.
  assert plan.base == set(structure.parameters(network.Transformer(SHALLOW)))


# ------------------------------------------------------------------- merging


@mergeable
@pytest.mark.parametrize('config', [SHALLOW, TIED], ids=['1.1', '1.0'])
def test_a_merged_model_answers_as_the_adapted_one(name, config):
  method = METHODS[name]
  if name == 'lora, everywhere' and config is TIED:
    method = lora.lora(2, 2, sites=['key', 'out', 'wi', 'wo'])
  net = network.Transformer(config, method.placements)
  plain = network.Transformer(config)
  base = parameters.flatten(random_params(plain))
  values = parameters.flatten(random_params(net))
  trained = {path: 0.5 * x for path, x in values.items() if method.trains(path)}
  merged = {path: method.merge(path, x, trained) for path, x in base.items()}
  adapted = parameters.unflatten({**base, **trained})
  batch = make_batch([16, 9, 1], [4, 3, 1], 16, 6)
  want = logits_of(net, adapted, batch)
  got = logits_of(plain, parameters.unflatten(merged), batch)
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
  before = logits_of(plain, parameters.unflatten(base), batch)
  assert np.abs(before - want).max() > 0.1
  assert all(x.dtype == np.float32 for x in merged.values())


def test_a_folded_prefix_answers_as_the_mlp_that_made_it():
  made, plain = METHODS['prefix, mlp'], METHODS['prefix']
  values = parameters.flatten(random_params(network_of('prefix, mlp')))
  trained = {path: x for path, x in values.items() if made.trains(path)}
  folded = made.fold(trained, no_rows)
  base = {path: x for path, x in values.items() if path not in trained}
  names = set(filter(plain.trains, structure.parameters(network_of('prefix'))))
  assert set(folded) == names
  batch = make_batch([16, 9, 1], [4, 3, 1], 16, 6)
  want = logits_of(
    network_of('prefix, mlp'), parameters.unflatten(values), batch
  )
  got = logits_of(
    network_of('prefix'), parameters.unflatten({**base, **folded}), batch
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_prefix_starts_as_the_keys_and_values_of_a_text():
  ids = (40, 41, 42, 43, 44)
  method = prefix.prefix(
    3,
    attentions=['attention', 'self_attention'],
    init=prompt_init.from_keys_and_values(ids),
  )
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(SHALLOW, method, mesh)
  base = parameters.flatten(random_params(network.Transformer(SHALLOW)))
  look = prompt_init.Base(
    None, None, None, functools.partial(parameters.sites, plan, base)
  )
  values = prompt_init.initialize_adapters(plan, look, seed=0)
  assert set(values) == plan.adapters
  # Computed by hand in the first layer: the normed text times the kernels.
  layer = 'encoder/layers_0'
  x = np.asarray(base[parameters.EMBEDDING])[list(ids)]
  x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6)
  x = x * base[f'{layer}/pre_attention_layer_norm/scale']
  for site, kernel in (('keys', 'key'), ('values', 'value')):
    np.testing.assert_allclose(
      values[f'{layer}/attention/{site}_prefix/prefix'],
      (x @ base[f'{layer}/attention/{kernel}/kernel'])[:3],
      atol=1e-5,
    )
  plan = parameters.plan(
    SHALLOW,
    prefix.prefix(9, init=prompt_init.from_keys_and_values(ids)),
    mesh,
  )
  with pytest.raises(ValueError, match=r'5 pieces, .* 9 rows; lower PROMPT_L'):
    prompt_init.initialize_adapters(plan, look, seed=0)


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize(
  'name',
  [
    'prefix, mlp',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('full', 'p_tuning', 'superpos', 'dept', 'lora+norms')
    ),
  ],
)
def test_a_run_resumes_and_leaves_only_what_it_trained(name, tmp_path):
  method, optimizer = METHODS[name], optim.adamw
  if name == 'dept':
    rates = {'encoder/offset/*': 0.001}
    optimizer = functools.partial(optim.grouped, learning_rates=rates)

  def run(where):
    return tiny.run(
      tmp_path / where,
      method=method,
      optimizer=optimizer,
      train_steps=4,
      checkpoint_period=2,
      eval_split=None,
    )

  whole = run('whole')
  shutil.copytree(tmp_path / 'whole', tmp_path / 'parts')
  for newer in (tmp_path / 'parts').glob('*/*4*'):
    (shutil.rmtree if newer.is_dir() else os.remove)(newer)
  parts = run('parts')
  same = jax.tree.map(
    lambda a, b: np.array_equal(a, b), whole.trainable, parts.trainable
  )
  assert all(jax.tree.leaves(same))
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(tiny.CONFIG, method, mesh)
  source = open_checkpoint(tmp_path / 'whole')
  assert source.shapes == {
    path: x.shape for path, x in plan.select(plan.trainable).items()
  }
  if name == 'full':
    assert not (tmp_path / 'whole' / 'prompts').exists()
    return
  # The file for other programs has the same parameters, folded.
  trained = parameters.flatten(jax.device_get(whole.trainable))
  rows = with_rows(plan, open_checkpoint(tiny.base())).rows
  folded = method.fold(trained, rows) if method.fold else trained
  kind = 'npy' if method.prompt else 'safetensors'
  file = tmp_path / 'whole' / 'prompts' / f'step_4.{kind}'
  facts = json.loads(file.with_suffix('.json').read_text())
  assert (facts['step'], facts['method']) == (4, method.name)
  other = tmp_path / 'parts' / 'prompts' / file.name
  assert file.read_bytes() == other.read_bytes()
  if method.prompt:
    np.testing.assert_array_equal(np.load(file), folded[method.prompt])
    return
  tensors, _ = open_file(file)
  assert set(tensors) == set(folded)
  for path, leaf in tensors.items():
    np.testing.assert_array_equal(leaf.read(), folded[path], err_msg=path)
  # As PROMPT_FILE, the method that results from folding reads it.
  simple = METHODS['prefix'] if name == 'prefix, mlp' else method
  plan = parameters.plan(tiny.CONFIG, simple, mesh)
  trained = Trained(checkpoint_path=tiny.base(), prompt_file=file)
  trained_model.check(plan, trained)
  values, step = trained_model.load(plan, trained)
  assert step == 4
  flat = parameters.flatten(values)
  for path, x in folded.items():
    np.testing.assert_array_equal(flat[path], x, err_msg=path)


@pytest.fixture(scope='module')
def lora_run(tmp_path_factory):
  """Trains LoRA and the norms; returns the run and its parameters."""
  path = tmp_path_factory.mktemp('lora') / 'run'
  state = tiny.run(
    path,
    method=METHODS['lora+norms'],
    optimizer=functools.partial(optim.adamw, learning_rate=0.1),
    train_steps=2,
    eval_split=None,
  )
  return path, parameters.flatten(jax.device_get(state.trainable))


@pytest.mark.parametrize(
  'layout', [pytest.param('t5x', marks=pytest.mark.slow), 'huggingface']
)
def test_an_exported_model_answers_as_the_run(lora_run, layout, tmp_path):
  path, trained = lora_run
  out = tmp_path / 'merged'
  arguments = ['export', f'--prompt={path}', f'--format={layout}']
  assert cli.main([*arguments, f'--output={out}']) == 0
  source = open_checkpoint(out)
  assert source.step == 8 + 2  # Steps of the base and the run.
  plain = network.Transformer(tiny.CONFIG)
  merged = restore(source, structure.parameters(plain))
  base = restore(open_checkpoint(tiny.base()), structure.parameters(plain))
  net = network.Transformer(tiny.CONFIG, METHODS['lora+norms'].placements)
  batch = make_batch([16, 9, 1], [4, 3, 1], 16, 6)
  want = logits_of(net, parameters.unflatten({**base, **trained}), batch)
  got = logits_of(plain, parameters.unflatten(merged), batch)
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
  before = logits_of(plain, parameters.unflatten(base), batch)
  assert np.abs(before - want).max() > 0.1


def test_export_refuses_what_cannot_be(lora_run, tmp_path, capsys):
  path, _ = lora_run
  file = path / 'prompts' / 'step_2.safetensors'
  other = tiny.make_base(tmp_path / 'other', seed=1)
  for arguments, says in (
    (['--format=peft'], 'a method that is not a prompt'),
    (['--format=t5x', f'--base={other}'], 'was trained on a model of finger'),
  ):
    out = tmp_path / 'out'
    command = ['export', f'--prompt={file}', f'--output={out}', *arguments]
    assert cli.main(command) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()
  copy = tmp_path / 'prefix.safetensors'
  shutil.copy(file, copy)
  copy.with_suffix('.json').write_text('{"method": "prefix"}')
  command = ['export', f'--prompt={copy}', '--format=t5x', '--output=x']
  assert cli.main(command) == 2
  assert 'cannot be merged. Use the file as PROMPT_FILE' in (
    capsys.readouterr().err
  )


def test_a_run_without_a_prompt_can_be_inspected(lora_run, capsys):
  path, trained = lora_run
  assert cli.main(['inspect', str(path), '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['method'] == 'lora+norms'
  assert found['parameters'] == sum(x.size for x in trained.values())


def test_other_settings_than_those_of_the_file_are_refused(lora_run):
  path, _ = lora_run
  file = path / 'prompts' / 'step_2.safetensors'
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  other = adapters.combine([lora.lora(2, alpha=7), norms.norms()])
  for method, says in (
    (other, 'was trained with the settings'),
    (lora.lora(2, alpha=6), 'was trained with the settings'),
    (METHODS['lora+norms'], None),
  ):
    plan = parameters.plan(tiny.CONFIG, method, mesh)
    if says is None:
      trained_model.load(
        plan, Trained(checkpoint_path=tiny.base(), prompt_file=file)
      )
      continue
    with pytest.raises(ValueError, match=says):
      trained_model.load(
        plan, Trained(checkpoint_path=tiny.base(), prompt_file=file)
      )
  with pytest.raises(ValueError, match='holds a run that is not this one'):
    tiny.run(path, method=other, optimizer=optim.adamw, eval_split=None)


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
  ('call', 'says'),
  [
    (lambda: lora.lora(0), 'rank of LoRA is 0'),
    (lambda: lora.lora(2.0), 'rank of LoRA is 2.0; .* a whole number'),
    (lambda: lora.lora(sites=['q']), r"\['q'\]; choose at least one of"),
    (lambda: lora.lora(sites=[]), 'choose at least one of'),
    (lambda: prefix.prefix(0), 'PROMPT_LENGTH is 0'),
    (lambda: prefix.prefix(attentions=['x']), 'choose at least one of'),
    (lambda: prefix.prefix(hidden=0), 'hidden is 0'),
    (lambda: prefix.prefix(hidden=8, init=print), 'leave one of the two out'),
    (lambda: per_layer.per_layer(combine='x'), "combine is 'x'"),
    (lambda: bottleneck.bottleneck(0), 'size is 0'),
    (lambda: bottleneck.bottleneck(place='x'), "place 'x' is not one of"),
    (lambda: adapters.combine([]), 'one at least'),
    (
      lambda: adapters.combine([prompt.prompt(3), per_layer.per_layer(3)]),
      r"taken twice: \[\('encoder/embed', 'prompt'\)\]",
    ),
    (lambda: methods.make('nosuch'), "no method 'nosuch'; there are"),
  ],
)
def test_errors_name_the_choices(call, says):
  with pytest.raises(ValueError, match=says):
    call()


@each
def test_a_method_is_made_again_from_its_name_and_settings(name):
  method = METHODS[name]
  settings = json.loads(json.dumps(dict(method.settings)))
  assert settings == method.settings
  again = methods.make(method.name, settings)
  assert again.settings == method.settings
  assert (again.merge is None) == (method.merge is None)


# ---------------------------------------------------------------------- list


def test_the_list_counts_as_the_whole_network():
  config = dataclasses.replace(TINY, num_encoder_layers=3)
  base = structure.parameters(network.Transformer(config))
  for name in ('lora', 'norms', 'per_layer', 'prefix'):
    method = METHODS[name]
    net = network.Transformer(config, method.placements)
    trained = sum(
      math.prod(x.shape)
      for path, x in structure.parameters(net).items()
      if method.trains(path)
    )
    whole = sum(math.prod(x.shape) for x in base.values())
    assert list_methods.counts(config, method) == (trained, whole), name


def test_the_list_has_a_column_for_each_size(capsys):
  sizes = ['--size=t5_1_1_small', '--size=t5_1_1_xxl']
  assert cli.main(['methods', 'prompt', 'lora', *sizes]) == 0
  table = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert table == [
    ['method', 't5_1_1_small', 't5_1_1_xxl'],
    ['prompt', '51,200', '0.0665%', '409,600', '0.00368%'],
    ['lora', '344,064', '0.447%', '9,437,184', '0.0847%'],
  ]
  assert cli.main(['methods', '--size=t5_1_1_bas']) == 2
  assert 'did you mean t5_1_1_base' in capsys.readouterr().err


def test_the_page_of_methods_counts_right():
  text = (pathlib.Path(__file__).parents[1] / 'docs' / 'methods.md').read_text()
  rows = re.findall(
    r'^\| (\w+) \| `methods/(\w+).gin` \| ([\d,]+) \|', text, re.M
  )
  told = {name: int(count.replace(',', '')) for name, _, count in rows}
  assert all(name == file for name, file, _ in rows)
  assert told == {
    name: list_methods.counts(sizes.SIZES['t5_1_1_base'], function())[0]
    for name, function in methods.functions().items()
  }
