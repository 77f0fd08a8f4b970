"""T5Gemma and T5Gemma 2 give transformers' answers, however they are computed.

The small models have every feature: fewer heads for keys and values, capped
logits, windows shorter than the inputs, and encoder and decoder of different
sizes.
"""

import atexit
import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ptune import methods
from ptune.convert import (
  identity,
  inspection,
  open_checkpoint,
  prompts,
  t5gemma_config,
)
from ptune.convert import t5gemma as files
from ptune.convert.conversion import convert
from ptune.convert.export import export
from ptune.convert.huggingface import write_huggingface
from ptune.convert.source import Leaf
from ptune.errors import UserError
from ptune.methods import decoder_prompt, prompt, row_prompts
from ptune.model import (
  decoding,
  frozen_weights,
  models,
  network,
  parameters,
  partitioning,
  sizes,
  structure,
)
from ptune.model.adapters import combine
from ptune.model.config import TokenIds
from ptune.model.t5gemma_sizes import Stack, T5GemmaConfig
from tests import tiny
from tests.interop import peft, torch, transformers
from tests.network_test import make_batch

pytestmark = pytest.mark.filterwarnings('ignore')

ONE = T5GemmaConfig(
  Stack(3, 24, 32, 4, 2, 8, window=3),
  Stack(2, 18, 40, 6, 2, 4, window=3),
  vocab_size=96,
  query_scalar=5,
  attention_cap=2.0,
  logits_cap=3.0,
)
TWO = T5GemmaConfig(
  Stack(3, 24, 32, 4, 2, 8, window=4),
  Stack(2, 24, 40, 6, 2, 4, window=3),
  vocab_size=96,
  version=2,
  query_scalar=5,
  attention_cap=None,
  logits_cap=3.0,
  theta=1e6,
  rope_factor=4.0,
  eoi_id=40,
)
MODELS = {
  'one': ONE,
  'one_untied': dataclasses.replace(ONE, logits_via_embedding=False),
  'two': TWO,
  'two_untied': dataclasses.replace(TWO, logits_via_embedding=False),
}
every = pytest.mark.parametrize('name', MODELS)
slow = pytest.mark.slow
both = pytest.mark.parametrize('name', ['one', 'two'])
PROMPT = 5
TABLE = parameters.EMBEDDING
DECODED = 8
# Some rows have padding, and the longest exceed the windows.
INPUTS, TARGETS = [11, 7, 3, 11], [9, 4, 1, 9]


def _vision(said):
  """Gives a T5Gemma 2 an image tower, which all published models have."""
  if said['model_type'] == 't5gemma2':
    said['encoder'] |= {
      'mm_tokens_per_image': 4,
      'vision_config': {
        'model_type': 'siglip_vision_model',
        'hidden_size': 8,
        'intermediate_size': 8,
        'num_hidden_layers': 1,
        'num_attention_heads': 2,
        'image_size': 28,
        'patch_size': 14,
      },
    }
  return said


@functools.cache
def reference(name):
  """Returns transformers' model with random weights."""
  return reference_of(MODELS[name])


def reference_of(model):
  """Returns transformers' model of any sizes, with random weights."""
  said = _vision(t5gemma_config.config_json(model))
  kind = getattr(transformers, said['architectures'][0])
  config = kind.config_class.from_dict(said)
  config._attn_implementation = 'eager'
  torch.manual_seed(0)
  torch.set_num_threads(1)
  made = kind(config).eval()
  with torch.no_grad():
    for path, value in made.named_parameters():
      # Larger embeddings, so that answers differ from token to token.
      size = 1.0 if 'embed_tokens.weight' in path else 0.3
      value.copy_(torch.randn_like(value) * size)
  return made


@functools.cache
def values(name):
  """Returns the same weights by ptune's names."""
  state = {
    path.replace('.text_model.', '.'): value
    for path, value in reference(name).state_dict().items()
  }
  return {
    ours: state[theirs].numpy().T if transposed else state[theirs].numpy()
    for ours, (theirs, transposed) in files.layout(MODELS[name]).items()
  }


@functools.cache
def prompt_of(name):
  rng = np.random.default_rng(1)
  return rng.normal(size=(PROMPT, MODELS[name].emb_dim)).astype(np.float32)


