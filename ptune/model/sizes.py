"""The sizes of a T5, and a table of the published models.

`t5gemma_sizes` has those of a T5Gemma.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ptune.errors import UserError, check_counts, nearest
from ptune.model import t5gemma_sizes
from ptune.model.activations import ACTIVATIONS
from ptune.model.config import ModelConfig, TokenIds
from ptune.model.t5gemma_sizes import T5GemmaConfig


@dataclasses.dataclass(frozen=True)
class T5Config(ModelConfig):
  """The sizes of a T5.

  Attributes:
    vocab_size: Rows of the embedding (a few more than the vocabulary's ids).
    emb_dim: Width of the residual stream (d_model).
    num_heads: Attention heads.
    head_dim: Size of one head; num_heads * head_dim need not be emb_dim.
    mlp_dim: Width of the MLP (d_ff).
    num_encoder_layers: Encoder layers; 0 for a decoder alone, a prefix LM.
    num_decoder_layers: Decoder layers.
    mlp_activations: ('gelu', 'linear') in T5 1.1, ('relu',) in T5 1.0.
    logits_via_embedding: T5 1.0's output layer: the embedding, scaled by
      emb_dim**-0.5. Otherwise it has its own kernel.
    scale_decoder_outputs: Whether the input of the output layer is multiplied
      by emb_dim**-0.5; follows logits_via_embedding if not given.
    decoder_embedding: Whether the decoder has its own token embedding. With
      logits_via_embedding, the encoder's embedding makes the logits.
    relative_attention_per_layer: Whether each layer has its own relative
      position bias, as in UMT5; otherwise the layers of a stack share one.
    local_radius: How far an encoder's position sees, as in LongT5; 0 for all
      positions. See `long_attention`.
    global_block_size: With local_radius, the positions of a block whose sum
      every position sees (transient-global attention); 0 for none.
    relative_attention_num_buckets: Buckets of the relative position bias.
    relative_attention_max_distance: The distance at which its last bucket
      starts.
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  num_encoder_layers: int
  num_decoder_layers: int
  mlp_activations: tuple[str, ...] = ('gelu', 'linear')
  logits_via_embedding: bool = False
  scale_decoder_outputs: bool | None = None
  decoder_embedding: bool = False
  relative_attention_per_layer: bool = False
  local_radius: int = 0
  global_block_size: int = 0
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128

  @property
  def decoder_only(self) -> bool:
    """Whether the decoder reads the inputs itself, before the targets."""
    return self.num_encoder_layers == 0

  @property
  def encoder_attention(self) -> str:
    """'full', 'local' or 'transient-global', as LongT5 calls them."""
    if not self.local_radius:
      return 'full'
    return 'transient-global' if self.global_block_size else 'local'

  @property
  def scales_inputs(self) -> bool:
    """Always false; see `T5GemmaConfig.scales_inputs`."""
    return False

  @property
  def logits_cap(self) -> float | None:
    """Always None; see `T5GemmaConfig.logits_cap`."""
    return None

  @property
  def scales_outputs(self) -> bool:
    """`scale_decoder_outputs`, or its default."""
    if self.scale_decoder_outputs is None:
      return self.logits_via_embedding
    return self.scale_decoder_outputs

  @property
  def embedding_scale(self) -> float:
    """The factor of embeddings in the lookup."""
    return 1.0

  @property
  def with_all_sites(self) -> 'T5Config':
    """The same model with every site; a decoder alone lacks the encoder's."""
    return self.with_depth(
      max(self.num_encoder_layers, 1), self.num_decoder_layers
    )

  def with_depth(self, encoder: int, decoder: int) -> 'T5Config':
    """The same model with other numbers of layers."""
    return dataclasses.replace(
      self, num_encoder_layers=encoder, num_decoder_layers=decoder
    )

  def axis_sizes(self) -> dict[str, tuple[int, ...]]:
    """Sizes of arrays along each logical axis that may be sharded."""
    return {
      'embed': (self.emb_dim,),
      'vocab': (self.vocab_size,),
      'mlp': (self.mlp_dim,),
      'heads': (self.num_heads,),
      'joined_kv': (self.num_heads * self.head_dim,),
    }

  def __post_init__(self):
    # Gin gives a list, but the attributes of a Flax module must be hashable.
    object.__setattr__(self, 'mlp_activations', tuple(self.mlp_activations))
    counts = ('vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim')
    counts += ('num_decoder_layers', 'relative_attention_num_buckets')
    check_counts(**{name: getattr(self, name) for name in counts})
    super().__post_init__()
    if min(self.local_radius, self.global_block_size) < 0 or (
      self.global_block_size and not self.local_radius
    ):
      raise UserError(
        f'local_radius is {self.local_radius} and global_block_size'
        f' {self.global_block_size}; expected 0 (no such attention) or more,'
        ' and a global_block_size only beside a local_radius'
      )
    if self.local_radius and (
      self.relative_attention_per_layer or self.decoder_only
    ):
      raise UserError(
        f'local_radius is {self.local_radius}, which needs an encoder whose'
        ' layers share a position bias: relative_attention_per_layer must be'
        ' False and num_encoder_layers at least 1'
      )
    unknown = sorted(set(self.mlp_activations) - set(ACTIVATIONS))
    if unknown or not self.mlp_activations:
      raise UserError(
        f'mlp_activations are {self.mlp_activations}; they must be of'
        f' {tuple(ACTIVATIONS)}'
      )


def _sizes() -> dict[str, T5Config]:
  """The published models: heads, head size, layers, d_model, d_ff."""
  t5_1_1 = {
    'small': (6, 64, 8, 8, 512, 1024),
    'base': (12, 64, 12, 12, 768, 2048),
    'large': (16, 64, 24, 24, 1024, 2816),
    'xl': (32, 64, 24, 24, 2048, 5120),
    'xxl': (64, 64, 24, 24, 4096, 10240),
  }
  t5_1_0 = {
    'small': (8, 64, 6, 6, 512, 2048),
    'base': (12, 64, 12, 12, 768, 3072),
    'large': (16, 64, 24, 24, 1024, 4096),
    '3b': (32, 128, 24, 24, 1024, 16384),
    '11b': (128, 128, 24, 24, 1024, 65536),
  }
  # Bytes need a deep encoder and a shallow decoder (arXiv 2105.13626).
  byt5 = {
    'small': (6, 64, 12, 4, 1472, 3584),
    'base': (12, 64, 18, 6, 1536, 3968),
    'large': (16, 64, 36, 12, 1536, 3840),
    'xl': (32, 64, 36, 12, 2560, 6720),
    'xxl': (64, 64, 36, 12, 4672, 12352),
  }
  ul2 = {'': (16, 256, 32, 32, 4096, 16384)}
  madlad400 = {
    '3b': (16, 128, 32, 32, 1024, 8192),
    '7b': (16, 128, 48, 48, 2048, 8192),
    '10b': (16, 256, 32, 32, 2048, 16384),
  }
  code = {
    'vocab_size': 32100,
    'mlp_activations': ('relu',),
    'logits_via_embedding': True,
    'ids': TokenIds(eos=2),
  }
  families: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    't5': (
      t5_1_0,
      {
        'vocab_size': 32128,
        'mlp_activations': ('relu',),
        'logits_via_embedding': True,
      },
    ),
    't5_1_1': (t5_1_1, {'vocab_size': 32128}),
    'flan_t5': (t5_1_1, {'vocab_size': 32128}),
    'mt5': (t5_1_1, {'vocab_size': 250112}),
    'byt5': (byt5, {'vocab_size': 384}),
    # T0pp is T0 with more data; both are XXL.
    't0': ({'3b': t5_1_1['xl'], '11b': t5_1_1['xxl']}, {'vocab_size': 32128}),
    'mt0': (t5_1_1, {'vocab_size': 250112}),
    'aya_101': ({'': t5_1_1['xxl']}, {'vocab_size': 250112}),
    'ul2': (ul2, {'vocab_size': 32128, 'mlp_activations': ('silu', 'linear')}),
    'flan_ul2': (
      ul2,
      {'vocab_size': 32128, 'mlp_activations': ('silu', 'linear')},
    ),
    'madlad400': (
      madlad400,
      {'vocab_size': 256000, 'ids': TokenIds(pad=1, eos=2)},
    ),
    'umt5': (
      {size: t5_1_1[size] for size in ('small', 'base', 'xl', 'xxl')},
      {'vocab_size': 256384, 'relative_attention_per_layer': True},
    ),
    'pile_t5': (
      {size: t5_1_1[size] for size in ('base', 'large', 'xl', 'xxl')},
      {
        'vocab_size': 32128,
        'relative_attention_per_layer': True,
        'ids': TokenIds(eos=2),
      },
    ),
    'long_t5_local': (
      {size: t5_1_1[size] for size in ('base', 'large')},
      {'vocab_size': 32128, 'local_radius': 127},
    ),
    'long_t5_tglobal': (
      {size: t5_1_1[size] for size in ('base', 'large', 'xl')},
      {'vocab_size': 32128, 'local_radius': 127, 'global_block_size': 16},
    ),
    'codet5': (
      {size: t5_1_0[size] for size in ('small', 'base', 'large')},
      code,
    ),
    'codet5p': ({'220m': t5_1_0['base'], '770m': t5_1_0['large']}, code),
  }
  table = {}
  for family, (sizes, common) in families.items():
    for size, numbers in sizes.items():
      heads, head_dim, encoder, decoder, embed, mlp = numbers
      table[f'{family}_{size}'.removesuffix('_')] = T5Config(
        num_heads=heads,
        head_dim=head_dim,
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
        emb_dim=embed,
        mlp_dim=mlp,
        **common,
      )
  return table


