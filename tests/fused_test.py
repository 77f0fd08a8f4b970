"""Fused kernels compute the same as `Attention`.

No test uses an accelerator. Pallas's kernel is interpreted. cuDNN's is only
lowered, and XLA computes with its arguments instead.
"""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ptune.methods import prompt
from ptune.model import attention as attention_lib
from ptune.model import fused, layers, network, parameters, partitioning
from ptune.model.models import EncoderDecoderModel
from tests.network_test import SHALLOW, make_batch, random_params

BFLOAT16 = dataclasses.replace(
  SHALLOW, dtype='bfloat16', head_dim=64, fused_attention=True
)
# The encoder's input is long enough, and its length with the prompt is odd.
LONG = make_batch([130, 40, 9, 120], [7, 3, 5, 2], encoder_length=130)


@contextlib.contextmanager
def on(platform):
  """Pretends that the devices are of a platform; XLA replaces cuDNN."""

  def xla(q, k, v, bias):
    assert q.shape[1] % 2 == k.shape[1] % 2 == 0
    return jax.nn.dot_product_attention(
      q, k, v, bias, scale=1.0, implementation='xla'
    )

  with (
    mock.patch.object(fused, 'platform', lambda: platform),
    mock.patch.object(fused, '_cudnn_kernel', xla),
    mock.patch.object(jax, 'device_count', lambda: 1),
  ):
    yield


def plain(q, k, v, bias, mask):
  logits = jnp.einsum('bqhd,bkhd->bhqk', q, k) + bias
  weights = nn.softmax(jnp.where(mask, logits, fused.MASKED))
  return jnp.einsum('bhqk,bkhd->bqhd', weights, v)


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_values_and_derivatives_are_those_of_the_formula(platform):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  q, k, v = draw(2, 5, 3, 8), draw(2, 7, 3, 8), draw(2, 7, 3, 8)
  # One row attends only to its first key.
  mask = (np.array([7, 1])[:, None] > np.arange(7))[:, None, None]
  arrays = q, k, v, draw(1, 3, 5, 7)
  want, want_pull = jax.vjp(lambda *x: plain(*x, mask), *arrays)
  with on(platform):
    got, pull = jax.vjp(lambda *x: fused.attend(*x, mask, None), *arrays)
    derivatives = pull(jnp.cos(want))
  np.testing.assert_allclose(got, want, atol=1e-5)
  for one, expected in zip(derivatives, want_pull(jnp.cos(want)), strict=True):
    np.testing.assert_allclose(one, expected, atol=2e-5)


@pytest.mark.parametrize('keys', [5, 7])
def test_joined_rows_attend_to_their_own_keys(keys):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  q, k, v = draw(6, 5, 2, 8), draw(6, keys, 2, 8), draw(6, keys, 2, 8)
  # The last row has no key: there, all its own have the same weight.
  mask = (np.array([keys, 1, 3, 2, 4, 0])[:, None] > np.arange(keys))[
    :, None, None
  ]
  arrays = q, k, v, draw(1, 2, 5, keys)

  def joined(*arrays):
    *arrays, wide = attention_lib.join_rows(3, *arrays, mask)
    return plain(*arrays, wide).reshape(q.shape)

  want, want_pull = jax.vjp(lambda *x: plain(*x, mask), *arrays)
  got, pull = jax.vjp(joined, *arrays)
  np.testing.assert_allclose(got, want, atol=1e-5)
  for one, expected in zip(
    pull(jnp.cos(want)), want_pull(jnp.cos(want)), strict=True
  ):
    np.testing.assert_allclose(one, expected, atol=2e-5)


@pytest.mark.parametrize(
  ('platform', 'shape', 'expected'),
  [
    ('tpu', (32, 16), 8),
    ('tpu', (12, 16), 6),
    ('tpu', (32, 40), 2),
    ('tpu', (32, 64), 2),
    ('tpu', (32, 200), 1),
    ('cuda', (32, 16), 1),
    (None, (32, 16), 1),
  ],
)
def test_short_rows_are_joined_on_a_tpu(platform, shape, expected):
  q = jax.ShapeDtypeStruct((*shape, 4, 64), jnp.bfloat16)
  bias = jax.ShapeDtypeStruct((1, 4, shape[1], shape[1]), jnp.float32)
  with on(platform):
    assert fused.rows_joined(None, q, q, bias) == expected
    assert fused.rows_joined(None, q, q, None) == 1
    assert fused.rows_joined(False, q, q, bias) == 1
    assert fused.rows_joined(None, q.update(dtype=jnp.float32), q, bias) == 1


