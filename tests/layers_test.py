"""Products in low precision, and frozen weights in bfloat16 and int8."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptune import convert
from ptune.convert import identity
from ptune.methods import full, lora, prompt
from ptune.model import attention as attention_lib
from ptune.model import (
  frozen_weights,
  fused,
  layers,
  model_info,
  network,
  parameters,
  partitioning,
  sizes,
  structure,
)
from ptune.model.models import EncoderDecoderModel
from tests.network_test import SHALLOW, TINY, make_batch, random_params

SPECS = {
  'bti,io->bto': ((2, 5, 8), (8, 3)),
  'ti,oi->to': ((5, 8), (3, 8)),
  'bkhd,bqhd->bhqk': ((2, 5, 3, 8), (2, 4, 3, 8)),
  'bhqk,bkhd->bqhd': ((2, 3, 4, 5), (2, 5, 3, 8)),
  # Products of attention with absorbed kernels.
  'bqhd,ihd->bqhi': ((2, 4, 3, 8), (9, 3, 8)),
  'bki,bqhi->bhqk': ((2, 5, 9), (2, 4, 3, 9)),
  'bki,bhqk->bhqi': ((2, 5, 9), (2, 3, 4, 5)),
  'ihd,bhqi->bqhd': ((9, 3, 8), (2, 3, 4, 9)),
}


def operands(shapes, dtype):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


@pytest.mark.parametrize('spec', SPECS)
def test_a_product_and_its_derivatives_are_those_of_einsum(spec):
  a, b = operands(SPECS[spec], jnp.float32)
  out, pull = jax.vjp(lambda a, b: layers.product(spec, a, b), a, b)
  want, want_pull = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), a, b)
  np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)
  cotangent = jnp.cos(out)
  for got, expected in zip(pull(cotangent), want_pull(cotangent), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('spec', SPECS)
def test_no_operand_of_a_low_precision_product_is_widened(spec):
  a, b = operands(SPECS[spec], jnp.bfloat16)

  def both(a, b):
    out, pull = jax.vjp(lambda a, b: layers.product(spec, a, b), a, b)
    return out, pull(out)

  text = jax.jit(both).lower(a, b).as_text()
  dots = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(dots) == 3
  for line in dots:
    types = line.rsplit(': (', 1)[1]
    assert types.count('xbf16>') == 2 and types.count('xf32>') == 1, line
  out, grads = jax.jit(both)(a, b)
  assert out.dtype == jnp.float32
  assert [g.dtype for g in grads] == [jnp.bfloat16] * 2


@pytest.mark.parametrize(
  ('dtype', 'close'), [('float32', 1e-6), ('bfloat16', 1e-2)]
)
def test_a_softmax_divided_last_is_a_softmax(dtype, close):
  logits, v = operands(((2, 3, 4, 50), (2, 3, 50, 8)), jnp.float32)
  logits = logits * 30  # T5 does not scale its logits.
  mask = jnp.arange(50) < 40
  exponentials = functools.partial(
    attention_lib.exponentials, jnp.dtype(dtype), mask=mask
  )

  def ours(logits, v):
    weights, total = exponentials(logits)
    return weights.astype(jnp.float32) @ v / total[..., None]

  def softmax(logits, v):
    return jax.nn.softmax(jnp.where(mask, logits, attention_lib.MASKED)) @ v

  got, pull = jax.vjp(ours, logits, v)
  want, want_pull = jax.vjp(softmax, logits, v)
  np.testing.assert_allclose(got, want, atol=close)
  for a, b in zip(pull(want), want_pull(want), strict=True):
    np.testing.assert_allclose(a, b, atol=10 * close)
  # The backward pass keeps only one array of the logits' size: the
  # exponentials.
  (weights, total), pull = jax.vjp(exponentials, logits)
  kept = [x for x in jax.tree.leaves(pull) if x.shape == logits.shape]
  assert [x.dtype for x in kept] == [weights.dtype] == [dtype]
  assert total.dtype == jnp.float32
  # A row whose keys are all masked attends to all of them, which avoids a
  # division by 0.
  _, total = attention_lib.exponentials(jnp.dtype(dtype), logits, mask & False)
  assert (total == 50).all()


# With so few targets, absorbing takes fewer multiplications per row and head: 2
# x 32 x (16 + 5 + 8) instead of (16 + 5) x 8 x (32 + 2).
FEW = make_batch([16, 9, 1, 5], [2, 2, 1, 2], 16, 2)


def loss_and_gradients(config, batch, method, dropout=False):
  """Returns a compiled params -> (loss, gradients), and random parameters."""
  net = network.Transformer(config, method.placements)
  rng = jax.random.key(3) if dropout else None

  @jax.jit
  def run(params):
    return jax.value_and_grad(
      lambda p: EncoderDecoderModel(net).loss(p, batch, rng)[0]
    )(params)

  return run, random_params(net)


@pytest.mark.parametrize('kernel', [False, True], ids=['xla', 'pallas'])
@pytest.mark.parametrize('dropout', [False, True])
def test_attention_without_keys_and_values_is_the_same(
  dropout, kernel, monkeypatch
):
  config = dataclasses.replace(SHALLOW, dropout_rate=0.2)
  # The TPU's, interpreted.
  monkeypatch.setattr(fused, 'fits_absorbed', lambda *arrays: kernel)
  attend, called = fused.attend_absorbed, []
  monkeypatch.setattr(
    fused,
    'attend_absorbed',
    lambda *arrays: called.append(1) or attend(*arrays),
  )
  found = []
  for absorbs in (False, True):
    monkeypatch.setattr(
      attention_lib.Attention,
      '_absorbs',
      lambda self, q, kv, absorbs=absorbs: absorbs and q is not kv,
    )
    run, params = loss_and_gradients(config, FEW, prompt.prompt(5), dropout)
    text = run.lower(params).as_text()
    # Only absorbed attention has this array: [batch, heads, q, embed].
    assert ('4x4x2x32x' in text) == absorbs
    assert bool(called) == (absorbs and kernel)
    found.append(run(params))
  (loss, grads), (again, grads_again) = found
  np.testing.assert_allclose(again, loss, rtol=1e-6)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(grads),
    jax.tree.leaves(grads_again),
    strict=True,
  ):
    np.testing.assert_allclose(
      b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max(), err_msg=str(path)
    )


def test_attention_reads_int8_kernels_without_keys_and_values(monkeypatch):
  rng = np.random.default_rng(0)
  attention = attention_lib.Attention(4, 8)
  q, kv = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((2, 3, 32), (2, 9, 32))
  )
  mask = jnp.arange(9)[None, None, None] < np.array([9, 5])[:, None, None, None]
  params = attention.init(jax.random.key(0), q, kv, mask)['params']
  params = {
    name: {
      'kernel': jnp.asarray(100 * held['kernel'], jnp.int8),
      'kernel_scale': jnp.asarray(rng.uniform(0.001, 0.02, 32), jnp.float32),
    }
    for name, held in params.items()
  }
  want = attention.apply({'params': params}, q, kv, mask)
  monkeypatch.setattr(attention_lib.Attention, '_absorbs', lambda *inputs: True)
  got = attention.apply({'params': params}, q, kv, mask)
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
  ('targets', 'dtype', 'method', 'absorbed'),
  [
    (2, 'bfloat16', prompt.prompt(5), True),
    # In float32, attention computes in T5's order.
    (2, 'float32', prompt.prompt(5), False),
    # With so many targets, absorbing would cost more or keep more.
    (8, 'bfloat16', prompt.prompt(5), False),
    # Decoding makes keys and values only once.
    (1, 'bfloat16', prompt.prompt(5), False),
    # An adapter needs the values.
    (2, 'bfloat16', lora.lora(rank=2), False),
  ],
  ids=['few', 'float32', 'many', 'one', 'adapted'],
)
def test_keys_and_values_are_made_where_they_are_needed(
  targets, dtype, method, absorbed
):
  config = dataclasses.replace(SHALLOW, dtype=dtype)
  batch = make_batch([16, 9, 1, 5], [targets, 1, 1, 1], 16, targets)
  run, params = loss_and_gradients(config, batch, method)
  assert (f'4x4x{targets}x32x' in run.lower(params).as_text()) == absorbed
  # Whoever lists the sites gets these too.
  sites = structure.sites(network.Transformer(config, method.placements))
  site = 'decoder/layers_0/encoder_decoder_attention'
  assert {f'{site}/key', f'{site}/values'} <= set(sites)


@pytest.mark.parametrize('rows', [1, 3])
@pytest.mark.parametrize('targets', [2, 16])
def test_absorbed_kernels_learn_the_same_in_bfloat16(
  rows, targets, monkeypatch
):
  # XLA's CPU backend lacks some bfloat16 products, but not these.
  config = sizes.T5Config(
    vocab_size=96,
    emb_dim=96,
    num_heads=2,
    head_dim=64,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.1,
    dtype='bfloat16',
  )
  batch = make_batch([150] * rows, [targets] * rows, 150, targets)
  run, params = loss_and_gradients(config, batch, prompt.prompt(5), True)
  assert f'{rows}x2x{targets}x96x' in run.lower(params).as_text()
  loss, grads = run(params)
  monkeypatch.setattr(
    attention_lib.Attention, '_absorbs', lambda *inputs: False
  )
  run, _ = loss_and_gradients(config, batch, prompt.prompt(5), True)
  assert f'{rows}x2x{targets}x96x' not in run.lower(params).as_text()
  want, want_grads = run(params)
  np.testing.assert_allclose(loss, want, rtol=1e-2)
  found, want = parameters.flatten(grads), parameters.flatten(want_grads)
  site = 'decoder/layers_0/encoder_decoder_attention'
  names = ('query', 'key', 'value', 'out')
  for path in (prompt.PATH, *(f'{site}/{name}/kernel' for name in names)):
    assert cosine(found[path], want[path]) > 0.99, path


def cosine(a, b):
  a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@functools.cache
def pretrained():
  """Returns the weights of ptune://tiny, and a batch in its vocabulary."""
  source = convert.open_checkpoint('ptune://tiny')
  weights = {path: leaf.read() for path, leaf in source.leaves.items()}
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, 2900, (4, 30), np.int32)
  targets = rng.integers(3, 2900, (4, 6), np.int32)
  batch = {
    'encoder_input_tokens': tokens,
    'decoder_target_tokens': targets,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': np.ones_like(targets),
  }
  return identity.config(source), weights, batch