@functools.cache
def batch_of(name):
  batch = make_batch(INPUTS, TARGETS, encoder_length=11)
  batch = {key: np.array(x) for key, x in batch.items()}
  batch['decoder_input_tokens'][:, 0] = MODELS[name].ids.start
  batch['encoder_input_tokens'][0, 3] = 40  # The token has its own vector.
  return batch


def with_prompt(name, **changes):
  config = dataclasses.replace(MODELS[name], **changes)
  return network.Transformer(config, prompt.prompt(PROMPT).placements)


def params_of(name):
  return parameters.unflatten(values(name) | {prompt.PATH: prompt_of(name)})


@functools.cache
def answers(name):
  """Returns ptune's logits, loss, and gradient of the prompt."""
  model = models.EncoderDecoderModel(with_prompt(name), z_loss=0.0)

  def loss(rows):
    params = parameters.merge(
      parameters.unflatten(values(name)),
      parameters.unflatten({prompt.PATH: rows}),
    )
    return model.loss(params, batch_of(name))[0]

  logits = jax.jit(model.logits)(params_of(name), batch_of(name))
  value, gradient = jax.jit(jax.value_and_grad(loss))(prompt_of(name))
  return types.SimpleNamespace(logits=logits, loss=value, gradient=gradient)


def prompted(name, rows):
  """Returns transformers' inputs: the prompt, then the embedded tokens."""
  model = reference(name)
  tokens = torch.tensor(batch_of(name)['encoder_input_tokens']).long()
  embedded = model.get_input_embeddings()(tokens)
  rows = rows[None].expand(len(tokens), -1, -1)
  seen = torch.nn.functional.pad(tokens != 0, (PROMPT, 0), value=True)
  return {
    'inputs_embeds': torch.cat([rows, embedded], dim=1),
    'attention_mask': seen.long(),
  }


@pytest.mark.parametrize(
  'name',
  [
    'one',
    'two',
    pytest.param('one_untied', marks=slow),
    pytest.param('two_untied', marks=slow),
  ],
)
def test_logits_loss_and_gradient_are_those_of_transformers(name):
  batch, got = batch_of(name), answers(name)
  rows = torch.tensor(prompt_of(name), requires_grad=True)
  logits = reference(name)(
    **prompted(name, rows),
    decoder_input_ids=torch.tensor(batch['decoder_input_tokens']).long(),
  ).logits
  loss = torch.nn.functional.cross_entropy(
    logits.transpose(1, 2),
    torch.tensor(batch['decoder_target_tokens']).long(),
    ignore_index=0,
    reduction='sum',
  )
  loss.backward()
  real = batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(
    np.asarray(got.logits)[real], logits.detach().numpy()[real], atol=1e-4
  )
  np.testing.assert_allclose(got.loss, loss.item(), rtol=1e-5)
  scale = float(rows.grad.abs().max())
  assert scale > 1e-3
  np.testing.assert_allclose(
    got.gradient / scale, rows.grad.numpy() / scale, atol=1e-4
  )


@pytest.mark.parametrize('name', ['one_untied', 'two_untied'])
def test_greedy_answers_are_those_of_transformers(name):
  got = predict(name, models.Decoding())
  with torch.no_grad():
    want = reference(name).generate(
      **prompted(name, torch.tensor(prompt_of(name))),
      decoder_start_token_id=MODELS[name].ids.start,
      pad_token_id=0,
      max_new_tokens=DECODED,
      do_sample=False,
      num_beams=1,
    )
  want = want[:, 1:].numpy()
  want = np.pad(want, ((0, 0), (0, DECODED - want.shape[1])))
  np.testing.assert_array_equal(got, want)
  assert len(np.unique(want)) > 3, 'the model says the same in any case'


