"""The parameters of a T5Gemma: what Hugging Face calls them, and their shapes.

Norm scales are copied unchanged, because both formats store scale minus 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ptune.convert.source import EMBEDDING, LOGITS, Shape
from ptune.model.config import ModelConfig
from ptune.model.t5gemma_sizes import Stack, T5GemmaConfig

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
