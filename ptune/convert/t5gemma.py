"""Hugging Face's T5Gemma and T5Gemma 2: configuration, names of parameters.

Norm scales are copied unchanged, because both formats store scale minus 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from ptune.convert.source import EMBEDDING, LOGITS, Shape
from ptune.errors import UserError
from ptune.model.config import ModelConfig, TokenIds
from ptune.model.t5gemma_sizes import Stack, T5GemmaConfig

# model_type -> T5GemmaConfig.version.
MODEL_TYPES = {'t5gemma': 1, 't5gemma2': 2}
HEAD = 'lm_head.out_proj.weight'
# The decoder's own embedding.
_OWN = 'decoder_token_embedder/'
# The parts of T5Gemma 2 that read images.
VISION = ('model.encoder.vision_tower.', 'model.encoder.multi_modal_projector.')

_ATTENTION = {
  'query': 'q_proj',
  'key': 'k_proj',
  'value': 'v_proj',
  'out': 'o_proj',
}
_MLP = {'wi_0': 'gate_proj', 'wi_1': 'up_proj', 'wo': 'down_proj'}
# The parts of a layer: our module and norms, their module and norms, kernels.
_SUBLAYERS = {
  'encoder': (
    ('attention', 'attention', 'self_attn', 'self_attn', _ATTENTION),
    ('mlp', 'mlp', 'mlp', 'feedforward', _MLP),
  ),
  'decoder': (
    ('self_attention', 'self_attention', 'self_attn', 'self_attn', _ATTENTION),
    (
      'encoder_decoder_attention',
      'cross_attention',
      'cross_attn',
      'cross_attn',
      _ATTENTION,
    ),
    ('mlp', 'mlp', 'mlp', 'feedforward', _MLP),
  ),
}
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
_LOCAL, _GLOBAL = 'sliding_attention', 'full_attention'


def layout(config: T5GemmaConfig) -> dict[str, tuple[str, bool]]:
  """Maps our parameters to (Hugging Face name, transposed).

  'encoder/layers_0/mlp/wo/kernel' ->
  ('model.encoder.layers.0.mlp.down_proj.weight', True)
  """
  table = _layout(
    config.version, config.num_encoder_layers, config.num_decoder_layers
  )
  if not config.decoder_embedding:
    table = {k: v for k, v in table.items() if not k.startswith(_OWN)}
  if config.logits_via_embedding:
    del table[LOGITS]
  return table


def copies(config: T5GemmaConfig, path: str) -> list[str]:
  """Returns other names of the tensor that a parameter is tied to."""
  ends = {'embedding': 'weight', 'eoi_embedding': 'eoi_embedding'}
  embedder, _, name = path.rpartition('/')
  if name not in ends or not config.logits_via_embedding:
    return []
  theirs = [f'model.decoder.embed_tokens.{ends[name]}']
  if embedder == 'token_embedder' and config.decoder_embedding:
    return []
  return theirs + ([HEAD] if name == 'embedding' else [])


def paths(shapes: Mapping[str, Shape]) -> set[str]:
  """Returns the parameters that belong to a T5Gemma and not to an adapter."""
  known = facts(shapes)
  layers = (
    known.get('encoder.num_layers', 0),
    known.get('decoder.num_layers', 0),
  )
  return set(_layout(known.get('version', 1), *layers)) & set(shapes)


def _layout(
  version: int, encoder_layers: int, decoder_layers: int
) -> dict[str, tuple[str, bool]]:
  """Returns the table with everything that an untied model has."""
  roots = {'encoder': 'model.encoder', 'decoder': 'model.decoder'}
  table = {LOGITS: (HEAD, True)}
  for stack, embedder in (('encoder', 'token_embedder/'), ('decoder', _OWN)):
    theirs = f'{roots[stack]}.embed_tokens'
    table[f'{embedder}embedding'] = (f'{theirs}.weight', False)
    if version == 2:
      table[f'{embedder}eoi_embedding'] = (f'{theirs}.eoi_embedding', False)
  counts = {'encoder': encoder_layers, 'decoder': decoder_layers}
  for stack, root in roots.items():
    table[f'{stack}/{stack}_norm/scale'] = (f'{root}.norm.weight', False)
    for i in range(counts[stack]):
      ours, theirs = f'{stack}/layers_{i}', f'{root}.layers.{i}'
      for module, norm, their_module, their_norm, kernels in _SUBLAYERS[stack]:
        if version == 2 and module == 'encoder_decoder_attention':
          continue
        for place in ('pre', 'post'):
          table[f'{ours}/{place}_{norm}_layer_norm/scale'] = (
            f'{theirs}.{place}_{their_norm}_layernorm.weight',
            False,
          )
        for kernel, name in kernels.items():
          weight = f'{theirs}.{their_module}.{name}.weight'
          table[f'{ours}/{module}/{kernel}/kernel'] = (weight, True)
        if version == 2 and kernels is _ATTENTION:
          for kernel, name in (('query', 'q_norm'), ('key', 'k_norm')):
            weight = f'{theirs}.{their_module}.{name}.weight'
            table[f'{ours}/{module}/{kernel}_norm/scale'] = (weight, False)
  return table


def is_t5gemma(shapes: Mapping[str, Shape]) -> bool:
  """Returns whether parameters are a T5Gemma's: only it has these norms."""
  return 'encoder/layers_0/post_mlp_layer_norm/scale' in shapes