@pytest.mark.parametrize(
  'name', [pytest.param('one_untied', marks=slow), 'two_untied']
)
def test_beams_find_what_they_find_in_the_logits_of_transformers(name):
  rows, beams = len(INPUTS), 3
  read = prompted(name, torch.tensor(prompt_of(name)))
  read = {key: x.repeat_interleave(beams, dim=0) for key, x in read.items()}

  def logits(tokens):
    with torch.no_grad():
      out = reference(name)(
        **read, decoder_input_ids=torch.tensor(np.asarray(tokens)).long()
      )
    return out.logits.numpy()

  def step(tokens, cache):
    so_far, i = cache['tokens'], cache['cache_index']
    so_far = jax.lax.dynamic_update_slice(so_far, tokens, (0, i))
    shape = (*so_far.shape, MODELS[name].vocab_size)
    found = jax.pure_callback(
      logits, jax.ShapeDtypeStruct(shape, np.float32), so_far
    )
    found = jax.lax.dynamic_slice_in_dim(found, i, 1, axis=1)
    return found, {'tokens': so_far, 'cache_index': i + 1}

  start = {'tokens': np.full((rows, DECODED), 2), 'cache_index': 0}
  want, _ = decoding.beam_search(
    step, jax.tree.map(jnp.int32, start), rows, DECODED, num_beams=3, start_id=2
  )
  got = predict(name, models.Decoding(num_beams=beams))
  np.testing.assert_array_equal(got, want[:, -1])


def predict(name, how):
  model = models.EncoderDecoderModel(with_prompt(name))
  tokens, _ = jax.jit(model.predict, static_argnums=(2, 3))(
    params_of(name), batch_of(name)['encoder_input_tokens'], DECODED, how
  )
  return tokens


@both
def test_cached_decoding_gives_the_logits_of_one_call(name):
  method = combine([prompt.prompt(PROMPT), decoder_prompt.decoder_prompt(2)])
  net = network.Transformer(MODELS[name], method.placements)
  batch, width = batch_of(name), MODELS[name].decoder.emb_dim
  rows = np.random.default_rng(2).normal(size=(2, width)).astype(np.float32)
  params = parameters.merge(
    params_of(name), parameters.unflatten({decoder_prompt.PATH: rows})
  )
  inputs, tokens = batch['encoder_input_tokens'], batch['decoder_input_tokens']
  apply = functools.partial(net.apply, {'params': params}, enable_dropout=False)
  want = jax.jit(apply)(inputs, tokens, np.ones_like(tokens))
  encoded = jax.jit(functools.partial(apply, method='encode'))(inputs)

  @jax.jit
  def decode(tokens, cache):
    return net.apply(
      {'params': params, **cache},
      encoded,
      inputs,
      tokens,
      tokens,
      enable_dropout=False,
      decode=True,
      mutable=['cache'],
      method='decode',
    )

  _, cache = decode(np.ones_like(tokens), {})
  for i in range(tokens.shape[1]):
    logits, cache = decode(tokens[:, i : i + 1], cache)
    np.testing.assert_allclose(logits[:, 0], want[:, i], atol=1e-4)


@both
def test_padding_changes_nothing(name):
  batch = {
    key: np.pad(x, ((0, 0), (0, 6))) for key, x in batch_of(name).items()
  }
  model = models.EncoderDecoderModel(with_prompt(name))
  got = jax.jit(model.logits)(params_of(name), batch)
  real = batch['decoder_target_tokens'] > 0
  want = np.asarray(answers(name).logits)
  np.testing.assert_allclose(
    got[real], want[real[:, : want.shape[1]]], atol=1e-5
  )


# ------------------------------------------------- however it is computed


def logits_on(name, rows=1, parts=1, **changes):
  """Returns the logits on a mesh of rows x parts devices."""
  config = dataclasses.replace(MODELS[name], **changes)
  mesh = partitioning.make_mesh(parts, jax.devices()[: rows * parts])
  plan = parameters.plan(config, prompt.prompt(PROMPT), mesh)
  host = values(name) | {prompt.PATH: prompt_of(name)}
  placed = {p: parameters.place(host[p], x) for p, x in plan.params.items()}
  trained = {prompt.PATH: placed.pop(prompt.PATH)}
  frozen = frozen_weights.freeze(plan, placed)
  model = models.EncoderDecoderModel(plan.network)
  params = parameters.merge(
    parameters.unflatten(trained), parameters.unflatten(frozen)
  )
  with plan.scope():
    logits = jax.jit(model.logits)(params, batch_of(name))
  return np.asarray(logits), frozen


@pytest.mark.parametrize(
  ('name', 'mesh'),
  [
    ('one', {'rows': 2, 'parts': 4, 'fsdp': True}),
    ('two', {'rows': 4, 'parts': 2}),
    pytest.param('one', {'rows': 1, 'parts': 8}, marks=slow),
  ],
)
def test_eight_devices_answer_as_one(name, mesh):
  got, frozen = logits_on(name, **mesh)
  np.testing.assert_allclose(got, answers(name).logits, atol=1e-4)
  kernel = frozen['encoder/layers_0/attention/key/kernel']
  assert kernel.addressable_shards[0].data.size < kernel.size


