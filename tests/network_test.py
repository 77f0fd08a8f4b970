"""The network: comparisons with the reference, and invariants."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning
from jax import lax

from ptune import convert
from ptune.methods import prompt
from ptune.model import decoding, network, sizes, structure
from ptune.model.adapters import Placement
from ptune.model.masks import grow
from ptune.model.models import Decoding, EncoderDecoderModel

TINY = sizes.T5Config(
  vocab_size=128,
  emb_dim=32,
  num_heads=4,
  head_dim=8,
  mlp_dim=64,
  num_encoder_layers=2,
  num_decoder_layers=3,
)
# T5 1.0: ReLU, and the embedding is also the output layer.
TIED = dataclasses.replace(
  TINY, mlp_activations=('relu',), logits_via_embedding=True
)
SHALLOW = dataclasses.replace(TINY, num_encoder_layers=1, num_decoder_layers=1)


def load(path):
  with np.load(path) as f:
    return dict(f)


def nested(flat):
  return traverse_util.unflatten_dict(flat, sep='/')


@functools.cache  # To compile programs only once.
def prompted(config, length):
  return network.Transformer(config, prompt.prompt(length).placements)


PLAIN, PROMPTED = network.Transformer(TINY), prompted(TINY, 5)


@functools.cache
def random_params(net):
  """Returns parameters that all differ, also norms, so that mix-ups show."""
  rng = np.random.default_rng(0)
  values = {}
  for path, struct in structure.parameters(net).items():
    value = rng.standard_normal(struct.shape, np.float32)
    if path.endswith('scale'):
      value = 1 + 0.2 * value
    elif path.endswith('kernel'):
      value = value * struct.shape[0] ** -0.5
    values[path] = value.astype(np.float32)
  return nested(values)


def padded(rows, length):
  return np.stack([np.pad(row, (0, length - len(row))) for row in rows])


def make_batch(inputs, targets, encoder_length=16, decoder_length=10):
  """Returns the features of rows, given as token lists or as lengths."""
  rng = np.random.default_rng(0)
  inputs, targets = (
    [rng.integers(2, 96, r) if isinstance(r, int) else r for r in rows]
    for rows in (inputs, targets)
  )
  target_tokens = padded(targets, decoder_length)
  features = {
    'encoder_input_tokens': padded(inputs, encoder_length),
    'decoder_input_tokens': padded(
      [[0, *t[:-1]] for t in targets], decoder_length
    ),
    'decoder_target_tokens': target_tokens,
    'decoder_loss_weights': target_tokens > 0,
  }
  return {k: v.astype(np.int32) for k, v in features.items()}


BATCH = make_batch([16, 9, 1], [10, 4, 1])


@functools.cache
def forward(net):
  """Returns a program (params, batch) -> encoder outputs, logits (NumPy)."""

  def run(params, batch):
    return encode(net, params, batch), EncoderDecoderModel(net).logits(
      params, batch
    )

  run = jax.jit(run)
  return lambda *args: jax.device_get(run(*args))


def encode(net, params, batch, **kwargs):
  return net.apply(
    {'params': params},
    batch['encoder_input_tokens'],
    enable_dropout=False,
    method='encode',
    **kwargs,
  )


def real_positions(batch, encoded):
  """Returns masks of real positions, for encoder outputs and for logits."""
  tokens = batch['encoder_input_tokens'] > 0
  added = encoded.shape[1] - tokens.shape[1]
  return (
    np.pad(tokens, ((0, 0), (added, 0)), constant_values=True),
    batch['decoder_loss_weights'] > 0,
  )


# --------------------------------------------------- equal to the references


@pytest.mark.parametrize('case', ['noprompt', 'p5', 'p100', 'p5_long_targets'])
def test_equals_the_reference_implementation(numerics, case):
  folder = numerics / 'prompt_encoder'
  params = load(folder / 'params.npz')
  want = load(folder / f'case_{case}.npz')
  length = {'noprompt': 0, 'p100': 100}.get(case, 5)
  if length:
    params[prompt.PATH] = load(folder / 'prompts.npz')[f'prompt_p{length}']
    net = prompted(TINY, length)
  else:
    net = PLAIN
  check(net, params, want)


@functools.cache
def evaluation(net, with_gradient):
  """Returns a program that computes all values that the references recorded."""
  model = EncoderDecoderModel(net)

  def run(params, batch):
    outputs = {
      'encoded': encode(net, params, batch),
      'logits': model.logits(params, batch),
      'score': model.score(params, batch),
    }
    if with_gradient:
      (loss, sums), grads = jax.value_and_grad(model.loss, has_aux=True)(
        params, batch
      )
      # Only the gradient of the prompt; XLA removes the computation of the
      # others.
      outputs['gradient'] = grads['encoder']['prompt']['prompt']['prompt']
    else:
      loss, sums = model.loss(params, batch)
    return outputs | {'loss': loss, 'sums': sums}

  run = jax.jit(run)
  return lambda *args: jax.device_get(run(*args))


def check(net, params, want):
  inputs = ('encoder_input_', 'decoder_')
  batch = {k: v for k, v in want.items() if k.startswith(inputs)}
  got = evaluation(net, 'grad_prompt' in want)(nested(params), batch)
  if 'encoder_outputs' in want:
    # The reference zeroes padded positions. Here they may hold any value.
    valid = np.any(want['encoder_outputs'] != 0, axis=-1)
    np.testing.assert_allclose(
      np.where(valid[..., None], got['encoded'], 0),
      want['encoder_outputs'],
      atol=5e-5,
    )
  real = batch['decoder_loss_weights'] > 0
  np.testing.assert_allclose(
    got['logits'][real], want['logits'][real], atol=5e-5
  )
  sums = got['sums']
  np.testing.assert_allclose(got['loss'], want['loss'], rtol=2e-6)
  np.testing.assert_array_equal(got['loss'], sums['loss'])
  if 'z_loss' in want:
    np.testing.assert_allclose(sums['z_loss'], want['z_loss'], rtol=2e-5)
  np.testing.assert_allclose(
    got['score'], want['score_batch'], atol=1e-4, rtol=1e-6
  )
  right = np.argmax(got['logits'], axis=-1) == batch['decoder_target_tokens']
  assert sums['correct'] == np.sum(right & real)
  assert sums['tokens'] == np.sum(real)
  if 'grad_prompt' in want:
    np.testing.assert_allclose(
      got['gradient'],
      want['grad_prompt'],
      atol=2e-5 * np.abs(want['grad_prompt']).max(),
    )


def open_family(directory):
  """Returns configuration and parameters of a Hugging Face directory."""
  source = convert.open_checkpoint(directory)
  numbers = convert.sizes(source.shapes)
  numbers.pop('gated')
  config = sizes.t5(**numbers, mlp_activations=source.activations)
  abstract = structure.parameters(network.Transformer(config))
  return config, convert.restore(source, abstract)


@pytest.mark.parametrize('with_prompt', [False, True])
@pytest.mark.parametrize('family', ['t5_1_1', 't5_1_0', 'mt5', 'byt5'])
def test_equals_hugging_face(numerics, family, with_prompt):
  config, params = open_family(numerics / 'hf' / family)
  if family == 't5_1_1':  # It has the same weights as the reference.
    folder = numerics / 'prompt_encoder'
    case = load(folder / f'case_{"p5" if with_prompt else "noprompt"}.npz')
    case['prompt'] = load(folder / 'prompts.npz')['prompt_p5']
  else:
    case = load(numerics / 'hf' / family / 'case.npz')
    if with_prompt:
      plain = [k for k in case if f'prompted_{k}' in case]
      case |= {k: case[f'prompted_{k}'] for k in plain}
  if with_prompt:
    params[prompt.PATH] = case['prompt']
    check(prompted(config, 5), params, case)
  else:
    check(network.Transformer(config), params, case)


def hosted_by_t5x(net, params, tokens, length):
  """Returns a step function and its cache, using T5X's predict_batch calls."""
  variables = {'params': params}
  ones = jnp.ones((tokens.shape[0], length), jnp.int32)
  _, made = net.apply(
    variables,
    jnp.ones_like(tokens),
    ones,
    ones,
    decode=True,
    enable_dropout=False,
    mutable=['cache'],
  )
  encoded = net.apply(
    variables, tokens, enable_dropout=False, method=net.encode
  )

  def step(ids, cache):
    beams = ids.shape[0] // tokens.shape[0]
    logits, changed = net.apply(
      {'params': params, 'cache': cache},
      jnp.repeat(encoded, beams, axis=0),
      jnp.repeat(tokens, beams, axis=0),
      ids,
      ids,
      enable_dropout=False,
      decode=True,
      max_decode_length=length,
      mutable=['cache'],
      method=net.decode,
    )
    return logits, changed['cache']

  return step, made['cache']


