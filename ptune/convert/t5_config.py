"""config.json of T5, mT5, UMT5 and LongT5, as transformers reads it."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from ptune.config import annotations
from ptune.convert import t5gemma_config
from ptune.convert.layout import ENCODER_ATTENTION
from ptune.convert.source import Source, sizes
from ptune.convert.storage import read_json
from ptune.errors import UserError
from ptune.model.sizes import T5Config, TokenIds

CONFIG = 'config.json'
GENERATION = 'generation_config.json'

# The number of embedding rows identifies these.
BYT5 = 384
MT5 = 250112

# mT5 and T5 have the same network; UMT5 has a position bias in every layer.
PER_LAYER = 'umt5'
LONG = 'longt5'

# model_type -> what transformers' classes begin with.
CLASSES = {'t5': 'T5', 'mt5': 'MT5', PER_LAYER: 'UMT5', LONG: 'LongT5'}

# feed_forward_proj -> mlp_activations. Its 'gated-gelu' is the tanh
# approximation, as is ptune's gelu; its plain 'gelu' is not, so it is absent.
ACTIVATIONS = {
  'relu': ('relu',),
  'gelu_new': ('gelu',),
  'silu': ('silu',),
  'gated-relu': ('relu', 'linear'),
  'gated-gelu': ('gelu', 'linear'),
  'gated-gelu_new': ('gelu', 'linear'),
  'gated-silu': ('silu', 'linear'),
}

# transformers' names for these activations, after it reads the above.
DENSE_ACT_FN = {'gelu': 'gelu_new'}

# The sizes of LongT5's encoder attention: their defaults in transformers.
LOCAL_RADIUS = 127
GLOBAL_BLOCK_SIZE = 16

# config.json's name for a size of T5Config, and the name to use if that is
# absent.
CONFIG_SIZES = {
  'vocab_size': ('vocab_size', None),
  'emb_dim': ('d_model', None),
  'num_heads': ('num_heads', None),
  'head_dim': ('d_kv', None),
  'mlp_dim': ('d_ff', None),
  'num_encoder_layers': ('num_layers', None),
  'num_decoder_layers': ('num_decoder_layers', 'num_layers'),
  'relative_attention_num_buckets': ('relative_attention_num_buckets', None),
}


def activations(config: Mapping[str, Any], file: epath.Path) -> tuple[str, ...]:
  """Returns the MLP's activations; refuses networks other than T5's."""
  # Published T5 1.0 configurations have no feed_forward_proj.
  plain = ('t5', LONG)
  default = 'relu' if config.get('model_type') in plain else 'gated-gelu'
  projection = str(config.get('feed_forward_proj', default))
  wrong = []
  if str(config.get('model_type')) not in CLASSES:
    known = (*CLASSES, *t5gemma_config.MODEL_TYPES)
    wrong.append(
      f'model_type {config.get("model_type")!r}: expected one of {known}'
    )
  wrong += _unknown_attention(config)
  if projection not in ACTIVATIONS:
    wrong.append(
      f'feed_forward_proj {projection!r}: expected one of {tuple(ACTIVATIONS)}'
    )
  activations = ACTIVATIONS.get(projection, ('?',))
  act = DENSE_ACT_FN.get(activations[0], activations[0])
  for key, value in (
    ('layer_norm_epsilon', 1e-6),
    ('relative_attention_max_distance', 128),
    # If these contradict feed_forward_proj, transformers uses these.
    ('dense_act_fn', act),
    ('is_gated_act', len(activations) > 1),
    ('tie_encoder_decoder', False),
    ('is_encoder_decoder', True),
    ('quantization_config', None),
  ):
    if config.get(key, value) != value and '?' not in activations:
      wrong.append(f'{key} {config[key]}: expected {value}')
  if wrong:
    raise UserError(
      f'{file} describes a network that ptune does not have:\n'
      + '\n'.join(f'  {line}' for line in wrong)
    )
  return ACTIVATIONS[projection]


def _unknown_attention(config: Mapping[str, Any]) -> list[str]:
  """Returns the settings of a LongT5's attention that ptune lacks."""
  if config.get('model_type') != LONG:
    return []
  wrong = []
  kind = config.get('encoder_attention_type', 'local')
  known = tuple(name for name in ENCODER_ATTENTION if name != 'full')
  if kind not in known:
    wrong.append(f'encoder_attention_type {kind!r}: expected one of {known}')
  for key in ('local_radius', 'global_block_size'):
    value = config.get(key, 1)
    if not annotations.fits(value, int) or value < 1:
      wrong.append(f'{key} {value!r}: expected a whole number from 1 on')
  return wrong