@pytest.mark.parametrize(
  'how',
  [{'scan': True, 'remat': True}, {'length_multiple': 9}],
  ids=['loop', 'tiles'],
)
@both
def test_loops_over_alternating_layers_and_full_tiles_answer_the_same(
  name, how
):
  model = models.EncoderDecoderModel(with_prompt(name, **how), z_loss=0.0)

  def loss(rows):
    params = parameters.merge(
      parameters.unflatten(values(name)),
      parameters.unflatten({prompt.PATH: rows}),
    )
    return model.loss(params, batch_of(name))[0]

  value, gradient = jax.jit(jax.value_and_grad(loss))(prompt_of(name))
  want = answers(name)
  np.testing.assert_allclose(value, want.loss, rtol=1e-5)
  np.testing.assert_allclose(gradient, want.gradient, atol=1e-4)


@pytest.mark.parametrize(
  ('name', 'how'),
  [('one', {'frozen_dtype': 'int8'}), ('two', {'dtype': 'bfloat16'})],
)
def test_rounded_weights_answer_nearly_the_same(name, how):
  got, _ = logits_on(name, **how)
  want = np.asarray(answers(name).logits)
  assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.98
  assert np.abs(got - want).max() > 1e-4, 'nothing was rounded'


# ------------------------------------------------------------- as files


@functools.cache
def directory(name):
  """Returns the directory in which transformers has saved its model."""
  path = pathlib.Path(tempfile.mkdtemp(prefix='ptune-t5gemma-'))
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  reference(name).save_pretrained(path)
  return path


@every
def test_a_model_of_transformers_opens_and_is_written_as_it_was(name, tmp_path):
  source = open_checkpoint(directory(name))
  assert source.config == MODELS[name]
  assert identity.config(source, dtype='bfloat16').dtype == 'bfloat16'
  assert source.shapes.keys() == values(name).keys()
  assert bool(source.ignored) == (MODELS[name].version == 2)  # The image tower.
  for path, leaf in source.leaves.items():
    np.testing.assert_array_equal(leaf.read(), values(name)[path], path)
  identity.check_config(source, MODELS[name])
  identity.check_whole(source, MODELS[name])

  convert(directory(name), 'huggingface', tmp_path / 'out')
  kind = type(reference(name))
  said = json.loads((tmp_path / 'out' / 'config.json').read_text())
  (tmp_path / 'out' / 'config.json').write_text(json.dumps(_vision(said)))
  again = kind.from_pretrained(tmp_path / 'out').state_dict()
  for path, value in reference(name).state_dict().items():
    if not path.startswith(files.VISION):
      np.testing.assert_array_equal(again[path], value, path)


def test_what_a_t5gemma_is_can_be_inspected():
  found = inspection.inspect(directory('two'))
  assert found['config']['encoder.window'] == 4
  assert found['parameters'] == sum(x.size for x in values('two').values())
  assert json.loads(json.dumps(found)) == found


def test_another_size_is_refused_with_both():
  source = open_checkpoint(directory('one'))
  with pytest.raises(UserError, match=r'encoder.num_layers +3 +8'):
    identity.check_config(source, sizes.t5('t5gemma_s_s'))
  with pytest.raises(UserError, match='checkpoint: no published size'):
    identity.check_config(source, sizes.t5('t5_1_1_small'))
  with pytest.raises(UserError, match='it is a T5Gemma'):
    convert(directory('one'), 't5x', directory('one') / 't5x')