@pytest.fixture
def decodes(numerics):
  """Returns the recorded decodes and the parameters behind them."""
  golden = load(numerics / 'decoding' / 'decoding.npz')
  params = load(numerics / 'prompt_encoder' / 'params.npz')
  params['decoder/logits_dense/kernel'] = golden['logits_kernel']
  params[prompt.PATH] = golden['prompt']
  return golden, nested(params)


def test_greedy_decodes_equal_the_reference(decodes):
  golden, params = decodes
  model = EncoderDecoderModel(PROMPTED)
  inputs = golden['encoder_input_tokens']
  tokens, score = jax.jit(model.predict, static_argnums=2)(params, inputs, 12)
  np.testing.assert_array_equal(tokens, golden['greedy_tokens'])
  np.testing.assert_allclose(score, golden['greedy_logprob'], atol=1e-4)

  targets = golden['greedy_tokens']
  batch = make_batch(
    [row[row > 0] for row in inputs], [row[row > 0] for row in targets], 24, 12
  )
  logits = np.asarray(forward(PROMPTED)(params, batch)[1])
  np.testing.assert_allclose(
    logits[targets > 0],
    golden['greedy_teacher_forced_logits'][targets > 0],
    atol=5e-5,
  )


@pytest.mark.parametrize(
  ('beams', 'alpha', 'through_predict'),
  [(4, 0.6, False), (2, 1.0, False), (4, 0.0, True)],
)
def test_beams_equal_the_reference(decodes, beams, alpha, through_predict):
  golden, params = decodes
  inputs = golden['encoder_input_tokens']

  @jax.jit
  def search(params):
    if through_predict:
      how = Decoding(num_beams=beams, alpha=alpha)
      best = EncoderDecoderModel(PROMPTED).predict(params, inputs, 12, how)
      return [x[:, None] for x in best]
    step, cache = hosted_by_t5x(PROMPTED, params, inputs, 12)
    return decoding.beam_search(
      step, cache, inputs.shape[0], 12, num_beams=beams, alpha=alpha
    )

  tokens, scores = jax.device_get(search(params))
  name = f'beam{beams}_alpha{alpha}'
  want_tokens, want = golden[f'{name}_tokens'], golden[f'{name}_scores']
  if through_predict:  # Returns only the last, which is best.
    want_tokens, want = want_tokens[:, -1:], want[:, -1:]
  np.testing.assert_array_equal(tokens, want_tokens)
  empty = want <= -1e6
  np.testing.assert_array_equal(scores <= -1e6, empty)
  np.testing.assert_allclose(scores[~empty], want[~empty], atol=1e-4)