# The type of a configuration selects the network, see `network.Transformer`.
Config = T5Config | T5GemmaConfig

SIZES: Mapping[str, Config] = {**_sizes(), **t5gemma_sizes.SIZES}


def t5(size: str | Config | None = None, **changes) -> Config:
  """A published size by name, that of a checkpoint, or one given in numbers.

  Args:
    size: A name in `SIZES`, such as 't5_1_1_base', or a configuration that
      `identity.from_checkpoint` read.
    **changes: Fields that differ from those of `size`; without a size, all
      fields of a `T5Config` that have no default.

  Raises:
    UserError: If the name is unknown (it lists the nearest names), or fields
      are unknown or missing.
  """
  if isinstance(size, str):
    if size not in SIZES:
      raise UserError(f'no model size {size!r}{nearest(size, SIZES)}')
    size = SIZES[size]
  kind = T5Config if size is None else type(size)
  fields = {f.name: f for f in dataclasses.fields(kind)}
  unknown = sorted(set(changes) - set(fields))
  if unknown:
    raise UserError(
      f'{kind.__name__} has no {unknown}; it has {sorted(fields)}'
    )
  if size is not None:
    return dataclasses.replace(size, **changes)
  missing = [
    name
    for name, field in fields.items()
    if field.default is dataclasses.MISSING and name not in changes
  ]
  if missing:
    raise UserError(
      f'a model without a size name needs {missing}; or name a size, such'
      " as size='t5_1_1_small'"
    )
  return T5Config(**changes)
