"""The parameters of a T5: their shapes, and their Hugging Face names.

torch stores a kernel as [out, in], T5X as [in, out]. One table serves both
directions.
"""

from collections.abc import Iterable

from ptune.convert.source import DECODER_EMBEDDING, EMBEDDING, LOGITS, Shape
from ptune.model.sizes import T5Config

HEAD = 'lm_head.weight'

# Other names of the shared embedding: a shared tensor has several names, and
# torch may save any of them.
EMBEDDINGS = (
  'shared.weight',
  'encoder.embed_tokens.weight',
  'decoder.embed_tokens.weight',
)

# The published T5 1.0 files have it; no released code has used it.
STRAY = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'

ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
# T5Config.encoder_attention, and what transformers calls such an encoder's.
ENCODER_ATTENTION = {
  'full': 'SelfAttention',
  'local': 'LocalSelfAttention',
  'transient-global': 'TransientGlobalSelfAttention',
}
# The bias of the sums of blocks, by which transient-global attention is known.
SIDE_BIAS = 'encoder/side_relpos_bias/rel_embedding'
DENSE = {name: name for name in ('wi', 'wi_0', 'wi_1', 'wo')}
# The parts of a layer, in order: our module, our norm, their module, kernels.
SUBLAYERS = {
  'encoder': (
    ('attention', 'pre_attention_layer_norm', 'SelfAttention', ATTENTION),
    ('mlp', 'pre_mlp_layer_norm', 'DenseReluDense', DENSE),
  ),
  'decoder': (
    (
      'self_attention',
      'pre_self_attention_layer_norm',
      'SelfAttention',
      ATTENTION,
    ),
    (
      'encoder_decoder_attention',
      'pre_cross_attention_layer_norm',
      'EncDecAttention',
      ATTENTION,
    ),
    ('mlp', 'pre_mlp_layer_norm', 'DenseReluDense', DENSE),
  ),
}


def layout(
  encoder_layers: Iterable[int],
  decoder_layers: Iterable[int],
  relative_attention_per_layer: bool = False,
  decoder_embedding: bool = False,
  encoder_attention: str = 'full',
) -> dict[str, tuple[str, bool]]:
  """Maps T5X parameters to (Hugging Face name, transposed).

  'encoder/layers_0/mlp/wo/kernel' ->
  ('encoder.block.0.layer.1.DenseReluDense.wo.weight', True)

  Args:
    encoder_layers: Indices of the encoder's layers.
    decoder_layers: Indices of the decoder's layers.
    relative_attention_per_layer: As in T5Config.
    decoder_embedding: As in T5Config.
    encoder_attention: As in T5Config.

  Returns:
    All parameters that any member of the family has: gated and plain MLPs, with
    and without an output kernel.
  """
  table = {EMBEDDING: (EMBEDDINGS[0], False), LOGITS: (HEAD, True)}
  if decoder_embedding:
    table[DECODER_EMBEDDING] = (EMBEDDINGS[2], False)
  for stack, layers in (
    ('encoder', encoder_layers),
    ('decoder', decoder_layers),
  ):
    attention = 'SelfAttention'
    if stack == 'encoder':
      attention = ENCODER_ATTENTION[encoder_attention]
    bias = f'layer.0.{attention}.relative_attention_bias.weight'
    if not relative_attention_per_layer:
      theirs = f'{stack}.block.0.{bias}'
      table[f'{stack}/relpos_bias/rel_embedding'] = (theirs, True)
    norm = f'{stack}.final_layer_norm.weight'
    table[f'{stack}/{stack}_norm/scale'] = (norm, False)
    for i in layers:
      if relative_attention_per_layer:
        theirs = f'{stack}.block.{i}.{bias}'
        table[f'{stack}/layers_{i}/relpos_bias/rel_embedding'] = (theirs, True)
      for j, (module, norm, theirs, kernels) in enumerate(SUBLAYERS[stack]):
        theirs = attention if theirs == 'SelfAttention' else theirs
        ours, block = f'{stack}/layers_{i}', f'{stack}.block.{i}.layer.{j}'
        table[f'{ours}/{norm}/scale'] = (f'{block}.layer_norm.weight', False)
        for kernel, short in kernels.items():
          weight = f'{block}.{theirs}.{short}.weight'
          table[f'{ours}/{module}/{kernel}/kernel'] = (weight, True)
  if encoder_attention == 'transient-global':
    theirs = f'layer.0.{ENCODER_ATTENTION[encoder_attention]}'
    table[SIDE_BIAS] = (
      f'encoder.block.0.{theirs}.global_relative_attention_bias.weight',
      True,
    )
    for i in encoder_layers:
      table[f'encoder/layers_{i}/attention/T5LayerNorm_0/scale'] = (
        f'encoder.block.{i}.{theirs}.global_input_layer_norm.weight',
        False,
      )
  return table


def shapes(config: T5Config) -> dict[str, Shape]:
  """Returns the shapes that `structure.parameters` gives, without tracing."""
  embed, mlp = config.emb_dim, config.mlp_dim
  joined = config.num_heads * config.head_dim
  by_name = {
    EMBEDDING: (config.vocab_size, embed),
    DECODER_EMBEDDING: (config.vocab_size, embed),
    LOGITS: (embed, config.vocab_size),
    'rel_embedding': (config.num_heads, config.relative_attention_num_buckets),
    'scale': (embed,),
    'out': (joined, embed),
    'wo': (mlp, embed),
    **dict.fromkeys(('query', 'key', 'value'), (embed, joined)),
    **dict.fromkeys(('wi', 'wi_0', 'wi_1'), (embed, mlp)),
  }
  gated = len(config.mlp_activations) > 1
  absent = {'wi'} if gated else {'wi_0', 'wi_1'}
  found = {}
  for path in layout(
    range(config.num_encoder_layers),
    range(config.num_decoder_layers),
    config.relative_attention_per_layer,
    config.decoder_embedding,
    config.encoder_attention,
  ):
    *_, module, name = path.split('/')
    if module in absent or (path == LOGITS and config.logits_via_embedding):
      continue
    key = path if path in by_name else module if name == 'kernel' else name
    found[path] = by_name[key]
  return found