def test_an_export_that_t5x_has_no_network_for_is_refused(tmp_path):
  np.save(tmp_path / 'prompt.npy', prompt_of('two'))
  read = prompts.read_prompt(tmp_path / 'prompt.npy')
  with pytest.raises(UserError, match='it is a T5Gemma'):
    export(read, 't5x', tmp_path / 't5x', base=str(directory('two')))
  assert not (tmp_path / 't5x').exists()


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('one', {'hidden_activation': 'silu'}, "hidden_activation 'silu'"),
    ('one', {'attention_bias': True}, 'attention_bias True'),
    ('one', {'layer_types': ['chunked_attention'] * 2}, 'chunked_attention'),
    ('one', {'rope_scaling': {'rope_type': 'yarn'}}, "rope_type 'yarn'"),
    (
      'one',
      {'rope_parameters': {'partial_rotary_factor': 0.5}},
      'partial_rotary_factor 0.5',
    ),
    ('one', {'quantization_config': {'bits': 4}}, "quantization_config {'bits"),
    ('one', {'layer_types': 'full_attention'}, "layer_types 'full_attention'"),
    ('one', {'layer_types': ['full_attention']}, 'expected a list of 2'),
    ('one', {'hidden_size': '24'}, "hidden_size '24': expected a whole number"),
    ('one', {'num_hidden_layers': 0}, 'num_hidden_layers 0: expected a whole'),
    ('one', {'num_key_value_heads': 4}, 'must be a multiple of num_kv_heads'),
    ('one', {'rope_theta': 'big'}, "rope_theta 'big' of full_attention"),
    ('one', {'attn_logit_softcapping': 9.0}, 'attn_logit_softcapping is 2.0'),
    ('two', {'rope_parameters': {'rope_type': 'yarn'}}, 'one for each of'),
    ('two', {'attn_logit_softcapping': 9.0}, 'attn_logit_softcapping 9.0'),
    (
      'two',
      {'rope_parameters': {'sliding_attention': {'rope_type': 'linear'}}},
      "rope_type 'linear' of sliding_attention",
    ),
  ],
)
def test_other_networks_are_refused_before_weights_are_read(
  name, changes, message, tmp_path
):
  said = t5gemma_config.config_json(MODELS[name])
  said['decoder'] |= changes
  if 'rope_theta' in changes:
    del said['decoder']['rope_parameters']  # Takes precedence.
  (tmp_path / 'config.json').write_text(json.dumps(said))
  (tmp_path / 'model.safetensors').write_text('no weights')
  with pytest.raises(UserError, match=re.escape(message)) as refused:
    open_checkpoint(tmp_path)
  assert f'{tmp_path / "config.json"} describes' in str(refused.value)


@pytest.mark.parametrize('kind', ['T5Gemma', 'T5Gemma2'])
def test_what_a_config_leaves_out_is_as_transformers_has_it(kind):
  whole = getattr(transformers, f'{kind}Config')().to_dict()
  short = {'model_type': kind.lower()}
  got, want = (
    t5gemma_config.read_config(
      said, TokenIds(start=2), epath.Path('config.json')
    )
    for said in (short, json.loads(json.dumps(whole)))
  )
  assert got == want
  assert kind != 'T5Gemma' or got == sizes.t5('t5gemma_2b_2b')


@both
def test_a_prompt_answers_the_same_in_peft(name, tmp_path):
  np.save(tmp_path / 'prompt.npy', prompt_of(name))
  exported = prompts.read_prompt(tmp_path / 'prompt.npy')
  export(exported, 'peft', tmp_path / 'peft', base=str(directory(name)))
  kind = type(reference(name))
  model = peft.PeftModel.from_pretrained(
    kind.from_pretrained(directory(name), attn_implementation='eager').eval(),
    tmp_path / 'peft',
  )
  batch = batch_of(name)
  tokens = torch.tensor(batch['encoder_input_tokens']).long()
  with torch.no_grad():
    got = model(
      input_ids=tokens,
      attention_mask=(tokens != 0).long(),
      decoder_input_ids=torch.tensor(batch['decoder_input_tokens']).long(),
    ).logits.numpy()
  real = batch['decoder_target_tokens'] > 0
  want = np.asarray(answers(name).logits)
  np.testing.assert_allclose(got[real], want[real], atol=1e-4)
  back = prompts.read_prompt(tmp_path / 'peft')
  np.testing.assert_array_equal(back.array, prompt_of(name))


# ------------------------------------------------------------- methods


def logits_of(net, params, batch):
  model = models.EncoderDecoderModel(net)
  return np.asarray(jax.jit(model.logits)(params, batch))


