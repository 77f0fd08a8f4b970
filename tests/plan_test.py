"""Memory plans agree with real arrays, and extrapolation with full depth.

All measurements use networks that are a few thousand numbers wide.
"""

import dataclasses
import math

import jax
import pytest

from ptune.methods import full, prompt
from ptune.model import network, parameters, partitioning, sizes, structure
from ptune.model.models import EncoderDecoderModel
from ptune.model.t5gemma_sizes import Stack, T5GemmaConfig
from ptune.tools import plan as fit
from ptune.tools.memory import (
  Memory,
  Workload,
  at_depth,
  depths,
  measure,
  memory_of,
)
from ptune.training import optim
from ptune.training import state as state_lib

CONFIG = sizes.T5Config(
  vocab_size=512,
  emb_dim=64,
  num_heads=4,
  head_dim=16,
  mlp_dim=128,
  num_encoder_layers=1,
  num_decoder_layers=1,
)
RUN = Workload(
  config=CONFIG,
  method=prompt.prompt(8),
  optimizer=optim.adafactor,
  model=EncoderDecoderModel,
  feature_lengths={'inputs': 32, 'targets': 8},
  batch_size=16,
)


def with_layers(encoder, decoder, **changes):
  config = dataclasses.replace(
    CONFIG, num_encoder_layers=encoder, num_decoder_layers=decoder, **changes
  )
  return dataclasses.replace(RUN, config=config)


def bytes_on(device, tree):
  shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
  return sum(s.data.nbytes for s in shards if s.device == device)


@pytest.mark.parametrize(
  ('method', 'fsdp'),
  [(prompt.prompt(8), False), (prompt.prompt(8), True), (full.full(), False)],
)
def test_what_is_held_is_what_a_run_would_put_there(method, fsdp):
  config = dataclasses.replace(CONFIG, fsdp=fsdp)
  run = dataclasses.replace(RUN, config=config, method=method)
  mesh = partitioning.make_mesh(4)
  one = partitioning.make_mesh(1, jax.devices()[:1])
  planned = memory_of(run, parameters.plan(config, method, one).on(mesh), 0)

  plan = parameters.plan(config, method, mesh)
  params = parameters.initialize(plan, plan.params, seed=0)
  tx = optim.adafactor()
  state = state_lib.first_state(
    tx,
    parameters.unflatten({p: params[p] for p in plan.trainable}),
    state_lib.abstract_state(tx, plan),
  )
  for device in (jax.devices()[0], jax.devices()[-1]):
    frozen = {p: params[p] for p in plan.frozen}
    assert planned.frozen == bytes_on(device, frozen)
    assert planned.trainable == bytes_on(device, state.trainable)
    assert planned.optimizer == bytes_on(device, state.opt_state)


@pytest.mark.slow
def test_extrapolation_equals_compiling_every_layer():
  run = with_layers(4, 4)
  devices = jax.devices()[:1]
  estimated = measure(run, devices)
  compiled = measure(run, devices, extrapolate=False)
  assert depths(run.config, run.method)[0] == (2, 2)
  for parts, memory in compiled.items():
    assert estimated[parts].exact == memory.exact
    assert estimated[parts].temporary == pytest.approx(
      memory.temporary, rel=0.03
    )


NARROW = T5GemmaConfig(
  Stack(1, 64, 128, 4, 2, 16, window=8),
  Stack(1, 32, 64, 4, 2, 8, window=8),
  vocab_size=512,
)


@pytest.mark.parametrize(
  ('config', 'widths'),
  [
    (dataclasses.replace(CONFIG, relative_attention_per_layer=True), '64'),
    (dataclasses.replace(CONFIG, local_radius=8, global_block_size=4), '64'),
    (NARROW, '64 + 32'),
    (dataclasses.replace(NARROW, version=2, decoder=NARROW.encoder), '64'),
  ],
  ids=['umt5', 'long_t5', 't5gemma', 't5gemma_2'],
)
def test_every_family_is_planned(config, widths):
  run = dataclasses.replace(RUN, config=config)
  table = measure(run, jax.devices()[:2])
  params = structure.parameters(network.Transformer(config))
  one, two = table[1], table[2]
  assert one.frozen == 4 * sum(math.prod(x.shape) for x in params.values())
  assert 0.5 * one.frozen <= two.frozen < 0.6 * one.frozen
  assert one.temporary > 0
  text, _ = fit.describe(run, table, 2, 'v5e')
  assert text.startswith(f'prompt, 1 + 1 layers of {widths}, float32; a batch')
  assert 'best: --gin.MODEL_PARALLEL=1' in text


