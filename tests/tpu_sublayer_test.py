"""The TPU's kernels after a norm against the formula; on the CPU."""

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
from ptune.model import (
  activations,
  fused,
  partitioning,
  sizes,
  t5,
  tpu,
  tpu_sublayer,
)
from ptune.model.adapters import Placement
from tests.tpu_attention_test import assert_as_exact_as_bfloat16

ROWS, LENGTH, EMBED, UNITS = 2, 150, 128, 384
ACTIVATIONS = {
  'gelu, gated': (nn.gelu, activations.identity),
  'silu, gated': (nn.silu, activations.identity),
  'relu': (nn.relu,),
}
PROJECTIONS, OUTPUT = 'projections', 'output'


def draw(kind='gelu, gated', dropout=True):
  """x, the weights and settings, and what the output is multiplied with.

  What `output` gets as hidden is behind x.
  """
  rng = np.random.default_rng(0)
  make = lambda *shape: rng.standard_normal(shape).astype(np.float32)

  def keep(width):
    kept = rng.random((ROWS, 1, width)) < 0.75
    return kept / np.float32(0.75) if dropout else None

  activations = ACTIVATIONS.get(kind, ())
  x, scale = 2 * make(ROWS, LENGTH, EMBED), 1 + make(EMBED) / 4
  kernel = lambda *shape: make(*shape) / shape[0] ** 0.5
  if kind == PROJECTIONS:
    wi = tuple(kernel(EMBED, UNITS) for _ in range(3))
    weights = tpu_sublayer.Weights(scale, wi)
    width = EMBED + 3 * UNITS
  elif kind == OUTPUT:
    kept_out = keep(EMBED)
    x = np.concatenate([x, make(ROWS, LENGTH, UNITS)], axis=-1)
    weights = tpu_sublayer.Weights(wo=kernel(UNITS, EMBED), kept_out=kept_out)
    width = EMBED
  else:
    wi = tuple(kernel(EMBED, UNITS) for _ in activations)
    wo = kernel(UNITS, EMBED)
    weights = tpu_sublayer.Weights(scale, wi, wo, keep(UNITS), keep(EMBED))
    width = EMBED
  dy = make(ROWS, LENGTH, width) / 16
  return x, weights, tpu_sublayer.Settings(activations), dy


def kernel(x, weights, settings):
  """The function of the module; what projections return is concatenated."""
  if not weights.wi:
    return tpu_sublayer.output(*parts(x), weights, settings)
  if weights.wo is not None:
    return tpu_sublayer.mlp(x, weights, settings)
  x, y = tpu_sublayer.project(x, weights, settings)
  return jnp.concatenate([x, *y], axis=-1)


def parts(x):
  return x[..., :EMBED], x[..., EMBED:]


def formula(x, weights, settings):
  """The same, written as in the paper."""
  if not weights.wi:
    x, hidden = parts(x)
    y = jnp.einsum('bti,io->bto', hidden, weights.wo)
    return x + (y if weights.kept_out is None else y * weights.kept_out)
  unit = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
  h = unit * weights.scale[None, None]
  before = [jnp.einsum('bti,io->bto', h, w) for w in weights.wi]
  if weights.wo is None:
    return jnp.concatenate([x, *before], axis=-1)
  hidden = 1.0 if weights.kept is None else weights.kept
  for activation, given in zip(settings.activations, before, strict=True):
    hidden = hidden * activation(given)
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
  assert tpu_sublayer.tile_size(EMBED, UNITS, 3) == 128


KINDS = [(kind, dropout) for kind in ACTIVATIONS for dropout in (False, True)]
KINDS += [(PROJECTIONS, False), (OUTPUT, False), (OUTPUT, True)]


@pytest.mark.parametrize(('kind', 'dropout'), KINDS)
@pytest.mark.parametrize('tiles', ['one', 'many', 'many, read again'])
def test_values_and_derivatives_are_those_of_the_formula(
  kind, tiles, dropout, monkeypatch
):
  if tiles != 'one':
    small_tiles(monkeypatch)
  if tiles == 'many, read again':
    monkeypatch.setattr(tpu_sublayer, '_resident', lambda *_: False)
  x, weights, settings, dy = draw(kind, dropout)
  want = derivatives(formula, x, weights, settings, dy)
  got = derivatives(kernel, x, weights, settings, dy)
  assert all(np.abs(expected).max() > 0.1 for expected in want)
  for one, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(one, expected, atol=1e-5)
  # Without a derivative, an MLP keeps nothing.
  y = kernel(x, weights, settings)
  np.testing.assert_allclose(y, want[0], atol=1e-5)