def facts(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Returns the facts that the shapes give, by the names in `told`."""
  found: dict[str, Any] = {
    'version': 2
    if 'encoder/layers_0/attention/query_norm/scale' in shapes
    else 1,
    'logits_via_embedding': LOGITS not in shapes,
  }
  if EMBEDDING in shapes:
    found['vocab_size'] = shapes[EMBEDDING][0]
  for stack in ('encoder', 'decoder'):
    layers = {
      p.split('/')[1] for p in shapes if p.startswith(f'{stack}/layers_')
    }
    found[f'{stack}.num_layers'] = len(layers)
    mlp = shapes.get(f'{stack}/layers_0/mlp/wi_0/kernel')
    if mlp is not None:
      found[f'{stack}.emb_dim'], found[f'{stack}.mlp_dim'] = mlp
  return found


def told(config: T5GemmaConfig) -> dict[str, Any]:
  """Returns facts that identify a model: {'encoder.emb_dim': 512, ...}."""
  free = {field.name for field in dataclasses.fields(ModelConfig)}
  found: dict[str, Any] = {'vocab_size': config.vocab_size, 'ids': config.ids}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, Stack):
      sizes = dataclasses.asdict(value).items()
      found |= {f'{field.name}.{size}': number for size, number in sizes}
    elif field.name not in free:
      found[field.name] = value
  return found


def shapes(config: T5GemmaConfig) -> dict[str, Shape]:
  """Returns the shapes that `structure.parameters` gives, without tracing."""
  found: dict[str, Shape] = {}
  for path in layout(config):
    stack = config.decoder if path.startswith('decoder') else config.encoder
    queries = stack.num_heads * stack.head_dim
    *_, module, name = path.split('/')
    shape = {
      'embedding': (config.vocab_size, stack.emb_dim),
      'eoi_embedding': (stack.emb_dim,),
      'scale': (stack.emb_dim,),
      'query': (stack.emb_dim, queries),
      'out': (queries, stack.emb_dim),
      'wo': (stack.mlp_dim, stack.emb_dim),
      'logits_dense': (stack.emb_dim, config.vocab_size),
      **dict.fromkeys(('query_norm', 'key_norm'), (stack.head_dim,)),
      **dict.fromkeys(('wi_0', 'wi_1'), (stack.emb_dim, stack.mlp_dim)),
    }
    # Keys and values are computed from the attended sequence.
    seen = config.encoder if '/encoder_decoder_' in path else stack
    for site in ('key', 'value'):
      shape[site] = (seen.emb_dim, stack.num_kv_heads * stack.head_dim)
    found[path] = shape[module if module in shape else name]
  return found


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
  stacks = {k: {**_DEFAULTS, **values} for k, values in stacks.items()}
  for values in stacks.values():
    if values.get('layer_types') is None:
      pattern = values.get('sliding_window_pattern', _PATTERN[version])
      count = values['num_hidden_layers']
      values['layer_types'] = _layer_types(count, pattern)
  wrong = [
    f'{stack}: {line}'
    for stack, values in stacks.items()
    for line in _unknown(values, version)
  ]
  if wrong:
    raise _refusal(file, wrong)
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


def _unknown(values: Mapping[str, Any], version: int) -> list[str]:
  """Returns the properties of a stack that our network does not support."""
  wrong = [
    f'{key} {values[key]!r}: expected {value!r}'
    for key, value in _FIXED.items()
    if values.get(key, value) != value
  ]
  wrong += [
    f'{key} is missing' for key in _SIZES.values() if not values.get(key)
  ]
  if version == 2 and values.get('attn_logit_softcapping') is not None:
    wrong.append(
      f'attn_logit_softcapping {values["attn_logit_softcapping"]}: expected'
      ' none, which is how transformers computes a t5gemma2 in any case'
    )
  types = {str(x) for x in values['layer_types']} - {_LOCAL, _GLOBAL}
  if types:
    wrong.append(f'layer_types {sorted(types)}: expected {_LOCAL}, {_GLOBAL}')
  for kind, rope in _ropes(values, version).items():
    known = (
      ('default',)
      if kind == _LOCAL or version == 1
      else (
        'default',
        'linear',
      )
    )
    if rope['rope_type'] not in known:
      wrong.append(
        f'rope_type {rope["rope_type"]!r} of {kind}: expected one of {known}'
      )
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
    'rope factor': float(ropes[_GLOBAL]['factor']),
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