def test_encoder_and_decoder_are_continued_each_by_itself():
  config = with_layers(12, 4).config
  sizes = depths(config, RUN.method)
  assert sizes == [(2, 2), (3, 2), (2, 3)]
  values = [100 + 10 * encoder + 7 * decoder for encoder, decoder in sizes]
  assert at_depth((12, 4), sizes, values) == 100 + 120 + 28


def test_every_mesh_is_measured_or_said_to_be_impossible():
  run = dataclasses.replace(RUN, batch_size=6)
  table = measure(run, jax.devices()[:4])
  assert list(table) == [1, 2, 4]
  assert table[1] == 'BATCH_SIZE 6 (MICROBATCHES 1) is not divisible by 4'
  # With more parts, each device holds less of the weights.
  assert table[2].frozen > table[4].frozen


def test_microbatches_need_less_room():
  whole = measure(RUN, jax.devices()[:1])[1]
  parts = measure(dataclasses.replace(RUN, microbatches=4), jax.devices()[:1])[
    1
  ]
  assert parts.temporary < 0.6 * whole.temporary
  assert parts.exact == whole.exact


def test_packed_rows_need_room_for_several_examples():
  one, two = (
    measure(dataclasses.replace(RUN, pack=n), jax.devices()[:1])[1]
    for n in (1, 2)
  )
  assert two.temporary > 1.8 * one.temporary
  assert two.exact == one.exact


@pytest.mark.parametrize(
  ('gigabytes', 'expected'),
  [((10, 2), 'yes'), ((10, 8), 'perhaps'), ((16, 0), 'no'), ((10, 30), 'no')],
)
def test_the_verdict_is_sure_only_where_the_estimate_allows(
  gigabytes, expected
):
  frozen, temporary = (int(n * 1e9) for n in gigabytes)
  memory = Memory(frozen, 0, 0, temporary)
  assert fit.verdict(memory, 'v5e') == expected
  if expected == 'perhaps':
    assert fit.verdict(memory, 'v5e', exact=True) == 'no'


def test_the_best_mesh_is_the_least_split_one_that_fits():
  def table(*gigabytes):
    return {
      m: Memory(int(n * 1e9), 0, 0, 0)
      for m, n in zip((1, 2, 4), gigabytes, strict=True)
    }

  assert fit.describe(RUN, table(20, 14, 8), 4, 'v5e')[1] == 2
  assert fit.describe(RUN, table(20, 19, 18), 4, 'v5e')[1] is None
  assert fit.describe(RUN, table(20, 19, 18), 4, 'h100')[1] == 1
  text, best = fit.describe(RUN, table(20, 14, 8), 4, None)
  assert best == 4 and 'v5e' in text and 'h200' in text


def test_a_mesh_that_the_compiler_refuses_is_one_that_does_not_fit():
  table = {1: fit.TOO_LARGE, 2: Memory(int(9e9), 0, 0, 0)}
  text, best = fit.describe(RUN, table, 8, 'v5e', exact=True)
  assert best == 2 and '8 x 1' in text and fit.TOO_LARGE in text
  text, best = fit.describe(RUN, {1: fit.TOO_LARGE}, 8, 'v5e', exact=True)
  assert best is None and 'no mesh fits v5e' in text


def test_unknown_accelerators_are_refused_by_name():
  with pytest.raises(ValueError, match='v5e'):
    fit.plan(8, 'tpu5')


