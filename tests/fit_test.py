"""Memory plans: against arrays that were made, and extrapolation against all.

Everything is measured on networks a few thousand numbers wide.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from ptune import fit, network, optim, parameters, partitioning
from ptune import state as state_lib
from ptune.methods import full, prompt
from ptune.models import EncoderDecoderModel

CONFIG = network.T5Config(
  vocab_size=512,
  emb_dim=64,
  num_heads=4,
  head_dim=16,
  mlp_dim=128,
  num_encoder_layers=2,
  num_decoder_layers=2,
)
RUN = fit.Run(
  config=CONFIG,
  method=prompt.prompt(8),
  optimizer=optim.adafactor,
  model=EncoderDecoderModel,
  task_feature_lengths={'inputs': 32, 'targets': 8},
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


@pytest.mark.parametrize('method', [prompt.prompt(8), full.full()])
def test_what_is_held_is_what_a_run_would_put_there(method):
  run = dataclasses.replace(RUN, method=method)
  mesh = partitioning.make_mesh(4)
  one = partitioning.make_mesh(1, jax.devices()[:1])
  planned = fit._held(
    run, fit._on(parameters.plan(CONFIG, method, one), mesh), 0
  )

  plan = parameters.plan(CONFIG, method, mesh)
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


@pytest.mark.parametrize(
  'run', [with_layers(6, 6), with_layers(5, 4, dropout_rate=0.1)]
)
def test_extrapolation_equals_compiling_every_layer(run):
  devices = jax.devices()[:2]
  estimated = fit.measure(run, devices)
  compiled = fit.measure(run, devices, extrapolate=False)
  assert fit._depths(run.config, run.method)[0] == (2, 2)
  for parts, memory in compiled.items():
    assert estimated[parts].exact == memory.exact
    assert estimated[parts].temporary == pytest.approx(
      memory.temporary, rel=0.03
    )


def test_every_mesh_is_measured_or_said_to_be_impossible():
  run = dataclasses.replace(RUN, batch_size=12)
  table = fit.measure(run, jax.devices())
  assert list(table) == [1, 2, 4, 8]
  assert table[1] == 'BATCH_SIZE 12 (MICROBATCHES 1) is not divisible by 8'
  assert all(isinstance(table[m], fit.Memory) for m in (2, 4, 8))
  # More parts hold less of the weights each.
  assert table[2].frozen > table[4].frozen > table[8].frozen


def test_microbatches_need_less_room():
  whole = fit.measure(RUN, jax.devices()[:1])[1]
  parts = fit.measure(
    dataclasses.replace(RUN, microbatches=4), jax.devices()[:1]
  )[1]
  assert parts.temporary < 0.6 * whole.temporary
  assert parts.exact == whole.exact


@pytest.mark.parametrize(
  ('gigabytes', 'expected'),
  [((10, 2), 'yes'), ((10, 8), 'perhaps'), ((16, 0), 'no'), ((10, 30), 'no')],
)
def test_the_verdict_is_sure_only_where_the_estimate_allows(
  gigabytes, expected
):
  frozen, temporary = (int(n * 1e9) for n in gigabytes)
  memory = fit.Memory(frozen, 0, 0, temporary)
  assert fit.verdict(memory, 'v5e') == expected
  if expected == 'perhaps':
    assert fit.verdict(memory, 'v5e', exact=True) == 'no'


def test_the_best_mesh_is_the_least_split_one_that_fits():
  def table(*gigabytes):
    return {
      m: fit.Memory(int(n * 1e9), 0, 0, 0)
      for m, n in zip((1, 2, 4), gigabytes, strict=True)
    }

  assert fit.describe(RUN, table(20, 14, 8), 'v5e')[1] == 2
  assert fit.describe(RUN, table(20, 19, 18), 'v5e')[1] is None
  assert fit.describe(RUN, table(20, 19, 18), 'h100')[1] == 1
  text, best = fit.describe(RUN, table(20, 14, 8), None)
  assert best == 4 and 'v5e' in text and 'h200' in text


def test_the_largest_models_have_the_published_sizes():
  one = partitioning.make_mesh(1, jax.devices()[:1])
  for name, billions in (('t5_1_1_xxl', 11.135), ('mt5_xxl', 12.921)):
    config = network.t5(name, dtype='bfloat16')
    depth = fit._with_depth(config, (2, 2))
    plan = fit._on(parameters.plan(depth, RUN.method, one), one)
    small = sum(
      math.prod(x.shape) for p, x in plan.params.items() if p in plan.base
    )
    deeper = fit._with_depth(config, (3, 3))
    plan = parameters.plan(deeper, RUN.method, one)
    large = sum(
      math.prod(x.shape) for p, x in plan.params.items() if p in plan.base
    )
    total = fit._at_depth((24, 24), [(2, 2), (3, 3)], [small, large])
    assert total / 1e9 == pytest.approx(billions, abs=1e-3)
    assert jnp.dtype(config.dtype).itemsize == 2


def test_unknown_accelerators_are_refused_by_name():
  with pytest.raises(ValueError, match='v5e'):
    fit.plan(8, 'tpu5')