def prompt_gradient(dtype, frozen_dtype=None):
  config, weights, batch = pretrained()
  config = dataclasses.replace(config, dtype=dtype, frozen_dtype=frozen_dtype)
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(config, prompt.prompt(20), mesh)
  frozen = {
    path: jnp.asarray(weights[path], plan.params[path].dtype)
    for path in plan.frozen
  }
  held = frozen_weights.freeze(plan, frozen)
  assert {k: (x.shape, x.dtype) for k, x in held.items()} == {
    k: (x.shape, x.dtype) for k, x in frozen_weights.shapes(plan).items()
  }
  model = EncoderDecoderModel(plan.network)

  def loss(p):
    params = parameters.unflatten(held | {prompt.PATH: p})
    return model.loss(params, batch)[0]

  rows = np.asarray(weights['token_embedder/embedding'][100:120], np.float32)
  return jax.jit(jax.grad(loss))(rows)


@pytest.mark.parametrize(
  ('dtype', 'frozen_dtype', 'least'),
  [
    ('bfloat16', None, 0.999),
    *(
      pytest.param('float32', frozen, least, marks=pytest.mark.slow)
      for frozen, least in (('bfloat16', 0.999), ('int8', 0.995))
    ),
    ('bfloat16', 'int8', 0.995),
  ],
)
def test_the_prompt_learns_the_same_in_low_precision(
  dtype, frozen_dtype, least, record_property
):
  found = cosine(
    prompt_gradient(dtype, frozen_dtype), prompt_gradient('float32')
  )
  record_property('gradient_cosine', float(found))
  assert found >= least


