"""Meshes give the same numbers, and weights are really split.

Losses agree even if no constraint is in force. So these tests also check the
constraints of the program and the shards of the arrays.
"""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ptune.convert import open_checkpoint, restore
from ptune.convert.fingerprint import of_params
from ptune.data import device_feed
from ptune.data.device_feed import device_put
from ptune.methods import full, prompt
from ptune.model import (
  attention,
  frozen_weights,
  models,
  parameters,
  partitioning,
  sizes,
)
from ptune.training import optim
from ptune.training import state as state_lib
from tests import tiny
from tests.network_test import SHALLOW, make_batch, nested

# (devices, devices that share one copy of the weights). SHALLOW has four heads,
# which cannot be split over eight devices.
MESHES = {'8x1': (8, 1), '4x2': (8, 2), '2x4': (8, 4), '1x8': (8, 8)}
ONE = '1x1'
meshes = pytest.mark.parametrize('mesh', MESHES)
# 32 rows: four microbatches of one row for each of eight devices.
TARGETS = [10, 4, 1, 10, 2, 10, 5, 3] * 4
BATCH = make_batch([16, 9, 1, 16, 12, 3, 7, 16] * 4, TARGETS)


@functools.cache
def plan_on(mesh, method='prompt', **changes):
  devices, model_parallel = MESHES.get(mesh, (1, 1))
  return parameters.plan(
    dataclasses.replace(SHALLOW, **changes),
    prompt.prompt(5) if method == 'prompt' else full.full(),
    partitioning.make_mesh(model_parallel, jax.devices()[:devices]),
  )


@functools.cache
def values(paths):
  """Returns random parameters on the host."""
  rng = np.random.default_rng(0)
  return {
    path: rng.standard_normal(x.shape, np.float32)
    * (x.shape[0] ** -0.5 if path.endswith('kernel') else 1)
    for path, x in plan_on(ONE).params.items()
    if path in paths
  }


def placed(plan, paths):
  host = values(frozenset(plan.params))
  return {
    path: parameters.place(host[path], plan.params[path])
    for path in plan.select(paths)
  }


def program(plan, **settings):
  """Compiles an update at Adafactor's first step."""
  model = models.EncoderDecoderModel(
    plan.network, loss_normalizing_factor='NUM_REAL_TARGET_TOKENS'
  )
  tx = optim.adafactor(1_100_000)
  abstract = state_lib.abstract_state(tx, plan)
  return (
    tx,
    abstract,
    state_lib.compile_step(model, tx, plan, abstract, **settings),
  )


@functools.cache
def update(mesh, method='prompt', **settings):
  """Runs a step; returns the trained parameters and the sums."""
  plan = plan_on(mesh, method)
  tx, abstract, step = program(plan, **settings)
  state = state_lib.first_state(
    tx, nested(placed(plan, plan.trainable)), abstract
  )
  frozen = nested(placed(plan, plan.frozen))
  with plan.scope():
    state, sums = step(state, frozen, device_put(BATCH, plan.mesh))
  return parameters.flatten(state.trainable), jax.device_get(sums)


def assert_same(got, want):
  """Compares trained parameters and sums."""
  for path, value in want[0].items():
    np.testing.assert_allclose(
      got[0][path], value, atol=1e-5, rtol=1e-5, err_msg=path
    )
  for name, value in want[1].items():
    np.testing.assert_allclose(got[1][name], value, rtol=1e-5, err_msg=name)


@meshes
def test_an_update_is_the_same_on_every_mesh(mesh):
  got, want = update(mesh), update(ONE)
  assert_same(got, want)
  assert got[1]['tokens'] == sum(TARGETS)
  (before,) = values(frozenset([prompt.PATH])).values()
  moved = want[0][prompt.PATH] - before
  assert np.sqrt(np.mean(moved**2)) > 0.1, 'nothing was trained'
  # Every process must be able to write the whole prompt.
  assert got[0][prompt.PATH].sharding.is_fully_replicated


def test_absorbed_kernels_may_lie_split(monkeypatch):
  want = update(ONE)
  monkeypatch.setattr(
    attention.Attention, '_absorbs', lambda self, q, kv: q is not kv
  )
  assert_same(update.__wrapped__('2x4'), want)


@pytest.mark.slow
def test_full_tuning_is_the_same_on_a_mesh():
  got = update('2x4', 'full')
  assert got[0].keys() == plan_on('2x4', 'full').params.keys()
  assert_same(got, update(ONE, 'full'))
  kernel = got[0]['encoder/layers_0/mlp/wi_0/kernel']
  assert kernel.sharding.spec == P(None, 'model')


