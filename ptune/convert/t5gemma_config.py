"""config.json of T5Gemma and T5Gemma 2, as transformers reads it."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from ptune.config import annotations
from ptune.errors import UserError
from ptune.model.config import TokenIds
from ptune.model.t5gemma_sizes import Stack, T5GemmaConfig

# model_type -> T5GemmaConfig.version.
MODEL_TYPES = {'t5gemma': 1, 't5gemma2': 2}

# A stack's name for a size, and config.json's.
_SIZES = {
  'num_layers': 'num_hidden_layers',
  'emb_dim': 'hidden_size',
  'mlp_dim': 'intermediate_size',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'window': 'sliding_window',
}

# transformers omits values that equal its defaults, which are those of 2B.
_DEFAULTS = {
  'num_hidden_layers': 26,
  'hidden_size': 2304,
  'intermediate_size': 9216,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'sliding_window': 4096,
  'query_pre_attn_scalar': 256,
}
_PATTERN = {1: 2, 2: 6}  # window_pattern, by version.

# These have one value in all published models; we do not support others. Their
# names in the configuration of a stack, and the value.
_FIXED = {
  'hidden_activation': 'gelu_pytorch_tanh',
  'rms_norm_eps': 1e-6,
  'attention_bias': False,
}
# Beside them, weights that are not stored as they are.
_ABSENT = {'quantization_config': None}
_WHOLE = {'is_encoder_decoder': True, **_ABSENT}
_LOCAL, _GLOBAL = 'sliding_attention', 'full_attention'


def read_config(
  said: Mapping[str, Any], ids: TokenIds, file: epath.Path
) -> T5GemmaConfig:
  """Returns the model that a config.json describes.

  Args:
    said: Its values.
    ids: The special tokens.
    file: Its path, for messages.

  Raises:
    ValueError: ptune does not have the network; it lists all differences.
  """
  version = MODEL_TYPES[said['model_type']]
  stacks = {name: _dict(said.get(name)) for name in ('encoder', 'decoder')}
  if version == 2:
    stacks['encoder'] = _dict(stacks['encoder'].get('text_config'))
  stacks = {
    name: {**_DEFAULTS, 'sliding_window_pattern': _PATTERN[version], **values}
    for name, values in stacks.items()
  }
  for check in (_malformed, _unknown):
    wrong = _other(said, _WHOLE) + [
      f'{stack}: {line}'
      for stack, values in stacks.items()
      for line in check(values, version)
    ]
    if wrong:
      raise _refusal(file, wrong)
    for values in stacks.values():
      if values.get('layer_types') is None:
        values['layer_types'] = _layer_types(
          values['num_hidden_layers'], values['sliding_window_pattern']
        )
  # Our network has one of each, and the configuration two.
  common = {name: _common(values, version) for name, values in stacks.items()}
  wrong = [
    f'{key} is {value!r} in the encoder and {common["decoder"][key]!r} in the'
    ' decoder: expected one value'
    for key, value in common['encoder'].items()
    if value != common['decoder'][key]
  ]
  types = [values['layer_types'] for values in stacks.values()]
  pattern = _pattern(types, version)
  if pattern is None:
    wrong.append(
      'layer_types: expected every n-th layer to be full_attention and the'
      ' others sliding_attention'
    )
  if wrong:
    raise _refusal(file, wrong)
  values = common['decoder']
  try:
    return T5GemmaConfig(
      encoder=_stack(stacks['encoder']),
      decoder=_stack(stacks['decoder']),
      vocab_size=values['vocab_size'],
      version=version,
      logits_via_embedding=bool(said.get('tie_word_embeddings', True)),
      window_pattern=pattern,
      query_scalar=values['query_pre_attn_scalar'],
      attention_cap=values['attn_logit_softcapping'],
      logits_cap=values['final_logit_softcapping'],
      theta=values['rope_theta'],
      local_theta=values['local rope_theta'],
      rope_factor=values['rope factor'],
      eoi_id=_dict(said.get('encoder')).get('eoi_token_index', 256_000),
      ids=ids,
    )
  except UserError as error:
    raise _refusal(file, str(error).splitlines()) from error


def token_ids(said: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the special tokens, by the keys that a T5's config.json has."""
  values = {**_dict(said.get('decoder')), **said}
  return {
    'pad_token_id': values.get('pad_token_id', 0),
    'eos_token_id': values.get('eos_token_id', 1),
    'decoder_start_token_id': values.get('bos_token_id', 2),
  }


