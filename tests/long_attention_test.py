"""LongT5's encoder attention: blocks, global sums, padding, packed rows."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ptune.convert import identity, open_checkpoint
from ptune.convert.source import Leaf
from ptune.convert.t5x import write_t5x
from ptune.methods import prefix, prompt, row_prompts
from ptune.model import network, scan, sizes
from ptune.model.adapters import Placement

FULL = sizes.T5Config(
  vocab_size=32,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  mlp_dim=12,
  num_encoder_layers=2,
  num_decoder_layers=1,
)
# Blocks have 4 and 3 positions; no length here is a multiple of both.
LOCAL = dataclasses.replace(FULL, local_radius=3)
GLOBAL = dataclasses.replace(LOCAL, global_block_size=3)
ROWS = 2


@functools.cache
def params(config, placements=()):
  net = network.Transformer(config, placements)
  tokens = jnp.ones((ROWS, 10), jnp.int32)
  init = functools.partial(net.init, enable_dropout=False)
  made = jax.jit(init)(jax.random.key(0), tokens, tokens, tokens)['params']
  flat = traverse_util.flatten_dict(made, sep='/')
  rng = np.random.default_rng(0)
  for path, x in flat.items():
    if path.endswith(('/rel_embedding', '/scale')):
      flat[path] = jnp.asarray(rng.normal(1, 0.5, x.shape), jnp.float32)
  return traverse_util.unflatten_dict(flat, sep='/')


@functools.cache
def _encode(config, placements=()):
  net = network.Transformer(config, placements)
  return jax.jit(
    functools.partial(net.apply, enable_dropout=False, method='encode')
  )


def encoded(config, tokens, given=None, segments=None, placements=()):
  given = params(config, placements) if given is None else given
  out = _encode(config, placements)({'params': given}, tokens, segments)
  return np.asarray(out)


def tokens_of(length, seed=1):
  rng = np.random.default_rng(seed)
  return rng.integers(2, 32, (ROWS, length), np.int32)


class Band:
  """The mask of local attention, with an entry for each pair of positions."""

  def __init__(self, name):
    del name

  def __call__(self, x, y):
    place = jnp.arange(y.shape[-1])
    near = jnp.abs(place[:, None] - place[None, :]) <= LOCAL.local_radius
    return y & near[None, None]


@pytest.mark.parametrize('length', [1, 11])
def test_local_attention_is_that_of_t5_with_a_band_as_its_mask(length):
  tokens = tokens_of(length)
  tokens[1, length // 2 + 1 :] = 0
  want = encoded(
    FULL,
    tokens,
    params(LOCAL),
    placements=(Placement('encoder/mask', 'band', Band),),
  )
  got = encoded(LOCAL, tokens)
  np.testing.assert_allclose(
    got[tokens > 0], want[tokens > 0], rtol=1e-5, atol=1e-5
  )
  if length > 2 * LOCAL.local_radius:
    whole = encoded(FULL, tokens, params(LOCAL))
    assert np.abs(got - whole)[tokens > 0].max() > 1e-2


def test_a_sum_is_seen_from_far_away():
  tokens = tokens_of(24)
  changed = tokens.copy()
  changed[:, 0] = 2 + (tokens[:, 0] - 1) % 30
  differ = lambda config: np.abs(
    encoded(config, tokens) - encoded(config, changed)
  ).max(axis=(0, 2))
  # Through two layers, local attention reaches two radii.
  assert differ(LOCAL)[7:].max() == 0
  assert differ(GLOBAL)[7:].min() > 1e-5


@pytest.mark.parametrize('config', [LOCAL, GLOBAL], ids=['local', 'global'])
@pytest.mark.parametrize('length', [2, 7])
def test_padding_never_changes_what_is_encoded(config, length):
  tokens = tokens_of(length)
  tokens[1, length // 2 :] = 0
  want = encoded(config, tokens)
  for added in (2, 9):
    padded = np.pad(tokens, ((0, 0), (0, added)))
    got = encoded(config, padded)[:, :length]
    np.testing.assert_allclose(
      got[tokens > 0], want[tokens > 0], rtol=1e-5, atol=1e-5
    )
  filled = dataclasses.replace(config, length_multiple=8)
  got = encoded(filled, tokens, params(config))
  assert got.shape == want.shape
  np.testing.assert_allclose(
    got[tokens > 0], want[tokens > 0], rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize('config', [LOCAL, GLOBAL], ids=['local', 'global'])
def test_a_shorter_prompt_of_a_batch_answers_as_it_does_alone(config):
  tokens = tokens_of(9)
  rng = np.random.default_rng(3)
  lengths = [2, 5]
  prompts = [rng.normal(size=(n, 8)).astype(np.float32) for n in lengths]
  both = np.zeros((ROWS, 5, 8), np.float32)
  for row, rows in zip(both, prompts, strict=True):
    row[5 - len(rows) :] = rows
  base = traverse_util.flatten_dict(params(config), sep='/')

  def run(rows, lengths, tokens):
    added = row_prompts.row_parameters(
      jnp.asarray(rows), jnp.asarray(lengths, jnp.int32)
    )
    given = traverse_util.unflatten_dict({**base, **added}, sep='/')
    return encoded(config, tokens, given, placements=row_prompts.per_row())

  got = run(both, lengths, tokens)
  for i, rows in enumerate(prompts):
    alone = run(rows[None], lengths[i : i + 1], tokens[i : i + 1])
    np.testing.assert_allclose(
      got[i, 5 - len(rows) :], alone[0], rtol=1e-5, atol=1e-5
    )


def test_packed_examples_are_as_alone_in_local_attention():
  tokens = tokens_of(11)
  segments = np.repeat([[1] * 5 + [2] * 6], ROWS, axis=0)
  got = encoded(LOCAL, tokens, segments=segments)
  for part in (slice(0, 5), slice(5, 11)):
    want = encoded(LOCAL, tokens[:, part])
    np.testing.assert_allclose(got[:, part], want, rtol=1e-5, atol=1e-5)


def test_packed_examples_are_refused_in_transient_global_attention():
  tokens = tokens_of(11)
  with pytest.raises(ValueError, match=r'cannot be packed .set PACK = False'):
    encoded(GLOBAL, tokens, segments=np.ones_like(tokens))
  causal = prompt.prompt(3, causal=True).placements
  with pytest.raises(ValueError, match='cannot be causal'):
    params(GLOBAL, causal)


@pytest.mark.parametrize('config', [LOCAL, GLOBAL], ids=['local', 'global'])
def test_scanned_layers_and_those_that_are_computed_again_are_the_same(config):
  tokens = tokens_of(11)
  want = encoded(config, tokens)
  for change in ({'scan': True}, {'remat': True}):
    other = dataclasses.replace(config, **change)
    given = params(config)
    given = scan.stacked(given) if other.scan else given
    np.testing.assert_allclose(
      encoded(other, tokens, given), want, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize('config', [LOCAL, GLOBAL], ids=['local', 'global'])
def test_a_prefix_is_seen_from_every_block(config):
  method = prefix.prefix(2)
  tokens = tokens_of(13)
  made = params(config, method.placements)

  def out(given):
    given = traverse_util.unflatten_dict(given, sep='/')
    return encoded(config, tokens, given, placements=method.placements)

  flat = traverse_util.flatten_dict(made, sep='/')
  want = out(flat)
  moved = {
    path: x + 1.0 if path.startswith('encoder/') and 'prefix' in path else x
    for path, x in flat.items()
  }
  assert np.abs(out(moved) - want).max(axis=(0, 2)).min() > 1e-4


@pytest.mark.parametrize('config', [LOCAL, GLOBAL], ids=['local', 'global'])
def test_no_array_grows_with_the_square_of_the_length(config):
  net = network.Transformer(config)
  length = 4096

  def largest(jaxpr):
    most = 0
    for equation in jaxpr.eqns:
      for out in equation.outvars:
        most = max(most, np.prod(out.aval.shape, dtype=np.int64))
      for value in equation.params.values():
        inner = getattr(value, 'jaxpr', value)
        if hasattr(inner, 'eqns'):
          most = max(most, largest(inner))
    return most

  jaxpr = jax.make_jaxpr(
    functools.partial(net.apply, enable_dropout=False, method='encode')
  )({'params': params(config)}, jnp.ones((1, length), jnp.int32))
  heads, sums = config.num_heads, 0
  if config.global_block_size:
    sums = length // config.global_block_size
  near = 3 * (config.local_radius + 1)
  assert largest(jaxpr.jaxpr) <= heads * length * (near + sums)


def test_bfloat16_is_near_float32():
  tokens = tokens_of(11)
  half = dataclasses.replace(GLOBAL, dtype='bfloat16')
  got = encoded(half, tokens, params(GLOBAL)).astype(np.float32)
  want = encoded(GLOBAL, tokens)
  assert np.abs(got - want).mean() < 0.02 * np.abs(want).mean()


@pytest.mark.parametrize('config', [LOCAL, GLOBAL], ids=['local', 'global'])
def test_a_checkpoint_of_t5x_has_these_names_and_says_no_radius(
  tmp_path, config
):
  flat = traverse_util.flatten_dict(params(config), sep='/')
  leaves = {}
  for path, x in flat.items():
    x = np.asarray(x)
    leaves[path] = Leaf(x.shape, x.dtype, x.__getitem__)
  (tmp_path / 'checkpoint_5').mkdir()
  write_t5x(tmp_path / 'checkpoint_5', leaves, 5)
  source = open_checkpoint(tmp_path / 'checkpoint_5')
  assert identity.base_leaves(source).keys() == flat.keys()
  read = identity.config(source)
  if config is LOCAL:  # T5X has it in the gin file.
    assert read.local_radius == 0
    identity.check_config(source, config)
  else:
    assert (read.local_radius, read.global_block_size) == (127, 16)
    with pytest.raises(ValueError, match='global_block_size'):
      identity.check_config(source, FULL)


def test_sizes_that_make_no_network_are_refused():
  with pytest.raises(ValueError, match='only beside a local_radius'):
    dataclasses.replace(FULL, global_block_size=4)
  with pytest.raises(ValueError, match='share a position bias'):
    dataclasses.replace(LOCAL, relative_attention_per_layer=True)


@pytest.mark.parametrize(
  ('key', 'value'),
  [('encoder_attention_type', 'global'), ('local_radius', 0)],
)
def test_other_attention_is_refused_before_weights_are_read(
  tmp_path, key, value
):
  said = {'model_type': 'longt5', 'feed_forward_proj': 'gated-gelu', key: value}
  (tmp_path / 'config.json').write_text(json.dumps(said))
  (tmp_path / 'model.safetensors').write_text('never read')
  with pytest.raises(ValueError, match=f'{key} {value!r}: expected'):
    open_checkpoint(tmp_path)