def test_when_nothing_fits_the_options_that_would_are_named(monkeypatch):
  def memory(run, devices, enough, accelerator):
    del devices, enough, accelerator
    return {1: Memory(int(8e9 if run.config.fsdp else 40e9), 0, 0, 0)}

  monkeypatch.setattr(fit, 'measure', memory)
  again, fsdp, both = fit.suggest(RUN, [], 'v5e').splitlines()
  assert again == (
    'with --gin.REMAT=True --gin.SCAN=True: no mesh fits v5e (17.2 GB).'
  )
  best = (
    'best: --gin.MODEL_PARALLEL=1, the mesh with the fewest parts that fits v5e'
  )
  assert fsdp == f'with --gin.FSDP=True: {best} (8.0 GB of 17.2 GB).'
  assert both.startswith(
    f'with --gin.REMAT=True --gin.SCAN=True --gin.FSDP=True: {best}'
  )
  on = dataclasses.replace(CONFIG, remat=True, scan=True)
  left = fit.suggest(dataclasses.replace(RUN, config=on), [], 'v5e')
  assert left == fsdp
  full = dataclasses.replace(on, fsdp=True)
  assert not fit.suggest(dataclasses.replace(RUN, config=full), [], 'v5e')


def test_what_is_set_already_is_not_advised():
  def advice(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    table = {1: Memory(int(40e9), 0, 0, 0)}
    return fit.describe(
      dataclasses.replace(RUN, config=config), table, 1, 'v5e'
    )[0]

  assert 'DTYPE' in advice('float32')
  assert 'DTYPE' not in advice('bfloat16')


@pytest.mark.slow
def test_a_loop_is_measured_whole_and_needs_less_room():
  def temporary(**changes):
    run = with_layers(6, 6, **changes)
    return measure(run, jax.devices()[:1])[1].temporary

  assert depths(with_layers(6, 6, scan=True).config, RUN.method) == [(6, 6)]
  assert temporary(remat=True, scan=True) < 0.6 * temporary()


def test_the_tpus_own_compiler_is_asked_where_it_can_be(monkeypatch):
  class Asked(Exception):
    pass

  def asked(*args):
    raise Asked(*args)

  monkeypatch.setattr(fit.tpu_compiler, 'devices', asked)
  monkeypatch.setattr(fit, 'fake_devices', lambda count: asked(count, 'cpu'))

  def compiler(*args):
    with pytest.raises(Asked) as found:
      fit.plan(*args)
    return found.value.args

  monkeypatch.setattr(fit.tpu_compiler, 'available', lambda: True)
  assert compiler(8, 'v5e') == ('v5e', 8)
  assert compiler(32, 'v7x') == ('v7x', 32)
  assert compiler(8, 'v5e', 'cpu') == (8, 'cpu')
  assert compiler(8, 'h100') == compiler(8) == (8, 'cpu')
  assert compiler(3, 'v5e') == (3, 'cpu')
  monkeypatch.setattr(fit.tpu_compiler, 'available', lambda: False)
  assert compiler(8, 'v5e') == (8, 'cpu')
  assert compiler(8, 'v5e', 'tpu') == ('v5e', 8)
  for other in (None, 'h100'):
    with pytest.raises(ValueError, match=f'needs a TPU.*v6e.*got {other!r}'):
      fit.plan(8, other, 'tpu')


def test_a_steps_time_gives_tokens_a_second_and_chip_hours():
  run = dataclasses.replace(RUN, train_steps=9000)
  memory = Memory(1, 1, 1, 10, decoding=20, seconds=0.5)
  assert memory.total == 23  # A step and decoding do not overlap.
  text = fit.describe_time(run, memory, 'v5e', 8)
  # 16 rows of 32 and 8 tokens; 9,000 steps of half a second on eight chips.
  assert '500 ms, 1,280 tokens a second' in text
  assert '9,000 steps: 10.00 chip-hours of v5e' in text
  assert 'not a measurement' in text
  # A v7x chip has two devices.
  other = fit.describe_time(run, memory, 'v7x', 8)
  assert '5.00 chip-hours of v7x' in other
  assert 'clock of v7x is assumed' in other and 'assumed' not in text
  short = dataclasses.replace(memory, seconds=4.2e-4)
  assert 'a step: 0.42 ms' in fit.describe_time(run, short, 'v5e', 8)
  table, _ = fit.describe(run, {1: memory}, 8, 'v5e', exact=True)
  assert 'decoding' in table and '20 bytes' in table
  # The search ends with the first mesh that fits, also with eight devices.
  assert '8 x 1' in table and 'each of 8 devices' in table
  assert not fit.describe_time(run, Memory(1, 1, 1, 1), 'v5e', 8)
