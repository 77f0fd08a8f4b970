"""The TPU's MLP kernel against the formula; interpreted on the CPU."""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from ptune.methods import ia3
from ptune.model import fused, layers, partitioning, sizes, t5, tpu_sublayer
from ptune.model.adapters import Placement
from tests.tpu_attention_test import assert_as_exact_as_bfloat16

ROWS, LENGTH, EMBED, HIDDEN = 2, 150, 128, 384
ACTIVATIONS = {
  'gelu, gated': (nn.gelu, tpu_sublayer.identity),
  'silu, gated': (nn.silu, tpu_sublayer.identity),
  'relu': (nn.relu,),
}


def draw(kind='gelu, gated', dropout=True):
  """x, the weights, settings, and what the output is multiplied with."""
  rng = np.random.default_rng(0)
  make = lambda *shape: rng.standard_normal(shape).astype(np.float32)

  def keep(width):
    kept = rng.random((ROWS, 1, width)) < 0.75
    return kept / np.float32(0.75) if dropout else None

  activations = ACTIVATIONS[kind]
  weights = tpu_sublayer.Weights(
    scale=1 + make(EMBED) / 4,
    wi=tuple(make(EMBED, HIDDEN) / EMBED**0.5 for _ in activations),
    wo=make(HIDDEN, EMBED) / HIDDEN**0.5,
    kept=keep(HIDDEN),
    kept_out=keep(EMBED),
  )
  x, dy = make(ROWS, LENGTH, EMBED), make(ROWS, LENGTH, EMBED) / 16
  return 2 * x, weights, tpu_sublayer.Settings(activations), dy


def formula(x, weights, settings):
  """The sublayer, written as in the paper."""
  unit = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
  h = unit * weights.scale[None, None]
  hidden = 1.0 if weights.kept is None else weights.kept
  for kernel, activation in zip(weights.wi, settings.activations, strict=True):
    hidden = hidden * activation(jnp.einsum('bti,io->bto', h, kernel))
  y = jnp.einsum('bti,io->bto', hidden, weights.wo)
  return x + (y if weights.kept_out is None else y * weights.kept_out)


def derivatives(compute, x, weights, settings, dy, **trained):
  """The output, and gradients of x and of the weights that are trained."""

  def loss(x, trained):
    y = compute(x, weights._replace(**trained), settings)
    return jnp.sum(y.astype(jnp.float32) * dy), y

  grads, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, trained)
  return jax.tree.leaves((y, grads))


def small_tiles(monkeypatch):
  """Two blocks of positions, the second shorter, and three tiles."""
  monkeypatch.setattr(tpu_sublayer, 'POSITIONS', 80)
  monkeypatch.setattr(tpu_sublayer, 'CYCLES', 0)
  assert tpu_sublayer.tile_size(EMBED, HIDDEN, 3) == 128


@pytest.mark.parametrize('dropout', [False, True])
@pytest.mark.parametrize('tiles', ['one', 'many', 'many, read again'])
@pytest.mark.parametrize('kind', ACTIVATIONS)
def test_values_and_derivatives_are_those_of_the_formula(
  kind, tiles, dropout, monkeypatch
):
  if tiles != 'one':
    small_tiles(monkeypatch)
  if tiles == 'many, read again':
    monkeypatch.setattr(tpu_sublayer, '_resident', lambda *_: False)
  x, weights, settings, dy = draw(kind, dropout)
  want = derivatives(formula, x, weights, settings, dy)
  got = derivatives(tpu_sublayer.mlp, x, weights, settings, dy)
  assert all(np.abs(expected).max() > 0.1 for expected in want)
  for one, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(one, expected, atol=1e-5)
  # Without a derivative, it keeps nothing.
  y = tpu_sublayer.mlp(x, weights, settings)
  np.testing.assert_allclose(y, want[0], atol=1e-5)


def test_in_bfloat16_it_is_as_exact_as_bfloat16():
  x, weights, settings, dy = draw()
  narrow = jnp.asarray(x, jnp.bfloat16)
  wide = narrow.astype(jnp.float32)
  want = derivatives(formula, wide, weights, settings, dy)
  got = derivatives(tpu_sublayer.mlp, narrow, weights, settings, dy)
  assert_as_exact_as_bfloat16(got, want)


@pytest.mark.parametrize('axes', [('data', 'model'), ('data', None)])
def test_on_a_mesh_each_device_has_its_rows_and_hidden_units(axes):
  mesh = partitioning.make_mesh(3, jax.devices()[:6])
  x, weights, settings, dy = draw()
  want = derivatives(formula, x, weights, settings, dy)
  split = NamedSharding(mesh, PartitionSpec('data'))
  with jax.set_mesh(mesh):
    x = jax.device_put(x, split)
    settings = settings._replace(axes=axes)
    got = derivatives(tpu_sublayer.mlp, x, weights, settings, dy)
  assert got[0].sharding.is_equivalent_to(split, 3)
  for one, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(one, expected, atol=1e-5)


def calls(function, *arguments):
  """How many arrays each kernel returns that a function calls."""

  def count(jaxpr):
    for e in jaxpr.eqns:
      if e.primitive.name == 'pallas_call':
        yield len(e.outvars)
      elif e.primitive.name == 'custom_vjp_call':
        yield from count(e.params['call_jaxpr'].jaxpr)

  return list(count(jax.make_jaxpr(function)(*arguments).jaxpr))