def test_microbatches_change_nothing():
  assert_same(update('8x1', microbatches=4), update('8x1'))


@pytest.mark.parametrize('mesh', ['8x1', '4x2'])
def test_fully_sharded_weights_change_no_number(mesh):
  plan = plan_on(mesh, fsdp=True)
  tx, abstract, step = program(plan)
  state = state_lib.first_state(
    tx, nested(placed(plan, plan.trainable)), abstract
  )
  frozen = placed(plan, plan.frozen)
  with plan.scope():
    state, sums = step(state, nested(frozen), device_put(BATCH, plan.mesh))
  trained = parameters.flatten(state.trainable)
  assert_same((trained, jax.device_get(sums)), update(ONE))
  assert trained[prompt.PATH].sharding.is_fully_replicated
  whole = placed(plan_on(ONE), plan.frozen)
  assert of_params(frozen) == of_params(whole)


# ---------------------------------------------------------------------- shards


@pytest.mark.parametrize('mesh', ['8x1', '4x2'])
@pytest.mark.parametrize('frozen_dtype', [None, 'bfloat16', 'int8'])
def test_fully_sharded_matrices_lie_in_equal_parts(mesh, frozen_dtype):
  plan = plan_on(mesh, fsdp=True, frozen_dtype=frozen_dtype)
  held = frozen_weights.freeze(plan, placed(plan, plan.frozen))
  for path, struct in frozen_weights.shapes(plan).items():
    assert held[path].sharding.is_equivalent_to(struct.sharding, struct.ndim)
    assert held[path].dtype == struct.dtype
    if struct.ndim > 1 and not path.endswith('rel_embedding'):
      shards = held[path].addressable_shards
      assert {s.data.nbytes for s in shards} == {held[path].nbytes // 8}, path


def test_a_base_is_read_straight_into_equal_parts():
  plan = parameters.plan(
    dataclasses.replace(tiny.CONFIG, fsdp=True),
    prompt.prompt(3),
    partitioning.make_mesh(2),
  )
  source = open_checkpoint(tiny.base())
  whole = {path: leaf.read() for path, leaf in source.leaves.items()}
  for path, x in restore(source, plan.select(plan.base)).items():
    assert x.sharding == plan.params[path].sharding
    np.testing.assert_array_equal(x, whole[path])
    if x.ndim > 1 and not path.endswith('rel_embedding'):
      shards = x.addressable_shards
      assert {s.data.nbytes for s in shards} == {x.nbytes // 8}, path


@pytest.mark.parametrize(
  ('mesh', 'heads', 'joined_kv', 'mlp', 'vocab'),
  [
    ('8x1', 4, 32, 64, 128),
    ('4x2', 2, 16, 32, 64),
    ('2x4', 1, 8, 16, 32),
    # Four heads stay whole; the other axes are split over eight devices.
    ('1x8', 4, 4, 8, 16),
  ],
)
def test_weights_lie_split_over_the_devices(mesh, heads, joined_kv, mlp, vocab):
  arrays = placed(plan_on(mesh), plan_on(mesh).params)
  want = {
    'token_embedder/embedding': (vocab, 32),
    'decoder/logits_dense/kernel': (32, vocab),
    'encoder/layers_0/attention/query/kernel': (32, joined_kv),
    'encoder/layers_0/attention/out/kernel': (joined_kv, 32),
    'encoder/layers_0/mlp/wi_1/kernel': (32, mlp),
    'encoder/layers_0/mlp/wo/kernel': (mlp, 32),
    'encoder/relpos_bias/rel_embedding': (heads, 32),
    'encoder/encoder_norm/scale': (32,),
    prompt.PATH: (5, 32),
  }
  host = values(frozenset(arrays))
  for path, shape in want.items():
    shards = arrays[path].addressable_shards
    assert len({shard.device for shard in shards}) == 8
    for shard in shards:
      assert shard.data.shape == shape, path
      np.testing.assert_array_equal(shard.data, host[path][shard.index])


def test_initialised_weights_are_made_where_they_lie():
  plan = plan_on('2x4')
  path = 'encoder/layers_0/mlp/wi_0/kernel'
  made = parameters.initialize(plan, [path], seed=0)[path]
  assert made.sharding.is_equivalent_to(plan.params[path].sharding, 2)
  assert made.addressable_shards[0].data.shape == (32, 16)
  # The values are the same on another mesh.
  (other,) = parameters.initialize(plan_on('8x1'), [path], seed=0).values()
  np.testing.assert_array_equal(made, other)


def test_the_optimizers_moments_lie_like_their_parameters():
  plan = plan_on('2x4', 'full')
  abstract = state_lib.abstract_state(optim.adafactor(), plan)
  moments = [
    s.v
    for s in jax.tree.leaves(abstract, is_leaf=lambda s: hasattr(s, 'v'))
    if hasattr(s, 'v')
  ]
  assert len(moments) == 1
  for path, leaf in parameters.flatten(moments[0]).items():
    assert leaf.shape == plan.params[path].shape
    assert leaf.sharding == plan.params[path].sharding, path


# ----------------------------------------------------------------- constraints


@functools.cache
def lowered(mesh):
  """Lowers an update without making any array; returns its StableHLO text."""
  plan = plan_on(mesh)
  _, abstract, step = program(plan)
  frozen = nested(plan.select(plan.frozen))
  rows = jax.sharding.NamedSharding(plan.mesh, P('data'))
  batch = {
    k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
    for k, x in BATCH.items()
  }
  return plan, lambda: step.lower(abstract, frozen, batch).as_text()


def constraints(text):
  return re.findall(r'sdy\.sharding_constraint[^\n]*', text)


def test_the_program_constrains_its_activations_within_the_scope_only():
  plan, lower = lowered('4x2')
  with plan.scope():
    inside = constraints(lower())
  # Constraints in the forward pass, with one layer per stack: 2 for embeddings,
  # 9 for queries, keys and values, 4 for MLP hiddens, 2 for layer outputs and 1
  # for logits. The backward pass has them again.
  assert len(inside) > 18
  assert sum('"model"' in line for line in inside) >= 14
  assert sum('"data"' in line for line in inside) >= 18


def test_without_the_scope_nothing_is_constrained():
  _, lower = lowered('2x4')
  assert not constraints(lower())


# ---------------------------------------------------------------------- errors


def test_a_mesh_uses_all_devices_as_data_by_model():
  assert dict(partitioning.make_mesh().shape) == {'data': 8, 'model': 1}
  mesh = partitioning.make_mesh(4)
  assert dict(mesh.shape) == {'data': 2, 'model': 4}
  assert mesh.devices.ravel().tolist() == jax.devices()
  one = partitioning.make_mesh(devices=jax.devices()[:1])
  assert math.prod(one.shape.values()) == 1


@pytest.mark.parametrize('model_parallel', [0, -1, 3, 16])
def test_a_mesh_that_does_not_come_out_names_those_that_do(model_parallel):
  with pytest.raises(
    ValueError,
    match=rf'MODEL_PARALLEL is {model_parallel}.* 8 devices.*\[1, 2, 4, 8\]',
  ):
    partitioning.make_mesh(model_parallel)


def test_a_batch_that_does_not_come_out_names_those_that_do():
  mesh = partitioning.make_mesh(2)
  device_feed.check_batch_size(8, mesh)
  with pytest.raises(ValueError, match=r'BATCH_SIZE is 6.* 4 .*Use 4 or 8'):
    device_feed.check_batch_size(6, mesh)
  with pytest.raises(ValueError, match=r'BATCH_SIZE is 6'):
    device_put({k: x[:6] for k, x in BATCH.items()}, mesh)


def test_rules_keep_a_split_only_where_it_comes_out():
  config = sizes.t5('t5_1_1_small')  # 6 heads of 64, d_ff 1024.
  split = {
    m: {
      a
      for a, over in partitioning.rules(partitioning.make_mesh(m), config)
      if over == 'model'
    }
    for m in (2, 4)
  }
  everything = {'vocab', 'mlp', 'heads', 'joined_kv'}
  assert split == {2: everything, 4: everything - {'heads'}}
  odd = dataclasses.replace(config, vocab_size=32_127, mlp_dim=1023)
  got = dict(partitioning.rules(partitioning.make_mesh(2), odd))
  assert got['vocab'] is got['mlp'] is None
  assert got['batch'] == 'data'


def test_an_unknown_logical_axis_is_refused():
  mesh = partitioning.make_mesh()
  with pytest.raises(ValueError, match=r"no logical axis rule for \['rank'\]"):
    partitioning.shardings(
      mesh, partitioning.LOGICAL_AXIS_RULES, {'lora': ('embed', 'rank')}
    )