def _dict(value: Any) -> Mapping[str, Any]:
  return value if isinstance(value, Mapping) else {}


def _refusal(file: epath.Path, wrong: list[str]) -> UserError:
  return UserError(
    f'{file} describes a network that ptune does not have:\n'
    + '\n'.join(f'  {line}' for line in wrong)
  )


def _other(said: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
  """Returns the values that differ from the only ones that ptune supports."""
  return [
    f'{key} {said[key]!r}: expected {value!r}'
    for key, value in fixed.items()
    if said.get(key, value) != value
  ]


def _malformed(values: Mapping[str, Any], version: int) -> list[str]:
  """Returns the values of a stack that are not what they must be."""
  wrong = [
    f'{key} {values[key]!r}: expected a whole number of at least 1'
    for key in (*_SIZES.values(), 'sliding_window_pattern')
    if not annotations.fits(values[key], int) or values[key] < 1
  ]
  types = values.get('layer_types')
  if types is not None and (
    not isinstance(types, list) or len(types) != values['num_hidden_layers']
  ):
    wrong.append(
      f'layer_types {types!r:.200}: expected a list of'
      f' {values["num_hidden_layers"]}, one for each layer'
    )
  given = values.get('rope_parameters')
  keys = set(_dict(given)) - {_LOCAL, _GLOBAL} if version == 2 else set()
  if keys or (given is not None and not isinstance(given, dict)):
    wrong.append(
      f'rope_parameters {given!r:.200}: expected one for each of'
      f' {_LOCAL}, {_GLOBAL}'
    )
  for kind, rope in _ropes(values, version).items():
    wrong += [
      f'{key} {rope[key]!r} of {kind}: expected a number'
      for key in ('rope_theta', 'factor')
      if not annotations.fits(rope[key], float)
    ]
  return wrong


def _unknown(values: Mapping[str, Any], version: int) -> list[str]:
  """Returns the properties of a stack that our network does not support."""
  wrong = _other(values, _FIXED | _ABSENT)
  if version == 2 and values.get('attn_logit_softcapping') is not None:
    wrong.append(
      f'attn_logit_softcapping {values["attn_logit_softcapping"]}: expected'
      ' none, which is how transformers computes a t5gemma2 in any case'
    )
  types = {str(x) for x in values['layer_types']} - {_LOCAL, _GLOBAL}
  if types:
    wrong.append(f'layer_types {sorted(types)}: expected {_LOCAL}, {_GLOBAL}')
  for kind, rope in _ropes(values, version).items():
    known = ('default',)
    if kind == _GLOBAL and version == 2:
      known = ('default', 'linear')
    if rope['rope_type'] not in known:
      wrong.append(
        f'rope_type {rope["rope_type"]!r} of {kind}: expected one of {known}'
      )
    part = rope.get('partial_rotary_factor', 1)
    if part != 1:
      wrong.append(f'partial_rotary_factor {part!r} of {kind}: expected 1')
  return wrong


def _ropes(
  values: Mapping[str, Any], version: int
) -> dict[str, dict[str, Any]]:
  """Returns rope_type, rope_theta and factor of local and of global layers.

  Files of transformers 4 have rope_theta, rope_local_base_freq and
  rope_scaling. Files of transformers 5 have rope_parameters, in version 2 by
  layer type.
  """
  given = _dict(values.get('rope_parameters'))
  scaling = _dict(values.get('rope_scaling'))
  theta = {_GLOBAL: values.get('rope_theta', (0, 1e4, 1e6)[version])}
  theta[_LOCAL] = values.get('rope_local_base_freq', 1e4)
  if version == 1:
    # The same for all layers.
    theta[_LOCAL] = theta[_GLOBAL]
    given = {_GLOBAL: given, _LOCAL: given}
  ropes = {}
  for kind in (_GLOBAL, _LOCAL):
    rope = {'factor': 1.0, 'rope_theta': theta[kind], **_dict(given.get(kind))}
    if kind == _GLOBAL or version == 1:
      rope |= scaling
    kinds = (scaling.get('type'), rope.get('rope_type'), 'default')
    ropes[kind] = rope | {'rope_type': next(filter(None, kinds))}
  return ropes


def _layer_types(count: int, pattern: int) -> list[str]:
  """Returns the types of `count` layers; each `pattern`-th layer is global."""
  return [_LOCAL if (i + 1) % pattern else _GLOBAL for i in range(count)]


def _pattern(types: list[list[str]], version: int) -> int | None:
  """Returns the window_pattern that all of these layer types follow.

  If several fit, in a model of few layers, it returns the published one.
  """
  longest = max(map(len, types))
  for n in (_PATTERN[version], *range(1, longest + 2)):
    if all(given == _layer_types(len(given), n) for given in types):
      return n
  return None


def _common(values: Mapping[str, Any], version: int) -> dict[str, Any]:
  """Returns the values that must be equal in both stacks."""
  ropes = _ropes(values, version)
  caps = (50.0, 30.0) if version == 1 else (None, None)
  scalar = values['query_pre_attn_scalar']
  return {
    'vocab_size': values.get('vocab_size', (0, 256_000, 262_208)[version]),
    'query_pre_attn_scalar': None if scalar == values['head_dim'] else scalar,
    'attn_logit_softcapping': values.get('attn_logit_softcapping', caps[0]),
    'final_logit_softcapping': values.get('final_logit_softcapping', caps[1]),
    'rope_theta': float(ropes[_GLOBAL]['rope_theta']),
    'local rope_theta': float(ropes[_LOCAL]['rope_theta']),
    # transformers reads it in this type alone.
    'rope factor': float(ropes[_GLOBAL]['factor'])
    if ropes[_GLOBAL]['rope_type'] == 'linear'
    else 1.0,
  }


def _stack(values: Mapping[str, Any]) -> Stack:
  return Stack(**{ours: values[theirs] for ours, theirs in _SIZES.items()})


def config_json(config: T5GemmaConfig) -> dict[str, Any]:
  """Returns the config.json that `read_config` reads as `config`."""
  kind = {version: name for name, version in MODEL_TYPES.items()}[
    config.version
  ]
  special = {
    'pad_token_id': config.ids.pad,
    'eos_token_id': config.ids.eos,
    'bos_token_id': config.ids.start,
  }

  def stack(name: str) -> dict[str, Any]:
    sizes = getattr(config, name)
    count, n = sizes.num_layers, config.window_pattern
    if config.version == 1:
      rope = {'rope_type': 'default', 'rope_theta': config.theta}
    else:
      rope = {
        _LOCAL: {'rope_type': 'default', 'rope_theta': config.local_theta},
        _GLOBAL: {'rope_type': 'default', 'rope_theta': config.theta},
      }
      if config.rope_factor != 1:
        rope[_GLOBAL] |= {'rope_type': 'linear', 'factor': config.rope_factor}
    return {
      **{theirs: getattr(sizes, ours) for ours, theirs in _SIZES.items()},
      **_FIXED,
      **special,
      'model_type': {
        (1, 'encoder'): 't5_gemma_module',
        (1, 'decoder'): 't5_gemma_module',
        (2, 'encoder'): 't5gemma2_text',
        (2, 'decoder'): 't5gemma2_decoder',
      }[config.version, name],
      'vocab_size': config.vocab_size,
      'query_pre_attn_scalar': config.query_scalar or sizes.head_dim,
      'attn_logit_softcapping': config.attention_cap,
      'final_logit_softcapping': config.logits_cap,
      'layer_types': _layer_types(count, n),
      'rope_parameters': rope,
      'tie_word_embeddings': config.logits_via_embedding,
    }

  encoder = stack('encoder')
  if config.version == 2:
    encoder = {
      'model_type': 't5gemma2_encoder',
      'text_config': encoder,
      'eoi_token_index': config.eoi_id,
    }
  name = 'T5Gemma' if config.version == 1 else 'T5Gemma2'
  return {
    **special,
    'architectures': [f'{name}ForConditionalGeneration'],
    'decoder': stack('decoder'),
    'encoder': encoder,
    'is_encoder_decoder': True,
    'model_type': kind,
    'tie_word_embeddings': config.logits_via_embedding,
    'vocab_size': config.vocab_size,
  }