@pytest.mark.parametrize('name', ['scale', 'wi', 'wo'])
def test_trained_weights_have_their_gradients_without_a_kernel(name):
  x, weights, settings, dy = draw()
  trained = {name: getattr(weights, name)}
  want = derivatives(formula, x, weights, settings, dy, **trained)
  got = derivatives(tpu_sublayer.mlp, x, weights, settings, dy, **trained)
  for one, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(one, expected, atol=1e-4)

  def loss(x, trained):
    weights_ = weights._replace(**trained)
    return jnp.sum(tpu_sublayer.mlp(x, weights_, settings))

  assert calls(jax.grad(loss, (0, 1)), x, trained) == []
  assert calls(jax.grad(loss), x, trained) == [3, 1]
  assert calls(loss, x, trained) == [1]


# ---------------------------------------------------------------- the network

CONFIG = sizes.T5Config(
  vocab_size=8,
  emb_dim=EMBED,
  num_heads=2,
  head_dim=64,
  mlp_dim=HIDDEN,
  num_encoder_layers=1,
  num_decoder_layers=1,
  dtype='bfloat16',
  dropout_rate=0.25,
)


class Layer(nn.Module):
  """The second half of an encoder layer."""

  config: sizes.T5Config = CONFIG
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(self, x, enable_dropout=False):
    drop = layers.residual_dropout(self.config, enable_dropout)
    return t5.mlp_sublayer(self, self.config, self.placements, x, drop)


@contextlib.contextmanager
def on_tpu():
  """Pretends that the device is a TPU; counts calls of the kernel."""
  call = mock.Mock(side_effect=tpu_sublayer.mlp)
  with (
    mock.patch.object(fused, 'platform', lambda: 'tpu'),
    mock.patch.object(jax, 'device_count', lambda: 1),
    mock.patch.object(tpu_sublayer, 'mlp', call),
  ):
    yield call


@pytest.mark.parametrize('activations', [('gelu', 'linear'), ('relu',)])
def test_a_layer_drops_the_same_units_with_it(activations):
  config = dataclasses.replace(CONFIG, mlp_activations=activations)
  layer, x = Layer(config), jnp.asarray(draw()[0], jnp.bfloat16)
  variables = layer.init(jax.random.key(0), x)

  def run(x):
    rngs = {'dropout': jax.random.key(1)}
    return layer.apply(variables, x, enable_dropout=True, rngs=rngs)

  def both():
    y, pull = jax.vjp(run, x)
    return y - x, pull(jnp.cos(y))[0] - jnp.cos(y)

  want = both()
  with on_tpu() as called:
    got = both()
  assert called.call_count == 1
  for one, expected in zip(got, want, strict=True):
    one, expected = (np.asarray(a, np.float32) for a in (one, expected))
    assert np.abs(one - expected).max() < 2e-2 * np.abs(expected).max()


def test_it_is_used_where_it_fits():
  x = jnp.asarray(draw()[0], jnp.bfloat16)

  def used(x=x, placements=(), variables=None, **changes):
    layer = Layer(dataclasses.replace(CONFIG, **changes), placements)
    if variables is None:
      variables = layer.init(jax.random.key(0), x)
    with on_tpu() as called:
      jax.eval_shape(layer.apply, variables, x)
    return called.called

  assert used()
  assert not used(fused_mlp=False)
  assert not used(dtype='float32')
  assert not used(x[:, :100])
  assert not used(x[..., :96], emb_dim=96)
  for site in ('wi_1', 'hidden', 'wo'):
    scale = functools.partial(ia3.Scale, axes=('mlp',))
    assert not used(placements=(Placement(f'mlp/{site}', 'scale', scale),))
  scale = functools.partial(ia3.Scale, axes=('embed',))
  assert not used(placements=(Placement('mlp', 'scale', scale),))
  assert used(placements=(Placement('attention', 'scale', scale),))
  variables = Layer().init(jax.random.key(0), x)
  params = variables['params']
  wo = {'kernel': params['mlp']['wo']['kernel'].astype(jnp.int8)}
  wo['kernel_scale'] = jnp.ones(EMBED)
  mlp = {**params['mlp'], 'wo': wo}
  assert not used(variables={'params': {**params, 'mlp': mlp}})


def test_tiles_follow_the_chip(monkeypatch):
  assert tpu_sublayer.tile_size(1024, 2816, 3) == 1408
  assert tpu_sublayer.tile_size(2048, 5120, 3) == 1280
  # XXL's weights do not fit into VMEM, and are read tile by tile.
  assert tpu_sublayer.tile_size(4096, 10240, 3) == 640
  assert tpu_sublayer.tile_size(1024, 2800, 3) == 0
  assert tpu_sublayer.tile_size(1000, 2816, 3) == 0
  # A v6e computes four times as much in a cycle.
  monkeypatch.setattr(tpu_sublayer, '_rate', lambda: 4 * 256**2)
  assert tpu_sublayer.tile_size(1024, 2816, 3) == 2816
  assert tpu_sublayer.tile_size(2048, 5120, 3) == 2560