@pytest.mark.parametrize('kind', ['gelu, gated', PROJECTIONS, OUTPUT])
def test_in_bfloat16_it_is_as_exact_as_bfloat16(kind):
  x, weights, settings, dy = draw(kind)
  narrow = jnp.asarray(x, jnp.bfloat16)
  wide = narrow.astype(jnp.float32)
  want = derivatives(formula, wide, weights, settings, dy)
  got = derivatives(kernel, narrow, weights, settings, dy)
  assert_as_exact_as_bfloat16(got, want)


@pytest.mark.parametrize('kind', ['gelu, gated', PROJECTIONS, OUTPUT])
@pytest.mark.parametrize('axes', [('data', 'model'), ('data', None)])
def test_on_a_mesh_each_device_has_its_rows_and_units(axes, kind):
  mesh = partitioning.make_mesh(3, jax.devices()[:6])
  x, weights, settings, dy = draw(kind)
  want = derivatives(formula, x, weights, settings, dy)
  split = NamedSharding(mesh, PartitionSpec('data'))
  with jax.set_mesh(mesh):
    x = jax.device_put(x, split)
    settings = settings._replace(axes=axes)
    got = derivatives(kernel, x, weights, settings, dy)
  if kind != PROJECTIONS:
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


@pytest.mark.parametrize(
  ('kind', 'name', 'kept'),
  [
    ('gelu, gated', 'scale', 1),
    ('gelu, gated', 'wi', 1),
    ('gelu, gated', 'wo', 1),
    (PROJECTIONS, 'scale', 3),
    (PROJECTIONS, 'wi', 3),
    (OUTPUT, 'wo', 1),
  ],
)
def test_trained_weights_have_their_gradients_without_a_kernel(
  kind, name, kept
):
  x, weights, settings, dy = draw(kind)
  trained = {name: getattr(weights, name)}
  want = derivatives(formula, x, weights, settings, dy, **trained)
  got = derivatives(kernel, x, weights, settings, dy, **trained)
  for one, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(one, expected, atol=1e-4)

  def loss(x, trained):
    return jnp.sum(kernel(x, weights._replace(**trained), settings))

  assert calls(jax.grad(loss, (0, 1)), x, trained) == []
  assert calls(jax.grad(loss), x, trained) == [1 if kind == OUTPUT else 3, 1]
  assert calls(loss, x, trained) == [kept]


# ---------------------------------------------------------------- the network

CONFIG = sizes.T5Config(
  vocab_size=8,
  emb_dim=EMBED,
  num_heads=2,
  head_dim=64,
  mlp_dim=UNITS,
  num_encoder_layers=1,
  num_decoder_layers=1,
  dtype='bfloat16',
  dropout_rate=0.25,
)


# The functions that an encoder layer calls.
ALL = {'mlp', 'project', 'output'}


@contextlib.contextmanager
def on_tpu():
  """Pretends that the device is a TPU; tells which kernels are called."""
  called = set()

  def tell(name):
    function = getattr(tpu_sublayer, name)

    def call(*arguments):
      called.add(name)
      return function(*arguments)

    return mock.patch.object(tpu_sublayer, name, call)

  with (
    mock.patch.object(fused, 'platform', lambda: 'tpu'),
    mock.patch.object(jax, 'device_count', lambda: 1),
    tell('mlp'),
    tell('project'),
    tell('output'),
  ):
    yield called


def inputs(length=LENGTH, embed=EMBED):
  """x, the mask and the bias of an encoder layer."""
  x = jnp.asarray(draw()[0], jnp.bfloat16)[:, :length, :embed]
  mask = jnp.ones((ROWS, 1, 1, length), bool).at[1, :, :, 100:].set(False)
  bias = np.random.default_rng(1).standard_normal((1, 2, length, length))
  return x, mask, jnp.asarray(bias, jnp.float32)


