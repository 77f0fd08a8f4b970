"""Layers in a loop: equal numbers, a smaller program, and T5X's names."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ptune.convert.fingerprint import of_params
from ptune.data import device_feed
from ptune.methods import decoder_prompt, full, ia3, lora, per_layer, prompt
from ptune.methods import prefix as prefix_lib
from ptune.model import (
  adapters,
  frozen_weights,
  model_info,
  models,
  network,
  parameters,
  partitioning,
  scan,
  sizes,
)
from ptune.training import optim
from ptune.training import state as state_lib
from tests import tiny
from tests.network_test import make_batch, random_params

pytestmark = pytest.mark.slow

CONFIG = sizes.T5Config(
  vocab_size=128,
  emb_dim=32,
  num_heads=4,
  head_dim=8,
  mlp_dim=64,
  num_encoder_layers=3,
  num_decoder_layers=1,
)
METHODS = {
  'prompt': prompt.prompt(5),
  'lora': lora.lora(2),
  'prefix': prefix_lib.prefix(3),
  'ia3': ia3.ia3(),
  'per_layer': per_layer.per_layer(3),
  'full': full.full(),
}
BATCH = make_batch([16, 9, 1, 16, 12, 3, 7, 16], [10, 4, 1, 10, 2, 10, 5, 3])


def plan_of(name, mesh='1x1', **changes):
  rows, parts = map(int, mesh.split('x'))
  return parameters.plan(
    dataclasses.replace(CONFIG, **changes),
    METHODS[name],
    partitioning.make_mesh(parts, jax.devices()[: rows * parts]),
  )


@functools.cache
def values(name):
  """Returns nonzero parameters of a method and the base, on the host."""
  plan = plan_of(name)
  rng = np.random.default_rng(0)
  return {
    path: np.asarray(x) + rng.normal(size=x.shape, scale=0.02).astype('float32')
    for path, x in parameters.initialize(plan, plan.params, seed=0).items()
  }


def train(name, mesh='1x1', steps=10, **changes):
  """Trains; returns the trained parameters and the sums of the first step."""
  plan = plan_of(name, mesh, **changes)
  model = models.EncoderDecoderModel(
    plan.network, loss_normalizing_factor='NUM_REAL_TARGET_TOKENS'
  )
  tx = optim.adafactor(1_100_000, learning_rate=0.01)
  abstract = state_lib.abstract_state(tx, plan)
  step = state_lib.compile_step(model, tx, plan, abstract)
  placed = {
    path: parameters.place(values(name)[path], x)
    for path, x in plan.params.items()
  }
  trained = {path: placed.pop(path) for path in plan.trainable}
  frozen = parameters.unflatten(frozen_weights.freeze(plan, placed))
  state = state_lib.first_state(tx, parameters.unflatten(trained), abstract)
  batch = device_feed.device_put(BATCH, plan.mesh)
  sums = []
  with plan.scope():
    for _ in range(steps):
      state, metrics = step(state, frozen, batch)
      sums.append(jax.device_get(metrics))
  return parameters.flatten(jax.device_get(state.trainable)), sums[0]


trained_once = functools.cache(train)


def assert_same(got, want):
  for path, value in want[0].items():
    np.testing.assert_allclose(got[0][path], value, atol=1e-5, err_msg=path)
  for name, value in want[1].items():
    np.testing.assert_allclose(got[1][name], value, rtol=1e-5, err_msg=name)


# ------------------------------------------------------------ the same numbers


@pytest.mark.parametrize('name', METHODS)
def test_ten_steps_end_as_without_the_loop(name):
  assert_same(train(name, scan=True, remat=True), train(name))


@pytest.mark.parametrize('frozen_dtype', [None, 'int8'])
@pytest.mark.parametrize('scans', [False, True])
def test_split_and_small_weights_change_no_number(frozen_dtype, scans):
  """FSDP with and without int8, and with and without the loop."""
  how = {'steps': 3, 'frozen_dtype': frozen_dtype}
  got = train('lora', '2x4', fsdp=True, scan=scans, remat=scans, **how)
  assert_same(got, trained_once('lora', **how))


@pytest.mark.parametrize('beams', [1, 3])
@pytest.mark.parametrize(
  'method', [prefix_lib.prefix(3), decoder_prompt.decoder_prompt(4)]
)
def test_answers_are_the_same(method, beams):
  answers = []
  for scans in (False, True):
    config = dataclasses.replace(CONFIG, scan=scans)
    net = network.Transformer(config, method.placements)
    model = models.EncoderDecoderModel(net)
    predict = functools.partial(
      model.predict,
      max_decode_length=6,
      decoding=models.Decoding(num_beams=beams),
    )
    tokens = BATCH['encoder_input_tokens']
    answers.append(jax.jit(predict)(random_params(net), tokens))
  (tokens, scores), (scanned, scanned_scores) = answers
  np.testing.assert_array_equal(scanned, tokens)
  np.testing.assert_allclose(scanned_scores, scores, atol=1e-4)


def test_what_is_sown_in_layers_is_stacked():
  sown = []
  for scans in (False, True):
    config = dataclasses.replace(CONFIG, scan=scans)
    net = network.Transformer(config, METHODS['ia3'].placements)
    model = models.EncoderDecoderModel(net)
    _, found = net.apply(
      model.variables(random_params(net)),
      BATCH['encoder_input_tokens'],
      enable_dropout=False,
      method='encode',
      mutable=['intermediates'],
    )
    sown.append(found['intermediates']['encoder'])
  one, together = sown
  for i in range(CONFIG.num_encoder_layers):
    np.testing.assert_allclose(
      together[scan.LAYERS]['attention']['key_site'][0][i],
      one[f'layers_{i}']['attention']['key_site'][0],
      atol=1e-5,
    )


@pytest.mark.slow
def test_a_run_leaves_the_same_and_either_goes_on_with_the_other(tmp_path):
  def run(name, scans, steps):
    config = dataclasses.replace(tiny.CONFIG, scan=scans, remat=scans)
    tiny.run(
      tmp_path / name,
      config=config,
      mixture_or_task_name='tiny',
      eval_period=6,
      train_steps=steps,
    )

  run('one', False, 12)
  run('loop', True, 6)
  run('loop', False, 8)
  run('loop', True, 12)
  one, loop = (tiny.files(tmp_path / name) for name in ('one', 'loop'))
  for file in ('model-info.txt', 'run.json'):
    assert one[file] == loop[file]
  prompts = (
    np.load(tmp_path / name / 'prompts' / 'step_12.npy')
    for name in ('one', 'loop')
  )
  np.testing.assert_allclose(*prompts, atol=1e-5)


# ---------------------------------------------------------- a smaller program


def test_the_program_and_its_memory_are_smaller():
  sizes_of, loops = {}, {}
  for scans in (False, True):
    plan = plan_of(
      'prompt',
      num_encoder_layers=6,
      num_decoder_layers=6,
      scan=scans,
      remat=True,
    )
    model = models.EncoderDecoderModel(plan.network)
    tx = optim.adafactor(1)
    abstract = state_lib.abstract_state(tx, plan)
    step = state_lib.compile_step(model, tx, plan, abstract)
    frozen = parameters.unflatten(frozen_weights.shapes(plan))
    program = step.lower(abstract, frozen, BATCH).compile()
    text = program.as_text()
    loops[scans] = text.count(' while(')
    memory = program.memory_analysis().temp_size_in_bytes
    sizes_of[scans] = len(text), memory
  # Forward and backward loops of both stacks. The compiler adds a few loops.
  assert loops[True] >= loops[False] + 4
  for loop, one in zip(sizes_of[True], sizes_of[False], strict=True):
    assert loop < 0.6 * one


# --------------------------------------------------------------- names outside


def test_layers_are_stacked_in_their_order():
  paths = [f'encoder/layers_{i}/mlp/wo/kernel' for i in (10, 2, 0, 1)]
  (group,) = scan.groups([*paths, 'encoder/encoder_norm/scale']).items()
  assert group == (
    'encoder/layers_*/mlp/wo/kernel',
    [f'encoder/layers_{i}/mlp/wo/kernel' for i in (0, 1, 2, 10)],
  )


@pytest.mark.parametrize('name', METHODS)
def test_outside_of_the_program_all_is_named_as_without(name):
  plain, scanned = plan_of(name), plan_of(name, scan=True)
  assert plain.params == scanned.params
  assert plain.axes == scanned.axes
  assert model_info.table(plain) == model_info.table(scanned)
  assert parameters.identity(plain) == parameters.identity(scanned)
  drawn = (
    parameters.initialize(plan, plan.adapters, seed=3)
    for plan in (plain, scanned)
  )
  jax.tree.map(np.testing.assert_array_equal, *drawn)


@pytest.mark.parametrize('frozen_dtype', ['bfloat16', 'int8'])
def test_held_weights_are_stacked_and_take_no_more_room(frozen_dtype):
  changes = {'fsdp': True, 'frozen_dtype': frozen_dtype}
  plain = plan_of('lora', '4x2', **changes)
  plan = plan_of('lora', '4x2', scan=True, **changes)
  placed = {
    path: parameters.place(values('lora')[path], x)
    for path, x in plan.select(plan.frozen).items()
  }
  print_of = of_params(placed)
  assert print_of == of_params(
    {
      path: parameters.place(values('lora')[path], x)
      for path, x in plain.select(plain.frozen).items()
    }
  )
  held, structs = (
    frozen_weights.freeze(plan, placed),
    frozen_weights.shapes(plan),
  )
  assert not placed, 'the caller keeps no second copy'
  assert held.keys() == structs.keys()
  for path, x in structs.items():
    assert (held[path].shape, held[path].dtype) == (x.shape, x.dtype)
    assert held[path].sharding.is_equivalent_to(x.sharding, x.ndim)
  nbytes = [
    sum(map(model_info.nbytes, frozen_weights.shapes(p).values()))
    for p in (plain, plan)
  ]
  assert nbytes[0] == nbytes[1]
  name = 'encoder/layers_*/mlp/wo/kernel'
  assert structs[name].shape == (3, 64, 32)
  assert {s.data.shape for s in held[name].addressable_shards} == {(3, 32, 8)}


def test_single_layers_are_refused_before_anything_is_made():
  class Nothing(network.nn.Module):
    def __call__(self, x, y):
      return y

  single = adapters.Method(
    'mine',
    (adapters.Placement('encoder/layers_1/mlp', 'mine', Nothing),),
    ('token_embedder/*',),
  )
  some = adapters.Method('some', (), ('encoder/layers_0/*',))
  config = dataclasses.replace(CONFIG, scan=True)
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  with pytest.raises(ValueError, match=r"lack: \['encoder/layers_1/mlp'\]"):
    parameters.plan(config, single, mesh)
  with pytest.raises(ValueError, match="'some' trains some of them only"):
    parameters.plan(config, some, mesh)
  for method in (single, some):
    parameters.plan(CONFIG, method, mesh)