def test_int8_holds_a_channel_to_half_a_step_and_zeros_exactly():
  config = dataclasses.replace(TINY, frozen_dtype='int8')
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(config, prompt.prompt(2), mesh)
  path = 'encoder/layers_0/mlp/wo/kernel'
  value = np.random.default_rng(0).standard_normal(plan.params[path].shape)
  value[:, 3] = 0
  frozen = {path: jnp.asarray(value, jnp.float32)}
  held = frozen_weights.freeze(plan, frozen)
  assert not frozen, 'the caller keeps no second copy'
  values, scale = held[path], held[f'{path}_scale']
  assert values.dtype == jnp.int8
  scale = np.asarray(scale)[None]
  error = np.abs(np.asarray(values, np.float32) * scale - value)
  assert np.all(error <= scale / 2 + 1e-6)
  assert not error[:, 3].any()


@pytest.mark.parametrize(
  ('frozen_dtype', 'most'), [('bfloat16', 0.501), ('int8', 0.27)]
)
def test_frozen_weights_take_a_half_and_a_quarter(frozen_dtype, most):
  def size(kept):
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    config = sizes.t5('t5_1_1_small', frozen_dtype=kept)
    plan = parameters.plan(config, prompt.prompt(100), mesh)
    return sum(map(model_info.nbytes, frozen_weights.shapes(plan).values()))

  assert size(frozen_dtype) / size('float32') <= most


def test_what_is_trained_stays_float32():
  config = dataclasses.replace(TINY, frozen_dtype='int8')
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(config, full.full(), mesh)
  assert not frozen_weights.shapes(plan)
  assert {x.dtype for x in plan.params.values()} == {jnp.dtype(jnp.float32)}
