"""How ptune identifies a checkpoint's model: names, sizes and fingerprint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptune.convert import check_config, identity, open_checkpoint
from ptune.convert.fingerprint import of_params
from ptune.convert.layout import shapes
from ptune.convert.source import Leaf, Source
from ptune.model import network, sizes, structure
from tests import layouts


def _source(config, activations=None, **changed):
  def fetch(index):
    raise AssertionError('nothing is to be read')

  leaves = {
    path: Leaf(changed.get(path, shape), np.dtype('float32'), fetch)
    for path, shape in shapes(config).items()
  }
  # Shapes do not show whether attention is local, so the source records it.
  local = (config.local_radius, config.global_block_size)
  attention = local if any(local) else None
  return Source(
    '/somewhere', 't5x', 7, leaves, activations, attention=attention
  )


@pytest.mark.parametrize(
  'config',
  [
    sizes.T5Config(11, 4, 2, 3, 5, 2, 1),
    sizes.T5Config(11, 4, 2, 3, 5, 1, 2, ('relu',), True),
  ],
  ids=['gated', 'plain, tied'],
)
def test_shapes_are_those_of_the_network(config):
  params = structure.parameters(network.Transformer(config))
  assert shapes(config) == {path: x.shape for path, x in params.items()}


@pytest.mark.parametrize(
  'name', [n for n, c in sizes.SIZES.items() if isinstance(c, sizes.T5Config)]
)
def test_every_published_size_is_known_by_its_shapes(name):
  config = sizes.SIZES[name]
  source = _source(config)
  names = identity.names(identity.facts(source))
  assert set(names) == {n for n, same in sizes.SIZES.items() if same == config}
  check_config(source, dataclasses.replace(config, dtype='bfloat16'))
  assert identity.config(source) == config
  identity.check_whole(source, config)


def test_disagreement_shows_both_and_the_file_to_take():
  base, small = sizes.SIZES['t5_1_1_base'], sizes.SIZES['t5_1_1_small']
  with pytest.raises(ValueError) as error:
    check_config(_source(base), small)
  text = str(error.value)
  for part in (
    'nothing was restored',
    'checkpoint: t5_1_1_base or flan_t5_base',
    'model: t5_1_1_small or flan_t5_small',
    'emb_dim             768         512',
    'num_encoder_layers  12          8',
    't5x checkpoint /somewhere of step 7',
    '--gin_file=models/t5_1_1_base.gin',
  ):
    assert part in text
  assert 'vocab_size  32128' not in text


def test_another_activation_is_refused_though_all_shapes_fit():
  config = sizes.SIZES['t5_1_1_small']
  check_config(_source(config, ('gelu', 'linear')), config)
  with pytest.raises(ValueError, match=r"\('silu', 'linear'\)  \('gelu', 'lin"):
    check_config(_source(config, ('silu', 'linear')), config)
  # A T5X checkpoint does not record the activations, so none are compared.
  silu = dataclasses.replace(config, mlp_activations=('silu', 'linear'))
  check_config(_source(config), silu)


@pytest.mark.parametrize(
  'name, other, field',
  [
    ('t5_small', 't5_1_1_small', 'mlp_activations'),
    ('t5_1_1_small', 't5_small', 'logits_via_embedding'),
    ('mt5_small', 't5_1_1_small', 'vocab_size'),
    ('byt5_small', 'mt5_small', 'num_decoder_layers'),
  ],
)
def test_other_families_are_refused(name, other, field):
  with pytest.raises(ValueError, match=f'\n  {field} '):
    check_config(_source(sizes.SIZES[name]), sizes.SIZES[other])


def test_sizes_of_ones_own_have_no_file_to_take():
  config = sizes.T5Config(11, 4, 2, 3, 5, 2, 1)
  with pytest.raises(ValueError, match='No published model matches this'):
    check_config(_source(config), sizes.SIZES['t5_small'])


def test_a_prompt_alone_contradicts_no_model():
  leaf = Leaf((5, 4), np.dtype('float32'), np.zeros((5, 4)).__getitem__)
  source = Source('/run', 'ptune', 3, {'encoder/prompt/prompt/prompt': leaf})
  check_config(source, sizes.SIZES['t5_small'])
  with pytest.raises(ValueError, match='not a whole model'):
    identity.config(source)


@pytest.mark.parametrize('path', [layouts.T5_1_1['t5x_orbax'], 'hf/t5_1_0'])
def test_fingerprint_is_that_of_a_run(numerics, path):
  """Otherwise a run's prompt would be refused on the run's own base."""
  _, arrays = layouts.restored(numerics / path)
  expected = of_params(arrays)
  source = open_checkpoint(numerics / path)
  assert identity.fingerprint(source) == expected
  half = {k: v.astype(jnp.bfloat16) for k, v in arrays.items()}
  assert of_params(half) == expected


@pytest.mark.parametrize('dtype', [np.float32, np.float16, jnp.bfloat16])
def test_fingerprint_of_any_rank_in_any_number_of_parts(monkeypatch, dtype):
  rng = np.random.default_rng(0)
  arrays = {
    'a': rng.standard_normal((7,)).astype(dtype),
    'b/c': rng.standard_normal((5, 3)).astype(dtype),
    'b/d': rng.standard_normal((3, 4, 5)).astype(dtype),
  }
  on_devices = {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
  expected = of_params(jax.device_put(on_devices))
  for part in (1 << 22, 8, 1):
    monkeypatch.setattr('ptune.convert.source._PART', part)
    checksums = identity.Checksums()
    for path, a in reversed(arrays.items()):
      leaf = Leaf(a.shape, a.dtype, a.__getitem__)
      checksums.reading(path, leaf).read()
    assert checksums.digest() == expected
