"""The plan of all parameters, their initial values, and the fingerprint."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ptune.convert import fingerprint as fingerprint_lib
from ptune.convert.fingerprint import of_params
from ptune.methods import full, prompt, prompt_init
from ptune.model import (
  model_info,
  network,
  parameters,
  partitioning,
  sizes,
  structure,
)
from ptune.model.adapters import Method, Placement
from tests.network_test import SHALLOW, TINY, load

ONE = partitioning.make_mesh(devices=jax.devices()[:1])
# A base that cannot be read.
ELSEWHERE = prompt_init.Base(None, None, None)


@functools.cache
def plan_of(method='prompt', **changes):
  config = dataclasses.replace(TINY, **changes)
  return parameters.plan(
    config, prompt.prompt(5) if method == 'prompt' else full.full(), ONE
  )


# ------------------------------------------------------------------------ plan


def test_prompt_tuning_trains_the_prompt_and_freezes_the_base():
  plan = plan_of()
  base = structure.parameters(network.Transformer(TINY)).keys()
  assert plan.trainable == plan.adapters == {prompt.PATH}
  assert plan.frozen == plan.base == base
  assert plan.params.keys() == base | {prompt.PATH}


def test_full_tuning_trains_all():
  plan = plan_of('full')
  assert plan.trainable == plan.base == frozenset(plan.params)
  assert not plan.frozen
  assert not plan.adapters


def test_select_keeps_the_order_of_the_parameters():
  plan = plan_of()
  chosen = plan.select(reversed(list(plan.params)[::3]))
  assert list(chosen) == list(plan.params)[::3]


def test_in_bfloat16_frozen_matrices_alone_are_bfloat16():
  plan = plan_of(dtype='bfloat16')
  for path, x in plan.params.items():
    used_in_float32 = (
      path == prompt.PATH
      or path.endswith('/scale')
      or path.endswith('/rel_embedding')
    )
    want = jnp.float32 if used_in_float32 else jnp.bfloat16
    assert x.dtype == want, path
  # Trained parameters are float32, whatever type the model computes in.
  trained = plan_of('full', dtype='bfloat16').params.values()
  assert {x.dtype for x in trained} == {jnp.dtype(jnp.float32)}


def test_a_pattern_that_trains_nothing_lists_the_parameters():
  method = Method('typo', (), trainable=('encoder/promt/*', '*/scale'))
  with pytest.raises(ValueError, match="method 'typo' trains") as e:
    parameters.plan(TINY, method, ONE)
  assert "['encoder/promt/*'], which no parameter" in str(e.value)
  assert '\n  token_embedder/embedding' in str(e.value)


def test_a_placement_without_a_site_stops_the_plan():
  adapter = functools.partial(prompt.InsertPrompt, length=5)
  method = Method('stray', (Placement('encoder/embd', 'p', adapter),), ('*',))
  with pytest.raises(ValueError, match=r'no site .*\n  decoder/embed'):
    parameters.plan(TINY, method, ONE)


def test_networks_with_the_same_adapters_are_equal():
  made = [
    network.Transformer(TINY, prompt.prompt(length).placements)
    for length in (5, 5, 6)
  ]
  assert made[0] == made[1] and hash(made[0]) == hash(made[1])
  assert made[0] != made[2]
  dropped = dataclasses.replace(TINY, dropout_rate=0.1)
  made[1] = made[1].clone(config=dropped)
  # The second call does not trace the network again.
  structure.parameters(made[0])
  before = structure._traced.cache_info().misses
  assert structure.parameters(made[1]) == structure.parameters(made[0])
  assert structure._traced.cache_info().misses == before


def test_merge_and_flatten_are_inverse():
  flat = {'a/b/c': 1, 'a/b/d': 2, 'e': 3}
  assert parameters.unflatten(flat) == {'a': {'b': {'c': 1, 'd': 2}}, 'e': 3}
  assert parameters.flatten(parameters.unflatten(flat)) == flat
  merged = parameters.merge({'a': {'b': 1}}, {'a': {'c': 2}}, {'d': 3})
  assert merged == {'a': {'b': 1, 'c': 2}, 'd': 3}


# -------------------------------------------------------------------- describe


@functools.cache
def small_plan(dtype):
  config = sizes.t5('t5_1_1_small', dtype=dtype)
  return parameters.plan(config, prompt.prompt(100), ONE)


def test_summary_has_the_papers_numbers():
  assert model_info.summary(small_plan('float32')) == (
    'prompt: trainable 51,200 parameters (204.8 kB), frozen 76,961,152'
    ' parameters (307.8 MB), on a mesh of 1 data x 1 model'
  )
  # 2 bytes per parameter, and 4 for 42 norms of 512 and 2 bias tables of 6 x
  # 32.
  bytes_of = 2 * 76_961_152 + 2 * (42 * 512 + 2 * 6 * 32)
  assert f'({bytes_of / 1e6:.1f} MB)' in model_info.summary(
    small_plan('bfloat16')
  )


def test_describe_has_a_line_for_every_parameter():
  plan = small_plan('bfloat16')
  lines = model_info.table(plan).splitlines()
  assert lines[:2] == [model_info.summary(plan), '']
  table = [re.split(r'  +', line.strip()) for line in lines[2:]]
  assert table[0] == ['name', 'shape', 'dtype', 'axes', 'bytes']
  rows = {row[0]: row[1:] for row in table[1:]}
  assert rows.keys() == plan.params.keys()
  assert rows[prompt.PATH] == [
    '[100, 512]', 'float32', 'prompt, prompt_embed', 'trainable', '204,800'
  ]  # fmt: skip
  assert rows['token_embedder/embedding'] == [
    '[32128, 512]', 'bfloat16', 'vocab, embed', 'frozen', '32,899,072'
  ]  # fmt: skip
  assert rows['decoder/relpos_bias/rel_embedding'] == [
    '[6, 32]', 'float32', 'heads, relpos_buckets', 'frozen', '768'
  ]  # fmt: skip
  assert sum(row[-2] == 'trainable' for row in rows.values()) == 1


def test_identity_is_the_method_and_what_it_trains():
  assert parameters.identity(plan_of()) == {
    'method': 'prompt',
    'trainable': {prompt.PATH: [5, 32]},
  }
  count = sum(np.prod(x.shape) for x in plan_of('full').params.values())
  assert parameters.identity(plan_of('full')) == {
    'method': 'full',
    'trainable': {'arrays': len(plan_of('full').params), 'parameters': count},
  }


@pytest.mark.parametrize(
  ('n', 'text'),
  [
    (0, '0 bytes'),
    (999, '999 bytes'),
    (204_800, '204.8 kB'),
    (11.1e9, '11.1 GB'),
    (1.2345e13, '12,345.0 GB'),
  ],
)
def test_bytes_are_written_in_decimal_units(n, text):
  assert model_info.format_bytes(n) == text


# -------------------------------------------------------------- initial values


class Counted(nn.Module):
  """An adapter that records when its first value is computed."""

  tell: object

  @nn.compact
  def __call__(self, x, y):
    def init(key, shape):
      del key
      return jax.pure_callback(
        self.tell, jax.ShapeDtypeStruct(shape, jnp.float32)
      )

    return y + nn.partitioning.param_with_axes('a', init, (), axes=())


def test_only_what_is_asked_for_is_computed():
  computed = []

  def adapter(which):
    def tell():
      computed.append(which)
      return np.float32(which)

    return functools.partial(Counted, tell)

  method = Method(
    'counted',
    (
      Placement('encoder/embed', 'one', adapter(1)),
      Placement('decoder/embed', 'two', adapter(2)),
    ),
    ('*/a',),
  )
  plan = parameters.plan(SHALLOW, method, ONE)
  values = parameters.initialize(plan, ['decoder/two/a'], seed=0)
  assert jax.device_get(values) == {'decoder/two/a': 2}
  assert set(computed) == {2}
  assert parameters.initialize(plan, [], seed=0) == {}


def test_initial_values_have_the_networks_distributions():
  plan = parameters.plan(
    dataclasses.replace(SHALLOW, dtype='bfloat16'), prompt.prompt(5), ONE
  )
  query = 'encoder/layers_0/attention/query/kernel'
  key = 'encoder/layers_0/attention/key/kernel'
  paths = ['token_embedder/embedding', query, key, 'encoder/encoder_norm/scale']
  values = parameters.initialize(plan, paths, seed=0)
  assert list(values) == [p for p in plan.params if p in paths]
  assert all(values[p].dtype == plan.params[p].dtype for p in paths)
  std = {p: np.std(np.asarray(values[p], np.float32)) for p in paths}
  np.testing.assert_allclose(std['token_embedder/embedding'], 1, rtol=0.05)
  np.testing.assert_allclose(std[key], 32**-0.5, rtol=0.1)
  # T5 does not divide the logits by the root of the head size, so its query
  # kernels start smaller.
  np.testing.assert_allclose(std[query], (32 * 8) ** -0.5, rtol=0.1)
  np.testing.assert_array_equal(values['encoder/encoder_norm/scale'], 1)


def test_adapters_start_from_their_initialiser_and_the_seed():
  plan = plan_of()
  a, again, b = (
    prompt_init.initialize_adapters(plan, ELSEWHERE, seed=s) for s in (0, 0, 1)
  )
  assert a.keys() == {prompt.PATH}
  np.testing.assert_array_equal(a[prompt.PATH], again[prompt.PATH])
  assert np.abs(np.asarray(a[prompt.PATH] - b[prompt.PATH])).min() > 0
  given = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
  method = prompt.prompt(5, prompt_init.from_array(given))
  values = prompt_init.initialize_adapters(
    parameters.plan(SHALLOW, method, partitioning.make_mesh()), ELSEWHERE, 0
  )
  np.testing.assert_array_equal(values[prompt.PATH], given)
  assert values[prompt.PATH].sharding.is_fully_replicated
  assert len(values[prompt.PATH].sharding.device_set) == 8


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('model_parallel', [1, 4])
def test_embedding_rows_are_whole_on_any_mesh(numerics, dtype, model_parallel):
  table = load(numerics / 'prompt_encoder' / 'params.npz')[
    'token_embedder/embedding'
  ]
  plan = parameters.plan(
    dataclasses.replace(SHALLOW, dtype=dtype),
    prompt.prompt(5),
    partitioning.make_mesh(model_parallel),
  )
  struct = plan.params['token_embedder/embedding']
  params = {'token_embedder/embedding': parameters.place(table, struct)}
  ids = np.array([127, 0, 64, 64])
  rows = parameters.embedding_rows(plan, params, ids)
  assert rows.dtype == np.float32
  want = table[ids].astype(struct.dtype).astype(np.float32)
  np.testing.assert_array_equal(rows, want)
  rows += 1  # Callers may change it.


@pytest.mark.parametrize('ids', [[0, 128], [-1, 5]])
def test_rows_that_the_embedding_does_not_have_are_refused(ids):
  plan = plan_of()
  struct = plan.params['token_embedder/embedding']
  table = parameters.place(np.zeros(struct.shape), struct)
  with pytest.raises(ValueError, match=rf'ids from {ids[0]} to {ids[1]}.* 128'):
    parameters.embedding_rows(plan, {'token_embedder/embedding': table}, ids)


# ----------------------------------------------------------------- fingerprint


@functools.cache
def shallow_plan(model_parallel=None, dtype='float32'):
  return parameters.plan(
    dataclasses.replace(SHALLOW, dtype=dtype),
    prompt.prompt(5),
    partitioning.make_mesh(model_parallel) if model_parallel else ONE,
  )


def fingerprint(values, *where):
  structs = shallow_plan(*where).params
  return of_params(
    {path: parameters.place(v, structs[path]) for path, v in values.items()}
  )


KERNELS = [
  f'encoder/layers_0/attention/{name}/kernel' for name in ('key', 'out')
]


@pytest.fixture
def weights(numerics):
  """Returns a part of the base: matrices, a norm and a bias table."""
  paths = [
    'token_embedder/embedding',
    'encoder/layers_0/mlp/wo/kernel',
    *KERNELS,
    'encoder/encoder_norm/scale',
    'encoder/relpos_bias/rel_embedding',
  ]
  params = load(numerics / 'prompt_encoder' / 'params.npz')
  return {path: params[path] for path in paths}


@pytest.mark.parametrize('few', [0, fingerprint_lib.FEW])
def test_the_fingerprint_is_that_of_the_weights_on_any_mesh(
  weights, few, monkeypatch
):
  monkeypatch.setattr(fingerprint_lib, 'FEW', few)  # By XLA, then by NumPy.
  want = fingerprint(weights)
  assert re.fullmatch('[0-9a-f]{16}', want)
  for model_parallel in (1, 2, 8):
    assert fingerprint(weights, model_parallel) == want
  backwards = dict(reversed(weights.items()))
  assert fingerprint(backwards) == want


def test_the_fingerprint_is_the_same_in_bfloat16(weights):
  assert fingerprint(weights, None, 'bfloat16') == fingerprint(weights)


def swapped(a, b):
  def change(x):
    x[[a, b]] = x[[b, a]]

  return change


def swapped_values(a, b):
  def change(x):
    x[a], x[b] = x[b], x[a]

  return change


def other_value(x):
  x[3, 5] *= 1.01


def last_value(x):
  x[-1, -1] = -x[-1, -1]


@pytest.mark.parametrize(
  'change',
  [
    other_value,
    last_value,
    swapped(0, 1),
    swapped(0, 32),
    swapped_values((0, 0), (0, 1)),
    swapped_values((0, 0), (1, 0)),
    swapped_values((0, 31), (1, 0)),
  ],
  ids=[
    'a value',
    'the last value',
    'neighbouring rows',
    'distant rows',
    'values of a row',
    'values of a column',
    'values of a diagonal',
  ],
)
def test_the_fingerprint_tells_other_weights(weights, change):
  before = fingerprint(weights)
  for path in ('token_embedder/embedding', 'encoder/layers_0/mlp/wo/kernel'):
    values = {k: v.copy() for k, v in weights.items()}
    change(values[path])
    assert fingerprint(values) != before, path


def test_the_fingerprint_tells_arrays_that_changed_places(weights):
  a, b = KERNELS
  changed = weights | {a: weights[b], b: weights[a]}
  assert fingerprint(changed) != fingerprint(weights)