@pytest.mark.parametrize('activations', [('gelu', 'linear'), ('relu',)])
def test_a_layer_drops_the_same_with_them_and_is_as_exact(activations):
  config = dataclasses.replace(CONFIG, mlp_activations=activations)
  x, *rest = inputs()
  variables = t5.EncoderLayer(config).init(jax.random.key(0), x, *rest)
  dy = jnp.asarray(draw()[-1], jnp.bfloat16)

  def run(dtype):
    """What the layer adds to x, and to the gradient."""
    layer = t5.EncoderLayer(dataclasses.replace(config, dtype=dtype))
    rngs = {'dropout': jax.random.key(1)}
    apply = functools.partial(layer.apply, enable_dropout=True, rngs=rngs)
    given = x.astype(dtype)
    y, pull = jax.vjp(lambda x: apply(variables, x, *rest), given)
    added = y - given, pull(dy.astype(dtype))[0] - dy.astype(dtype)
    return [np.asarray(a, np.float32) for a in added]

  exact, by_xla = run('float32'), run('bfloat16')
  with on_tpu() as called:
    got = run('bfloat16')
  assert called == ALL
  for one, other, want in zip(got, by_xla, exact, strict=True):
    error, usual = (np.linalg.norm(a - want) for a in (one, other))
    assert 0 < error < 1.1 * usual < 0.1 * np.linalg.norm(want)


def used(placement=None, prepare=lambda params: params, sizes=(), **changes):
  """The kernels that an encoder layer calls."""
  placements = (placement,) if placement else ()
  layer = t5.EncoderLayer(dataclasses.replace(CONFIG, **changes), placements)
  arrays = inputs(*sizes)
  params = layer.init(jax.random.key(0), *arrays)['params']
  with on_tpu() as called:
    jax.eval_shape(layer.apply, {'params': prepare(params)}, *arrays)
  return called


def test_they_are_used_where_they_fit():
  assert used() == ALL
  assert used(fused_mlp=False) == ALL - {'mlp'}
  assert used(fused_attention=False) == {'mlp'}
  assert not used(dtype='float32')
  assert not used(sizes=(100, EMBED))
  assert not used(sizes=(LENGTH, 96), emb_dim=96)
  assert not used(head_dim=72, mlp_dim=200)


@pytest.mark.parametrize(
  ('site', 'axis', 'others'),
  [
    ('mlp/wi_1', 'mlp', ALL - {'mlp'}),
    ('mlp/hidden', 'mlp', ALL - {'mlp'}),
    ('mlp/wo', 'embed', ALL - {'mlp'}),
    ('mlp', 'embed', ALL - {'mlp'}),
    ('attention', 'embed', {'mlp'}),
    ('attention/out', 'embed', ALL - {'output'}),
    ('input', 'embed', ALL),
  ],
)
def test_an_adapter_has_its_site(site, axis, others):
  scale = functools.partial(ia3.Scale, axes=(axis,))
  assert used(Placement(site, 'scale', scale)) == others


@pytest.mark.parametrize('site', ['query', 'key', 'value', 'keys', 'values'])
def test_adapters_of_projections_have_their_sites(site):
  scale = functools.partial(ia3.Scale, axes=('heads', 'kv'))
  assert used(Placement(f'attention/{site}', 'scale', scale)) == {'mlp'}


@pytest.mark.parametrize(
  ('module', 'name', 'others'),
  [
    ('mlp', 'wo', ALL - {'mlp'}),
    ('attention', 'key', {'mlp'}),
    ('attention', 'out', ALL - {'output'}),
  ],
)
def test_int8_kernels_are_left_to_xla(module, name, others):
  def prepare(params):
    kernel = params[module][name]['kernel']
    small = {
      'kernel': kernel.astype(jnp.int8),
      'kernel_scale': jnp.ones(kernel.shape[1]),
    }
    return {**params, module: {**params[module], name: small}}

  assert used(prepare=prepare) == others


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
  assert tpu_sublayer.tile_size(2048, 5120, 3) == 5120
  # With large matrix units, a block has more positions if all units fit.
  assert tpu_sublayer._step(1024, 2816, 3, activations=False) == (320, 2816)
  monkeypatch.setattr(tpu, 'matrix_unit', lambda: 256)
  assert tpu_sublayer._step(1024, 2816, 3, activations=False) == (640, 2816)
  assert tpu_sublayer._step(1024, 2816, 3, activations=True) == (320, 2816)
  assert tpu_sublayer._step(2048, 5120, 3, activations=False) == (320, 5120)