@functools.cache
def program(config, platform):
  """Returns LONG's logits and the prompt's gradient, fused on a platform."""
  plan = parameters.plan(
    config, prompt.prompt(3), partitioning.make_mesh(2, jax.devices()[:4])
  )
  params = jax.tree.map(lambda x: x / 2, random_params(plan.network))
  params = parameters.flatten(params)
  model = EncoderDecoderModel(plan.network)

  def loss(trained):
    whole = parameters.unflatten(params | trained)
    return model.loss(whole, LONG)[0], model.logits(whole, LONG)

  trained = {prompt.PATH: params.pop(prompt.PATH)}
  with contextlib.ExitStack() as stack:
    if platform:
      stack.enter_context(on(platform))
    stack.enter_context(plan.scope())
    found = jax.jit(jax.grad(loss, has_aux=True))(trained)
  gradient, logits = jax.device_get(found)
  return logits, gradient[prompt.PATH]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('platform', 'changes'),
  [
    ('cuda', {}),
    ('tpu', {}),
    ('tpu', {'remat': True, 'scan': True}),
    ('tpu', {'fsdp': True, 'frozen_dtype': 'int8', 'emb_dim': 64}),
  ],
)
def test_the_network_is_the_same_in_low_precision(platform, changes):
  config = dataclasses.replace(BFLOAT16, **changes)
  want, want_gradient = program(config, None)
  with mock.patch.object(
    fused, 'attend', mock.Mock(side_effect=fused.attend)
  ) as attend:
    got, gradient = program(config, platform)
  # Only the encoder's attention is fused, because seven targets are too few.
  assert attend.call_count > 0
  assert {call.args[0].shape[1] for call in attend.call_args_list} == {133}
  scale = np.abs(want).max()
  assert np.abs(got - want).max() < 1e-2 * scale
  cosine = np.vdot(gradient, want_gradient)
  cosine /= np.linalg.norm(gradient) * np.linalg.norm(want_gradient)
  assert cosine > 0.999


def is_fused(platform, config, batch):
  """Whether a forward pass uses a fused kernel."""
  net = network.Transformer(config, prompt.prompt(3).placements)
  model = EncoderDecoderModel(net)
  shapes = jax.eval_shape(lambda: random_params(net))
  attend = mock.Mock(side_effect=lambda q, *_: q)
  with on(platform), mock.patch.object(fused, 'attend', attend):
    jax.eval_shape(model.logits, shapes, batch)
  return attend.called


@pytest.mark.parametrize(
  ('changes', 'batch'),
  [
    ({'fused_attention': False}, LONG),
    ({'dtype': 'float32'}, LONG),
    ({}, make_batch([120], [127], 120, 127)),
    ({'head_dim': 72}, LONG),
  ],
)
def test_what_does_not_fit_is_computed_as_always(changes, batch):
  config = dataclasses.replace(BFLOAT16, **changes)
  assert not is_fused('tpu', config, batch)


def test_on_a_tpu_it_is_the_default_and_on_a_gpu_it_is_not():
  default = dataclasses.replace(BFLOAT16, fused_attention=None)
  assert is_fused('tpu', default, LONG)
  assert not is_fused('cuda', default, LONG)
  assert is_fused('cuda', BFLOAT16, LONG)
  assert not is_fused(None, BFLOAT16, LONG)


def test_large_heads_are_for_a_tpu_only():
  large = dataclasses.replace(BFLOAT16, emb_dim=512, head_dim=256)
  assert is_fused('tpu', large, LONG)
  assert not is_fused('cuda', large, LONG)


def test_a_bias_of_another_shape_is_left_to_xla():
  q = jax.ShapeDtypeStruct((2, 130, 4, 64), jnp.bfloat16)
  mask = jax.ShapeDtypeStruct((2, 1, 1, 130), jnp.bool_)
  bias = jax.ShapeDtypeStruct((1, 4, 130, 130), jnp.float32)
  with on('tpu'):
    assert fused.fits(None, q, q, bias, mask)
    assert not fused.fits(None, q, q, bias.update(shape=(2, 4, 130, 130)), mask)
    assert not fused.fits(None, q, q, bias, mask.update(shape=(2, 4, 1, 130)))