def test_beams_and_a_temperature_exclude_each_other():
  with pytest.raises(ValueError, match=r'num_beams is 4 and temperature 0.5'):
    Decoding(num_beams=4, temperature=0.5)


# ------------------------------------------------------------ sizes and names


@pytest.mark.parametrize(
  ('name', 'count'),
  {
    # Counts of Lester et al., 2021. The others are transformers'
    # num_parameters(), which does not count the output kernel of mT5 and ByT5
    # if it considers it tied.
    't5_1_1_small': 76_961_152,
    't5_1_1_base': 247_577_856,
    't5_1_1_large': 783_150_080,
    't5_1_1_xl': 2_849_757_184,
    't5_1_1_xxl': 11_135_332_352,
    't5_small': 60_506_624,
    'mt5_small': 300_176_768,
    'byt5_small': 299_637_760,
    # The model cards give these exact counts,
    'pile_t5_base': 247_586_304,
    'pile_t5_large': 783_173_632,
    'pile_t5_xl': 2_849_804_288,
    'pile_t5_xxl': 11_135_426_560,
    # these as 2.94, 8.3, 10.7, 13 and 20 billion,
    'madlad400_3b': 2_940_374_016,
    'madlad400_7b': 8_296_829_952,
    'madlad400_10b': 10_712_585_216,
    'aya_101': 12_921_057_280,
    'flan_ul2': 19_591_209_984,
    # and these as 0.2 billion and 738 million.
    'codet5p_220m': 222_882_048,
    'codet5p_770m': 737_639_424,
    # Like mT5, with more rows in the embedding and a bias in every layer.
    'umt5_small': 306_601_984,
    'umt5_base': 592_043_520,
    'umt5_xl': 3_768_356_864,
    'umt5_xxl': 12_972_531_712,
    # Like T5 1.1; transient-global attention adds one bias and a norm in every
    # layer. These are transformers' counts.
    'long_t5_local_base': 247_577_856,
    'long_t5_local_large': 783_150_080,
    'long_t5_tglobal_base': 247_587_456,
    'long_t5_tglobal_large': 783_175_168,
    'long_t5_tglobal_xl': 2_849_807_360,
  }.items(),
)
def test_published_sizes_have_the_published_number_of_parameters(name, count):
  params = structure.parameters(network.Transformer(sizes.t5(name)))
  assert sum(math.prod(x.shape) for x in params.values()) == count


def test_flan_t5_has_the_sizes_of_t5_1_1():
  for size in ('small', 'base', 'large', 'xl', 'xxl'):
    assert sizes.t5(f'flan_t5_{size}') == sizes.t5(f't5_1_1_{size}')