@both
def test_packed_examples_answer_as_alone(name):
  batch, rows = batch_of(name), (1, 3)
  method = prompt.prompt(PROMPT)
  assert method.packed is not None
  insert = method.packed.insert['encoder'][1]

  def joined(key):
    encoder = key == 'encoder_input_tokens'
    real = batch[key if encoder else 'decoder_target_tokens'] > 0
    parts = [batch[key][row][real[row]] for row in rows]
    if encoder:
      parts = [insert(part) for part in parts]
    segments = [[i + 1] * len(part) for i, part in enumerate(parts)]
    return np.concatenate(parts)[None], np.concatenate(segments)[None]

  packed = {}
  packed['encoder_input_tokens'], packed['encoder_segment_ids'] = joined(
    'encoder_input_tokens'
  )
  for key in ('decoder_input_tokens', 'decoder_target_tokens'):
    packed[key], packed['decoder_segment_ids'] = joined(key)
  net = network.Transformer(MODELS[name], method.packed.placements)
  got = logits_of(net, params_of(name), packed)[0]
  real = batch['decoder_target_tokens'] > 0
  want = np.asarray(answers(name).logits)
  want = np.concatenate([want[row][real[row]] for row in rows])
  np.testing.assert_allclose(got, want, atol=1e-4)


@both
def test_a_row_of_a_bank_answers_as_with_its_prompt_alone(name):
  batch, short = batch_of(name), 2
  prompts = np.stack([prompt_of(name)] * len(INPUTS))
  lengths = np.full(len(INPUTS), PROMPT, np.int32)
  prompts[1, : PROMPT - short] = 7  # Padding, masked everywhere.
  lengths[1] = short
  net = network.Transformer(MODELS[name], row_prompts.per_row())
  params = parameters.merge(
    parameters.unflatten(values(name)),
    parameters.unflatten(row_prompts.row_parameters(prompts, lengths)),
  )
  got = logits_of(net, params, batch)
  single = network.Transformer(MODELS[name], prompt.prompt(short).placements)
  alone = parameters.unflatten(
    values(name) | {prompt.PATH: prompt_of(name)[PROMPT - short :]}
  )
  want = np.array(answers(name).logits)
  want[1] = logits_of(single, alone, batch)[1]
  real = batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(got[real], want[real], atol=1e-4)


@both
def test_a_prompt_starts_at_the_embeddings_that_the_encoder_reads(name):
  mesh = partitioning.make_mesh(1, jax.devices()[:1])
  plan = parameters.plan(MODELS[name], prompt.prompt(PROMPT), mesh)
  table = parameters.place(values(name)[TABLE], plan.params[TABLE])
  ids = np.array([7, 95])
  got = parameters.embedding_rows(plan, {TABLE: table}, ids)
  with torch.no_grad():
    want = reference(name).get_input_embeddings()(torch.tensor(ids))
  np.testing.assert_allclose(got, want, rtol=1e-6)


# Arguments of methods whose defaults are too large for a vocabulary of 96.
SMALL = {
  'superpos': {'tokens': 8, 'population': 90},
  'multitask': {'tasks': 2, 'vocab_size': 96},
}
METHODS = sorted(methods.functions())


@pytest.mark.parametrize(
  'method',
  [
    m if m in ('lora', 'bottleneck') else pytest.param(m, marks=slow)
    for m in METHODS
  ],
)
@both
def test_every_method_learns(name, method):
  how = methods.functions()[method](**SMALL.get(method, {}))
  net = network.Transformer(MODELS[name], how.placements)
  rng = np.random.default_rng(3)
  params = {
    path: rng.normal(size=x.shape, scale=0.2).astype(np.float32)
    for path, x in structure.parameters(net).items()
  } | values(name)
  trained = {path: params.pop(path) for path in [*params] if how.trains(path)}
  model = models.EncoderDecoderModel(net)
  batch = dict(batch_of(name))
  if method == 'multitask':  # Row begins with its task token.
    batch['encoder_input_tokens'] = np.array(batch['encoder_input_tokens'])
    batch['encoder_input_tokens'][:, 0] = 95

  def loss(trained):
    whole = parameters.merge(
      parameters.unflatten(params), parameters.unflatten(trained)
    )
    return model.loss(whole, batch)[0]

  gradients = jax.jit(jax.grad(loss))(trained)
  assert trained
  for path, x in gradients.items():
    assert np.isfinite(x).all(), path
  # Methods such as `replace` may give the first layer's prompt no effect.
  moved = [path for path, x in gradients.items() if np.abs(x).max() > 0]
  assert len(moved) > len(trained) // 2