def test_on_several_devices_it_must_be_known_how_arrays_are_split():
  q = jax.ShapeDtypeStruct((4, 128, 2, 64), jnp.bfloat16)
  mask = jax.ShapeDtypeStruct((4, 1, 1, 128), jnp.bool_)
  mesh = partitioning.make_mesh(2)  # 4 rows on 4 devices.

  def fits(q):
    return fused.fits(None, q, q, None, mask)

  with mock.patch.object(fused, 'platform', lambda: 'tpu'):
    assert not fits(q)
    with partitioning.scope(mesh, partitioning.rules(mesh, SHALLOW)):
      assert fits(q)
      assert not fits(q.update(shape=(3, 128, 2, 64)))
      assert not fits(q.update(shape=(4, 128, 3, 64)))


def test_a_cpu_has_no_kernel():
  assert fused.platform() is None


def test_cudnn_gets_a_step_of_training():
  """Lowers the step for a GPU; no test runs it there."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  net = network.Transformer(BFLOAT16, prompt.prompt(3).placements)
  model = EncoderDecoderModel(net)
  loss = jax.jit(jax.grad(lambda params: model.loss(params, LONG)[0]))
  with (
    mock.patch.object(fused, 'platform', lambda: 'cuda'),
    mock.patch.object(jax, 'device_count', lambda: 1),
    mock.patch.object(cudnn, 'check_cudnn_version', lambda: 91000),
  ):
    traced = loss.trace(jax.eval_shape(lambda: random_params(net)))
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('@__cudnn$fmhaScaleBiasSoftmax(') == 1
  assert text.count('@__cudnn$fmhaScaleBiasSoftmaxBackward(') == 1


# -------------------------------------------------------------------- dropout


class DroppedWeights(nn.Module):
  """Attention with dropout of weights, as in `Attention`."""

  @nn.compact
  def __call__(self, x, mask):
    def project(name):
      y = layers.Dense(16, ('embed', 'joined_kv'), name=name)(x)
      return y.reshape(*x.shape[:2], 2, 8)

    q, k, v = map(project, ('query', 'key', 'value'))
    logits = jnp.einsum('bqhd,bkhd->bhqk', q, k)
    weights = nn.softmax(jnp.where(mask, logits, fused.MASKED))
    weights = nn.Dropout(0.5, broadcast_dims=(-2,))(
      weights, deterministic=False
    )
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, v).reshape(*x.shape[:2], 16)
    return layers.Dense(16, ('joined_kv', 'embed'), name='out')(y)


def test_dropping_values_is_dropping_weights_key_by_key_as_t5x_does():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, 6, 16)).astype(np.float32)
  mask = np.tril(np.ones((6, 6), bool))[None, None]
  attention = attention_lib.Attention(2, 8, dropout_rate=0.5)
  variables = attention.init(jax.random.key(0), x, x, mask)
  key = {'dropout': jax.random.key(1)}
  got = attention.apply(variables, x, x, mask, enable_dropout=True, rngs=key)
  want = DroppedWeights().apply(
    {'params': variables['params']}, x, mask, rngs=key
  )
  np.testing.assert_allclose(got, want, atol=1e-5)
  kept = attention.apply(variables, x, x, mask)
  assert np.abs(got - kept).max() > 0.1


def test_joined_rows_drop_the_same_keys():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((6, 5, 16)).astype(jnp.bfloat16)
  mask = np.tril(np.ones((5, 5), bool))[None, None]
  bias = rng.standard_normal((1, 2, 5, 5)).astype(np.float32)
  attention = attention_lib.Attention(2, 8, jnp.bfloat16, dropout_rate=0.5)
  variables = attention.init(jax.random.key(0), x, x, mask, bias)
  compute = functools.partial(
    attention.apply, enable_dropout=True, rngs={'dropout': jax.random.key(1)}
  )
  want = compute(variables, x, x, mask, bias)
  with on('tpu'):
    assert (
      fused.rows_joined(None, x.reshape(6, 5, 2, 8), x[..., None], bias) == 6
    )
    got = compute(variables, x, x, mask, bias)
  np.testing.assert_allclose(
    got.astype(np.float32), want.astype(np.float32), atol=2e-2
  )


# ----------------------------------------------------------------------- bias


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize('length', [1, 9, 150])
def test_a_tpu_makes_the_same_bias_without_looking_up(bidirectional, length):
  module = attention_lib.RelativePositionBias(4, bidirectional)
  variables = module.init(jax.random.key(0), length)
  want = module.apply(variables, length)
  with mock.patch.object(attention_lib.tpu, 'platform', lambda: 'tpu'):
    got = module.apply(variables, length)
  np.testing.assert_array_equal(got, want)