def test_a_size_takes_changes_and_wrong_ones_name_what_there_is():
  changed = sizes.t5('t5_1_1_small', dropout_rate=0.1)
  assert changed.dropout_rate == 0.1
  assert changed.mlp_dim == sizes.t5('t5_1_1_small').mlp_dim
  with pytest.raises(ValueError, match='t5_1_1_small'):
    sizes.t5('t5_1_1_smal')
  with pytest.raises(ValueError, match=r"no \['d_model'\].*'emb_dim'"):
    sizes.t5('t5_1_1_small', d_model=8)
  with pytest.raises(ValueError, match=r"needs \['emb_dim', 'num_heads'"):
    sizes.t5(vocab_size=8)
  with pytest.raises(ValueError, match=r"float16.*must be 'float32'"):
    sizes.t5('t5_1_1_small', dtype='float16')
  with pytest.raises(ValueError, match=r'DROPOUT_RATE is 1.0.*\[0, 1\)'):
    sizes.t5('t5_1_1_small', dropout_rate=1.0)


def test_parameters_have_the_names_and_shapes_of_t5x(numerics):
  want = load(numerics / 'prompt_encoder' / 'params.npz')
  got = structure.parameters(PLAIN)
  assert {k: x.shape for k, x in got.items()} == {
    k: x.shape for k, x in want.items()
  }


def test_parameters_have_as_many_axis_names_as_dimensions():
  for net in (PLAIN, PROMPTED, network.Transformer(TIED)):
    params, axes = structure.parameters(net), structure.parameter_axes(net)
    assert params.keys() == axes.keys()
    for path, names in axes.items():
      assert len(names) == params[path].ndim, path
  axes = structure.parameter_axes(PROMPTED)
  assert axes[prompt.PATH] == ('prompt', 'prompt_embed')
  assert axes['token_embedder/embedding'] == ('vocab', 'embed')
  assert axes['decoder/logits_dense/kernel'] == ('embed', 'vocab')
  layer = 'decoder/layers_2/encoder_decoder_attention'
  assert axes[f'{layer}/query/kernel'] == ('embed', 'joined_kv')
  assert axes[f'{layer}/out/kernel'] == ('joined_kv', 'embed')
  assert axes['encoder/layers_0/mlp/wi_1/kernel'] == ('embed', 'mlp')
  assert axes['encoder/layers_0/mlp/wo/kernel'] == ('mlp', 'embed')


# ----------------------------------------------------------------- invariants


@pytest.mark.parametrize('net', [PLAIN, PROMPTED], ids=['plain', 'prompted'])
def test_padding_never_changes_logits(net):
  params = random_params(net)
  _, logits = forward(net)(params, BATCH)
  more = {'encoder': 7, 'decoder': 4}
  longer = {
    k: np.pad(x, ((0, 0), (0, more[k.split('_')[0]]))) for k, x in BATCH.items()
  }
  _, got = forward(net)(params, longer)
  real = BATCH['decoder_loss_weights'] > 0
  np.testing.assert_allclose(got[:, :10][real], logits[real], atol=2e-5)


@pytest.mark.parametrize('net', [PLAIN, PROMPTED], ids=['plain', 'prompted'])
def test_a_row_never_depends_on_its_neighbours(net):
  params = random_params(net)
  encoded, logits = forward(net)(params, BATCH)
  # The other rows are shuffled, and one of them is an empty filler row.
  others = {k: x[[2, 1, 0]] * [[1], [1], [0]] for k, x in BATCH.items()}
  got_encoded, got_logits = forward(net)(params, others)
  np.testing.assert_allclose(got_encoded[:2], encoded[[2, 1]], atol=1e-5)
  np.testing.assert_allclose(got_logits[:2], logits[[2, 1]], atol=1e-5)
  assert np.isfinite(got_logits).all(), 'a filler row must not spread NaN'


def test_every_prompt_row_reaches_every_position_and_the_decoder():
  params = traverse_util.flatten_dict(random_params(PROMPTED), sep='/')
  encoded, logits = forward(PROMPTED)(nested(params), BATCH)
  in_encoder, in_targets = real_positions(BATCH, encoded)
  assert in_encoder.sum() == 3 * 5 + 16 + 9 + 1
  for i in range(5):
    changed = params[prompt.PATH].copy()
    changed[i] += 0.5
    got = forward(PROMPTED)(nested(params | {prompt.PATH: changed}), BATCH)
    moved = np.abs(got[0] - encoded).max(axis=-1)
    assert moved[in_encoder].min() > 1e-3, f'prompt row {i}'
    moved = np.abs(got[1] - logits).max(axis=-1)
    assert moved[in_targets].min() > 1e-3, f'prompt row {i}'


def test_the_decoder_never_looks_ahead():
  params = random_params(PLAIN)
  _, logits = forward(PLAIN)(params, BATCH)
  changed = {k: x.copy() for k, x in BATCH.items()}
  changed['decoder_input_tokens'][0, 6] += 1
  moved = np.abs(forward(PLAIN)(params, changed)[1] - logits)[0].max(axis=-1)
  assert moved[:6].max() < 1e-5
  assert moved[6:].min() > 1e-3