@slow
@pytest.mark.parametrize('method', ['ia3', 'lora', 'norms'])
@both
def test_a_merged_model_answers_as_the_adapted_one(name, method):
  how = methods.functions()[method]()
  net = network.Transformer(MODELS[name], how.placements)
  rng = np.random.default_rng(3)
  trained = {
    path: rng.normal(size=x.shape, scale=0.5).astype(np.float32)
    for path, x in structure.parameters(net).items()
    if how.trains(path)
  }
  assert how.merge is not None
  merged = {
    path: how.merge(path, x, trained) for path, x in values(name).items()
  }
  batch = batch_of(name)
  adapted = parameters.unflatten(values(name) | trained)
  want = logits_of(net, adapted, batch)
  plain = network.Transformer(MODELS[name])
  got = logits_of(plain, parameters.unflatten(merged), batch)
  np.testing.assert_allclose(got, want, atol=1e-4)
  before = logits_of(plain, parameters.unflatten(values(name)), batch)
  assert np.abs(before - want).max() > 0.1


# ------------------------------------------------------------- at full size


# transformers' counts, from models on its meta device. They match the model
# cards that give a count.
PARAMETERS = {
  't5gemma_s_s': 312_517_632,
  't5gemma_b_b': 591_490_560,
  't5gemma_l_l': 1_241_761_792,
  't5gemma_ml_ml': 2_200_345_344,
  't5gemma_xl_xl': 3_766_980_608,
  't5gemma_2b_2b': 5_596_853_760,
  't5gemma_9b_9b': 20_333_401_088,
  't5gemma_9b_2b': 12_292_375_296,
  't5gemma_2_270m_270m': 368_465_792,
  't5gemma_2_1b_1b': 1_697_856_896,
  't5gemma_2_4b_4b': 7_089_276_416,
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_published_sizes_have_as_many_parameters(name):
  config = sizes.t5(name)
  shapes = files.shapes(config)
  assert sum(map(math.prod, shapes.values())) == PARAMETERS[name]
  # A shallow network is enough to check these shapes.
  shallow = config.with_depth(1, 1)
  found = structure.parameters(network.Transformer(shallow))
  assert files.shapes(shallow) == {path: x.shape for path, x in found.items()}


@slow
@pytest.mark.parametrize('name', PARAMETERS)
def test_transformers_counts_the_same(name):
  said = _vision(t5gemma_config.config_json(sizes.t5(name)))
  kind = getattr(transformers, said['architectures'][0])
  with torch.device('meta'):
    model = kind(kind.config_class.from_dict(said))
  model.tie_weights()
  text = (
    value.numel()
    for path, value in model.named_parameters()
    if not path.replace('.text_model.', '.').startswith(files.VISION)
  )
  assert sum(text) == PARAMETERS[name]


# ------------------------------------------------------------- a whole run


@slow
@both
def test_a_run_learns_resumes_and_is_asked(name, tmp_path):
  config = dataclasses.replace(MODELS[name], vocab_size=264, dtype='bfloat16')
  rng = np.random.default_rng(4)
  leaves = {
    path: Leaf(shape, np.dtype('float32'), value.__getitem__)
    for path, shape in files.shapes(config).items()
    for value in [rng.normal(size=shape, scale=0.3).astype(np.float32)]
  }
  (tmp_path / 'base').mkdir()
  write_huggingface(epath.Path(tmp_path / 'base'), leaves, config)
  how = {
    'config': dataclasses.replace(config, frozen_dtype='int8', scan=True),
    'initial_checkpoint_path': str(tmp_path / 'base'),
    'train_steps': 6,
    'mixture_or_task_name': 'tiny',
  }
  tiny.run(tmp_path / 'run', **how)
  tiny.run(tmp_path / 'again', **how | {'train_steps': 4})
  tiny.run(tmp_path / 'again', **how)
  whole, resumed = (
    np.load(tmp_path / run / 'prompts' / 'step_6.npy')
    for run in ('run', 'again')
  )
  np.testing.assert_array_equal(whole, resumed)
  scores = [line for line in tiny.records(tmp_path / 'run') if 'loss' in line]
  assert scores and all(np.isfinite(line['loss']) for line in scores)
