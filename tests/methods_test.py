"""What every method promises; the modules of ptune/methods are found here."""

import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ptune import (
  adapters,
  methods,
  network,
  optim,
  parameters,
  partitioning,
  predictor,
)
from ptune import state as state_lib
from ptune.convert import open_checkpoint
from ptune.convert.safetensors_files import open_file
from ptune.methods import (
  bottleneck,
  ia3,
  lora,
  norms,
  per_layer,
  prefix,
  prompt,
)
from ptune.models import EncoderDecoderModel
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
# Sizes for a tiny model, where a method has such an argument.
SMALL = {'length': 3, 'hidden': 8, 'size': 4, 'rank': 2, 'bottleneck': 4}
SMALL |= {'vocab_size': 128, 'tasks': 126}  # Any first token is a task.


def small(function, **changes):
  """A method with small sizes, and its defaults otherwise."""
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
  'lora+norms': adapters.combine([lora.lora(2, alpha=6), norms.norms()]),
}
IDENTITY = ['full', 'ia3', 'norms', 'lora', 'bottleneck']
IDENTITY += ['bottleneck, parallel', 'lora, everywhere', 'norms, bias']
each = pytest.mark.parametrize('name', METHODS)
# For what has to be compiled.
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
  """The base at random, and what the method adds as it starts."""
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
  assert set(network.parameters(net)) == {*base, *part('param')}
  assert set(filter(method.trains, network.parameters(net))) == set(
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
  """Not compiled: the operations of one method are those of the next."""
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


@several
def test_a_step_changes_what_is_trained_and_is_the_same_when_sharded(name):
  mesh = partitioning.make_mesh(2)
  plan = parameters.plan(SHALLOW, METHODS[name], mesh)
  model = EncoderDecoderModel(plan.network)
  tx = optax.sgd(0.01)  # Adam would enlarge the rounding of small gradients.
  batch = make_batch([16, 9, 1, 7] * 2, [4, 3, 1, 2] * 2, 16, 6)
  values = parameters.flatten(first_values(name))
  # The first step does not move what is multiplied by zeros.
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

  # On one device and not compiled: see `logits_of`.
  state, frozen = state_and_frozen(lambda path: jnp.asarray(values[path]))
  one, sums = state_lib.train_step(model, tx, state, frozen, batch)
  one = parameters.flatten(one.trainable)
  idle = {p for p, x in one.items() if np.array_equal(x, values[p])}
  # The reference has that prompt, although layer 0 replaces it.
  assert idle == ({prompt.PATH} if name == 'per_layer, replace' else set())

  like = state_lib.abstract_state(tx, plan)
  update = state_lib.compile_step(model, tx, plan, like)
  state, frozen = state_and_frozen(
    lambda path: parameters.place(np.asarray(values[path]), plan.params[path])
  )
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, like))
  jax.config.update('jax_disable_most_optimizations', True)
  with plan.scope():
    many, sharded_sums = update(state, frozen, batch)
  jax.config.update('jax_disable_most_optimizations', False)
  np.testing.assert_allclose(sharded_sums['loss'], sums['loss'], rtol=1e-5)
  for path, x in parameters.flatten(many.trainable).items():
    np.testing.assert_allclose(x, one[path], atol=1e-5, err_msg=path)
  for path, x in parameters.flatten(frozen).items():
    np.testing.assert_array_equal(x, values[path], err_msg=path)


@each
def test_parameters_of_adapters_are_on_every_device(name):
  mesh = partitioning.make_mesh(2)
  plan = parameters.plan(SHALLOW, METHODS[name], mesh)
  for path, x in plan.select(plan.adapters).items():
    assert x.sharding.is_fully_replicated, path


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
  folded = made.fold(trained)
  base = {path: x for path, x in values.items() if path not in trained}
  names = set(filter(plain.trains, network.parameters(network_of('prefix'))))
  assert set(folded) == names
  batch = make_batch([16, 9, 1], [4, 3, 1], 16, 6)
  want = logits_of(
    network_of('prefix, mlp'), parameters.unflatten(values), batch
  )
  got = logits_of(
    network_of('prefix'), parameters.unflatten({**base, **folded}), batch
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


# ---------------------------------------------------------------------- runs


@several
def test_a_run_resumes_and_leaves_only_what_it_trained(name, tmp_path):
  method = METHODS[name]

  def run(where, steps):
    return tiny.run(
      tmp_path / where,
      method=method,
      optimizer=optim.adamw,
      train_steps=steps,
      eval_split=None,
    )

  whole = run('whole', 4)
  run('parts', 2)
  parts = run('parts', 4)
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
  # What is left for other programs: the same, folded.
  trained = parameters.flatten(jax.device_get(whole.trainable))
  folded = method.fold(trained) if method.fold else trained
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
  # And read again, as PROMPT_FILE, by the method that it is folded to.
  simple = METHODS['prefix'] if name == 'prefix, mlp' else method
  plan = parameters.plan(tiny.CONFIG, simple, mesh)
  predictor.check(plan, checkpoint_path=tiny.base(), prompt_file=file)
  values, step = predictor.load(
    plan, checkpoint_path=tiny.base(), prompt_file=file
  )
  assert step == 4
  flat = parameters.flatten(values)
  for path, x in folded.items():
    np.testing.assert_array_equal(flat[path], x, err_msg=path)