@pytest.mark.parametrize(
  'net',
  [PLAIN, PROMPTED, prompted(TIED, 5)],
  ids=['plain', 'prompted', 'tied'],
)
def test_cached_decoding_equals_teacher_forcing(net):
  # 40 positions reach the logarithmic distance buckets.
  params, batch = random_params(net), make_batch([16, 9, 1], [40] * 3, 16, 40)

  @jax.jit
  def one_by_one(params):
    step, cache = hosted_by_t5x(net, params, batch['encoder_input_tokens'], 40)

    def advance(cache, ids):
      logits, cache = step(ids[:, None], cache)
      return cache, logits[:, 0]

    _, logits = lax.scan(advance, cache, batch['decoder_input_tokens'].T)
    return logits.swapaxes(0, 1)

  np.testing.assert_allclose(
    one_by_one(params), forward(net)(params, batch)[1], atol=2e-5
  )


def pack(rows):
  """[5, 6], [7] -> tokens [[5, 6, 7]], segment ids [[1, 1, 2]]."""
  ids = [np.full(len(row), i + 1) for i, row in enumerate(rows)]
  return np.concatenate(rows)[None], np.concatenate(ids)[None]


def packed_batch(batch, examples):
  """Packs the first examples of a batch into one row, with some padding."""
  packed = {}
  for stack, tokens in (('encoder', 'input'), ('decoder', 'target')):
    counts = np.sum(batch[f'{stack}_{tokens}_tokens'] > 0, axis=1)
    for key in [k for k in batch if k.startswith(stack)]:
      rows = [batch[key][i, : counts[i]] for i in range(examples)]
      packed[key], ids = pack(rows)
    packed[f'{stack}_segment_ids'] = ids
  return {
    k: np.pad(x, ((0, 0), (0, 3))).astype(np.int32) for k, x in packed.items()
  }


def test_packed_examples_equal_unpacked_ones():
  params = random_params(PLAIN)
  _, logits = forward(PLAIN)(params, BATCH)
  packed = packed_batch(BATCH, 3)
  assert packed['encoder_input_tokens'].shape == (1, 16 + 9 + 1 + 3)
  _, got = forward(PLAIN)(params, packed)
  real = BATCH['decoder_loss_weights'] > 0
  np.testing.assert_allclose(got[0, : real.sum()], logits[real], atol=2e-5)


@pytest.mark.parametrize('call', ['encode', 'logits'])
def test_packing_with_a_prompt_is_refused(call):
  params, packed = random_params(PROMPTED), packed_batch(BATCH, 3)
  with pytest.raises(ValueError, match=r'cannot be packed.*Turn packing off'):
    if call == 'encode':
      ids = packed['encoder_segment_ids']
      encode(PROMPTED, params, packed, encoder_segment_ids=ids)
    else:
      EncoderDecoderModel(PROMPTED).logits(params, packed)