def attention(config: Mapping[str, Any]) -> tuple[int, int]:
  """local_radius and global_block_size, as T5Config has them."""
  if config.get('model_type') != LONG:
    return 0, 0
  radius = config.get('local_radius', LOCAL_RADIUS)
  if config.get('encoder_attention_type', 'local') == 'local':
    return radius, 0
  return radius, config.get('global_block_size', GLOBAL_BLOCK_SIZE)


def token_ids(config: Mapping[str, Any], path: epath.Path) -> TokenIds:
  """Returns the special tokens that transformers would use.

  For generation, generation_config.json takes precedence if it exists.
  """
  generation = path / GENERATION
  told = read_json(generation) if generation.exists() else {}
  said = {
    key: config.get(key, default) if told.get(key) is None else told[key]
    for key, default in (
      ('pad_token_id', 0),
      ('eos_token_id', 1),
      ('decoder_start_token_id', None),
    )
  }
  eos = said['eos_token_id']
  if isinstance(eos, list) and eos:
    said['eos_token_id'], *others = eos
    said |= {f'eos_token_id[{i + 1}]': end for i, end in enumerate(others)}
  if said['decoder_start_token_id'] is None:
    said['decoder_start_token_id'] = said['pad_token_id']
  wrong = {
    key: value
    for key, value in said.items()
    if not isinstance(value, int) or isinstance(value, bool) or value < 0
  }
  if wrong:
    raise UserError(
      f'{path / CONFIG} describes a model whose special tokens ptune cannot'
      f' use: {wrong}; expected the id of a token for each'
    )
  pad, eos, start, *others = said.values()
  return TokenIds(pad=pad, eos=eos, start=start, also_ends=tuple(others))


def eos_token_id(ids: TokenIds) -> int | list[int]:
  """Returns what the files of transformers say ends an answer."""
  return [ids.eos, *ids.also_ends] if ids.also_ends else ids.eos


def config_json(config: T5Config) -> dict[str, Any]:
  """Returns the config.json of a T5, like that of published models."""
  if config.decoder_only:
    raise UserError(
      'Hugging Face has no model of a decoder alone; use --format=t5x'
    )
  projections = {names: text for text, names in reversed(ACTIVATIONS.items())}
  if config.mlp_activations not in projections:
    raise UserError(
      f'no feed_forward_proj means mlp_activations {config.mlp_activations};'
      f' known: {sorted(projections)}'
    )
  tied, scaled = config.logits_via_embedding, config.scales_outputs
  kind = 't5'
  if config.local_radius:
    kind = LONG
  elif config.relative_attention_per_layer:
    kind = PER_LAYER
  elif config.vocab_size == MT5 and not scaled:  # transformers scales no mT5.
    kind = 'mt5'
  said: dict[str, Any] = {
    'architectures': [f'{CLASSES[kind]}ForConditionalGeneration'],
    'decoder_start_token_id': config.ids.start,
    'dropout_rate': 0.1,
    'eos_token_id': config.ids.eos,
    'feed_forward_proj': projections[config.mlp_activations],
    'initializer_factor': 1.0,
    'is_encoder_decoder': True,
    'layer_norm_epsilon': 1e-06,
    'model_type': kind,
    'output_past': True,
    'pad_token_id': config.ids.pad,
    'relative_attention_max_distance': 128,
    # transformers also reads this as "the logits are scaled".
    'tie_word_embeddings': tied,
    'use_cache': True,
    **{
      theirs: getattr(config, ours)
      for ours, (theirs, _) in CONFIG_SIZES.items()
    },
  }
  if config.local_radius:
    said |= {
      'encoder_attention_type': config.encoder_attention,
      'local_radius': config.local_radius,
    }
  if config.global_block_size:
    said['global_block_size'] = config.global_block_size
  if scaled != tied:
    said['scale_decoder_outputs'] = scaled
  if config.vocab_size == BYT5:
    said['tokenizer_class'] = 'ByT5Tokenizer'
  return said


def check_sizes(config: Mapping[str, Any], source: Source) -> None:
  """Raises an error if config.json and the tensors give different sizes."""
  found = sizes(source.shapes)
  wrong = []
  for ours, (key, other) in CONFIG_SIZES.items():
    said = config.get(key)
    said = config.get(other) if said is None and other else said
    if said is not None and ours in found and said != found[ours]:
      wrong.append(f'  {key} is {said!r}, in the tensors {found[ours]}')
  gated = len(source.activations or ()) == 2
  if found.get('gated', gated) != gated:
    wrong.append(
      f'  feed_forward_proj is {config.get("feed_forward_proj")!r}, but the'
      f' tensors are {"wi_0 and wi_1" if found["gated"] else "wi"}'
    )
  if wrong:
    raise UserError(
      f'{source.path}: {CONFIG} does not describe these tensors:\n'
      + '\n'.join(wrong)
      + '\nThe files do not belong together; download them again.'
    )