def test_bfloat16_is_close_to_float32_and_its_logits_are_float32():
  config = dataclasses.replace(TINY, dtype='bfloat16')
  net, params = prompted(config, 5), random_params(PROMPTED)
  encoded, logits = forward(net)(params, BATCH)
  want_encoded, want = forward(PROMPTED)(params, BATCH)
  assert (encoded.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
  rounded = logits.astype(jnp.bfloat16).astype(np.float32)
  assert np.mean(rounded != logits) > 0.5, 'logits went through bfloat16'
  in_encoder, in_targets = real_positions(BATCH, encoded)
  for got, ref, real in (
    (encoded.astype(np.float32), want_encoded, in_encoder),
    (logits, want, in_targets),
  ):
    error = (got - ref)[real]
    assert np.sqrt(np.mean(error**2)) < 0.04 * np.std(ref)
    assert np.abs(error).max() > 1e-4, 'this is float32'


# -------------------------------------------------------------------- dropout


def test_without_dropout_the_rate_is_no_matter():
  params = random_params(PROMPTED)
  dropping = prompted(dataclasses.replace(TINY, dropout_rate=0.5), 5)
  # The program is the same, so its values are too.
  program, want = (
    jax.jit(EncoderDecoderModel(net).logits).lower(params, BATCH).as_text()
    for net in (dropping, PROMPTED)
  )
  assert program == want


@functools.cache
def dropping():
  """Returns a network with dropout 0.5, and its program with a key."""
  net = prompted(dataclasses.replace(SHALLOW, dropout_rate=0.5), 5)
  # The rows are full, so all zeros come from dropout.
  batch = make_batch([16, 16], [10, 10])

  @jax.jit
  def run(params, key):
    return net.apply(
      {'params': params},
      batch['encoder_input_tokens'],
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      rngs={'dropout': key},
      capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
      mutable=['intermediates'],
    )

  return net, lambda *args: jax.device_get(run(*args))


def test_dropout_follows_its_key():
  net, run = dropping()
  a, again, b = (
    run(random_params(net), jax.random.key(seed))[0] for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(a, again)
  assert np.abs(a - b).max() > 0.1


def test_dropout_drops_a_feature_or_a_key_wherever_it_is_seen_or_nowhere():
  net, run = dropping()
  params = random_params(net)
  _, sown = run(params, jax.random.key(0))
  found = traverse_util.flatten_dict(sown['intermediates'], sep='/')
  dropouts = {
    f'{path} {i}': np.asarray(value)
    for path, values in found.items()
    if 'Dropout' in path
    for i, value in enumerate(values)
  }
  for path, value in dropouts.items():
    zero = value == 0
    if 'attention/' in path:  # One draw drops a whole value.
      dropped = zero
      assert zero.shape[:2] == (2, TINY.num_heads), path
      assert zero.shape[2:] in [(5 + 16,), (10,)], path
    else:  # The same feature at all positions.
      dropped = np.all(zero, axis=-2, keepdims=True)
      np.testing.assert_array_equal(
        zero, np.broadcast_to(dropped, zero.shape), err_msg=path
      )
    assert 0.25 < np.mean(dropped) < 0.75, path
    assert (dropped[0] != dropped[1]).any(), f'{path}: rows drop alike'
  # Inputs and outputs of the stacks, attention values, sublayers (2 in the
  # encoder's layer, 3 in the decoder's), MLP hiddens.
  assert len(dropouts) == 4 + 3 + 5 + 2, sorted(dropouts)

  # Dropout scales up the kept values, and drops the prompt like the tokens.
  x = dropouts[next(k for k in dropouts if k.startswith('encoder/Dropout'))]
  assert x.shape == (2, 5 + 16, 32)
  value = params['encoder']['prompt']['prompt']['prompt']
  kept = x[0, 0] != 0
  np.testing.assert_allclose(x[0, 0][kept], 2 * value[0][kept], rtol=1e-6)


# ------------------------------------------------------------- T5X's contract


def test_takes_the_arguments_that_t5x_passes():
  tokens, ids = BATCH['encoder_input_tokens'], BATCH['decoder_input_tokens']
  extras = {
    'encoder_positions': jnp.zeros_like(tokens),
    'decoder_positions': jnp.zeros_like(ids),
    'encoder_segment_ids': jnp.ones_like(tokens),
    'decoder_segment_ids': jnp.ones_like(ids),
  }
  shapes = jax.eval_shape(
    functools.partial(PLAIN.init, decode=False, enable_dropout=False),
    jax.random.key(0),
    jnp.ones_like(tokens),
    jnp.ones_like(ids),
    jnp.ones_like(ids),
    **extras,
  )
  assert shapes.keys() == {'params', 'params_axes'}
  names = flax_partitioning.get_axis_names(shapes['params_axes'])
  flat = traverse_util.flatten_dict(shapes['params'], sep='/')
  axes = traverse_util.flatten_dict(names, sep='/')
  assert {k: len(v) for k, v in axes.items()} == {
    k: x.ndim for k, x in flat.items()
  }
  params = random_params(PLAIN)

  def apply(**kwargs):
    return PLAIN.apply(
      {'params': params},
      tokens,
      ids,
      BATCH['decoder_target_tokens'],
      decode=False,
      enable_dropout=False,
      rngs=None,
      mutable=False,
      **kwargs,
    )

  want = forward(PLAIN)(params, BATCH)[1]
  absent = dict.fromkeys(extras)
  np.testing.assert_allclose(jax.jit(apply)(**absent), want, atol=1e-5)


@pytest.mark.parametrize('net', [PLAIN, PROMPTED], ids=['plain', 'prompted'])
def test_cache_leaves_have_rows_first_but_for_the_shared_ones(net):
  tokens = jax.ShapeDtypeStruct((3, 16), jnp.int32)
  cache = jax.eval_shape(
    lambda params, tokens: hosted_by_t5x(net, params, tokens, 12)[1],
    random_params(net),
    tokens,
  )
  leaves = traverse_util.flatten_dict(cache)
  shared = {k[-1] for k in leaves} & set(decoding.SHARED_CACHE_LEAVES)
  assert shared == {'cache_index', 'cached_bias'}
  for path, leaf in leaves.items():
    if path[-1] not in shared:
      assert leaf.shape == (3, 4, 8, 12), path  # Positions are the last axis.
  assert len(leaves) == 2 + 2 * TINY.num_decoder_layers


# ---------------------------------------------------------------------- sites


class Scale(nn.Module):
  """An adapter that multiplies y by a number."""

  @nn.compact
  def __call__(self, x, y):
    del x
    return y * self.param('factor', nn.initializers.ones, ())


def shallow_sites():
  attention = ('query', 'key', 'value', 'keys', 'values', 'out')
  mlp = ('wi_0', 'wi_1', 'hidden', 'wo')
  layers = {
    'encoder/layers_0': {'attention': attention, 'mlp': mlp},
    'decoder/layers_0': {
      'self_attention': attention,
      'encoder_decoder_attention': attention,
      'mlp': mlp,
    },
  }
  sites = [f'{s}/{site}' for s in ('encoder', 'decoder') for site in ENDS]
  sites += MASKS
  for layer, sublayers in layers.items():
    sites.append(f'{layer}/input')
    for sublayer, inner in sublayers.items():
      sites.append(f'{layer}/{sublayer}')
      sites += [f'{layer}/{sublayer}/{site}' for site in inner]
  return sorted(sites)


ENDS = ('embed', 'output')
MASKS = ('encoder/mask', 'decoder/mask', 'decoder/encoder_mask')


def test_all_sites_are_listed_and_an_adapter_at_each_matters():
  assert structure.sites(network.Transformer(SHALLOW)) == shallow_sites()
  scaled = [site for site in shallow_sites() if site not in MASKS]
  net = network.Transformer(
    SHALLOW,
    tuple(
      Placement(site, f'test_{site.split("/")[-1]}', Scale) for site in scaled
    ),
  )
  # Adapters do not change the names of the base's parameters.
  base = structure.parameters(network.Transformer(SHALLOW))
  added = {k for k in structure.parameters(net) if k.endswith('/factor')}
  assert structure.parameters(net).keys() - added == base.keys()
  owners = {k.replace('test_', '').removesuffix('/factor') for k in added}
  assert owners == set(scaled)
  assert structure.sites(net) == shallow_sites()

  model, plain = EncoderDecoderModel(net), network.Transformer(SHALLOW)
  base, factors = random_params(plain), {k: np.float32(1) for k in added}

  def loss(factors, base):
    flat = traverse_util.flatten_dict(base, sep='/')
    return model.loss(nested(flat | factors), BATCH)[0]

  value, grads = jax.jit(jax.value_and_grad(loss))(factors, base)
  idle = [k for k in sorted(added) if abs(grads[k]) < 1e-3]
  assert not idle, 'the loss does not depend on these adapters'
  want, _ = jax.jit(EncoderDecoderModel(plain).loss)(base, BATCH)
  np.testing.assert_allclose(value, want, rtol=1e-6)


class OnlyFirst(nn.Module):
  """A mask that leaves only the first key."""

  @nn.compact
  def __call__(self, x, y):
    del x
    first = jnp.arange(y.shape[-1]) == 0
    return y & first[None, None, None]


@pytest.mark.parametrize('site', MASKS)
def test_a_mask_is_changed_where_it_stands(site):
  def logits(*placements):
    net = network.Transformer(SHALLOW, placements)
    return EncoderDecoderModel(net).logits(params, BATCH)

  params = random_params(network.Transformer(SHALLOW))
  plain, masked = logits(), logits(Placement(site, 'test', OnlyFirst))
  # The decoder's first position attends only to itself anyway.
  first = np.abs(plain - masked)[:, 0].max()
  assert np.abs(plain - masked).max() > 1e-2
  assert (first < 1e-5) == (site == 'decoder/mask')


class Before(nn.Module):
  """Adds two learned positions before the input, on axis 1."""

  @nn.compact
  def __call__(self, x, y):
    del x
    shape = (2, *y.shape[2:])
    added = self.param('added', nn.initializers.normal(1.0), shape)
    added = jnp.broadcast_to(added, (len(y), *shape)).astype(y.dtype)
    return jnp.concatenate([added, y], axis=1)


@pytest.mark.parametrize(
  'sites',
  [
    ('decoder/embed',),
    ('decoder/layers_*/*attention/keys', 'decoder/layers_*/*attention/values'),
  ],
)
def test_what_stands_before_the_decoder_s_positions_is_cached(sites):
  placements = tuple(
    Placement(site, f'test_{i}', Before) for i, site in enumerate(sites)
  )
  net = network.Transformer(SHALLOW, placements)
  params = random_params(net)
  model = EncoderDecoderModel(net)
  tokens, _ = jax.jit(lambda p, x: model.predict(p, x, 8))(
    params, BATCH['encoder_input_tokens']
  )
  batch = {
    'encoder_input_tokens': BATCH['encoder_input_tokens'],
    'decoder_input_tokens': jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': jnp.ones_like(tokens),
  }
  logits = model.logits(params, batch)
  assert logits.shape[:2] == tokens.shape
  greedy = np.array(jnp.argmax(logits, axis=-1))
  ended = np.cumsum(np.asarray(tokens) == 1, axis=1) > 0
  keep = np.pad(~ended, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
  np.testing.assert_array_equal(greedy[keep], np.asarray(tokens)[keep])
  # These positions matter: without them the logits differ.
  gone = {k: v for k, v in flat(params).items() if 'test_' not in k}
  plain = EncoderDecoderModel(network.Transformer(SHALLOW))
  assert np.abs(plain.logits(nested(gone), batch) - logits).max() > 1e-2


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def test_sites_of_an_mlp_without_gate_and_of_a_prompted_network():
  tied = set(structure.sites(network.Transformer(TIED)))
  assert {'encoder/layers_1/mlp/wi', 'decoder/layers_2/mlp/wi'} <= tied
  assert not any(site.endswith('wi_0') for site in tied)
  assert structure.sites(PROMPTED) == structure.sites(PLAIN)


def test_a_pattern_stays_within_a_component_and_sites_share_no_parameters():
  net = network.Transformer(
    TINY, (Placement('*/layers_*/attention/q*', 'test', Scale),)
  )
  added = structure.parameters(net).keys() - structure.parameters(PLAIN).keys()
  assert added == {
    f'encoder/layers_{i}/attention/test/factor' for i in range(2)
  }


def test_a_placement_that_matches_no_site_is_refused_with_the_sites():
  net = network.Transformer(
    TINY,
    (
      Placement('encoder/embed', 'fine', Scale),
      Placement('encoder/*/key', 'wrong', Scale),
      Placement('encoder/layer_0/mlp', 'mistyped', Scale),
    ),
  )
  with pytest.raises(ValueError, match='no site of the network matches') as e:
    structure.parameters(net)
  message = str(e.value)
  assert "['encoder/*/key', 'encoder/layer_0/mlp']" in message
  for site in structure.sites(PLAIN):
    assert f'\n  {site}' in message


def test_the_values_at_every_site_can_be_read():
  params = random_params(PROMPTED)
  _, sown = jax.jit(
    lambda p: encode(PROMPTED, p, BATCH, mutable=['intermediates'])
  )(params)
  (value,) = sown['intermediates']['encoder']['embed_site']
  np.testing.assert_array_equal(
    value[1, :5], params['encoder']['prompt']['prompt']['prompt']
  )
  table = params['token_embedder']['embedding']
  np.testing.assert_array_equal(
    value[1, 5:], table[BATCH['encoder_input_tokens'][1]]
  )


# ----------------------------------------------------------- rematerialisation


@pytest.mark.slow
def test_computing_layers_again_changes_memory_only():
  config = dataclasses.replace(
    TINY, num_encoder_layers=3, num_decoder_layers=1, dropout_rate=0.1
  )
  batch = make_batch([16] * 32, [10] * 32)
  results, memory, flops = [], [], []
  for remat in (False, True):
    net = prompted(dataclasses.replace(config, remat=remat), 5)
    params = random_params(net)
    model = EncoderDecoderModel(net)

    def gradient(value, params, batch, rng, model=model):
      def loss(value):
        encoder = params['encoder'] | {'prompt': {'prompt': {'prompt': value}}}
        return model.loss(params | {'encoder': encoder}, batch, rng)[0]

      return jax.value_and_grad(loss)(value)

    arguments = (
      params['encoder']['prompt']['prompt']['prompt'],
      params,
      batch,
      jax.random.key(1),
    )
    # This saves compile time; the operations and their memory are the same.
    compiled = (
      jax.jit(gradient)
      .lower(*arguments)
      .compile({'xla_backend_optimization_level': 0})
    )
    results.append((structure.sites(net), compiled(*arguments)))
    memory.append(compiled.memory_analysis().temp_size_in_bytes)
    flops.append(compiled.cost_analysis()['flops'])
  (sites, (loss, grad)), (sites_again, (loss_again, grad_again)) = results
  assert sites == sites_again
  np.testing.assert_allclose(loss, loss_again, rtol=1e-6)
  np.testing.assert_allclose(
    grad, grad_again, rtol=1e-6, atol=1e-6 * np.abs(grad).max()
  )
  # The saving depends on the compiler; on the CPU it is small.
  assert memory[1] < memory[0]
  assert flops[1] > 1.2 * flops[0]


# ---------------------------------------------------------------------- masks


def test_a_mask_grows_at_the_front_and_shrinks_from_it():
  valid = jnp.array([[1, 1, 0], [1, 0, 0]], bool)
  np.testing.assert_array_equal(
    grow(valid, 5), [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
  )
  np.testing.assert_array_equal(grow(valid, 2), [[1, 0], [0, 0]])
  np.testing.assert_array_equal(grow(valid, 3), valid)
