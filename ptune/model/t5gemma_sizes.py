"""The sizes of a T5Gemma, and a table of the published ones."""

import dataclasses
from collections.abc import Mapping

from ptune.config import annotations
from ptune.errors import UserError, check_counts
from ptune.model.config import ModelConfig, TokenIds


@dataclasses.dataclass(frozen=True)
class Stack:
  """The sizes of T5Gemma's encoder, or of its decoder.

  Attributes:
    num_layers: Layers.
    emb_dim: Width of the residual stream.
    mlp_dim: Width of the MLP.
    num_heads: Heads of the queries.
    num_kv_heads: Heads of the keys and values; each serves as many query heads.
    head_dim: Size of one head.
    window: How far a local layer sees, in positions; see
      `t5gemma.near_both_ways`.
  """

  num_layers: int
  emb_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  window: int = 4096

  def __post_init__(self):
    annotations.check_fields(self)
    check_counts(**dataclasses.asdict(self))
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f'num_heads is {self.num_heads}; it must be a multiple of num_kv_heads,'
        f' {self.num_kv_heads}'
      )
    if self.head_dim % 2:
      raise UserError(f'head_dim is {self.head_dim}; it must be even')


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig(ModelConfig):
  """A T5Gemma or a T5Gemma 2.

  Attributes:
    encoder: Sizes of the encoder.
    decoder: Sizes of the decoder.
    version: 1 or 2. In version 2, the decoder's self-attention attends to the
      encoder too, queries and keys are normed, encoder and decoder share one
      embedding, and the lookup multiplies its rows by sqrt(embed).
    logits_via_embedding: Whether the decoder's embedding makes the logits;
      otherwise they have their own kernel, and in version 2 each stack has its
      own embedding.
    window_pattern: Layers whose number (counted from 1) is a multiple of this
      are global and see all positions; the others are local and see a window.
    query_scalar: The square root of this divides the logits of attention; the
      head size if not given.
    attention_cap: Limit of the logits of attention, by tanh; None for no limit.
    logits_cap: Limit of the logits of the vocabulary, by tanh; None for no
      limit.
    theta: Base of the rotary frequencies of global layers.
    local_theta: Base of the rotary frequencies of local layers.
    rope_factor: Divides the positions in global layers.
    eoi_id: The token "end of image", which has its own embedding in version 2.
  """

  encoder: Stack
  decoder: Stack
  version: int = 1
  logits_via_embedding: bool = True
  window_pattern: int = 2
  query_scalar: int | None = None
  attention_cap: float | None = 50.0
  logits_cap: float | None = 30.0
  theta: float = 10_000.0
  local_theta: float = 10_000.0
  rope_factor: float = 1.0
  eoi_id: int = 256_000
  ids: TokenIds = dataclasses.field(
    default=TokenIds(pad=0, eos=1, start=2), kw_only=True
  )

  def __post_init__(self):
    super().__post_init__()
    check_counts(window_pattern=self.window_pattern)
    wrong = {
      name: value
      for name in ('attention_cap', 'logits_cap', 'query_scalar', 'theta')
      + ('local_theta', 'rope_factor')
      if (value := getattr(self, name)) is not None and value <= 0
    }
    if wrong:
      raise UserError(f'T5GemmaConfig has {wrong}; expected numbers above 0')
    if self.version not in (1, 2):
      raise UserError(f'version is {self.version}; T5Gemma has 1 and 2')
    if self.version == 2 and self.encoder.emb_dim != self.decoder.emb_dim:
      raise UserError(
        'the stacks of T5Gemma 2 share their embedding, so they must be of one'
        f' width; got {self.encoder.emb_dim} and {self.decoder.emb_dim}'
      )

  @property
  def norm_offset(self) -> float:
    """The number that norms add to their scale; Gemma stores scale - 1."""
    return 1.0

  @property
  def scales_inputs(self) -> bool:
    """Whether the output of the site `embed` is multiplied by sqrt(embed)."""
    return self.version == 1

  @property
  def scales_outputs(self) -> bool:
    """Always false; see `T5Config.scales_outputs`."""
    return False

  @property
  def decoder_only(self) -> bool:
    """Always false; see `T5Config.decoder_only`."""
    return False

  @property
  def num_encoder_layers(self) -> int:
    return self.encoder.num_layers

  @property
  def num_decoder_layers(self) -> int:
    return self.decoder.num_layers

  @property
  def emb_dim(self) -> int:
    """The width of the encoder, and so of a prompt before its input."""
    return self.encoder.emb_dim

  @property
  def decoder_embedding(self) -> bool:
    """Whether the decoder has its own token embedding."""
    return self.version == 1 or not self.logits_via_embedding

  @property
  def embedding_scale(self) -> float:
    """The factor of embeddings in the lookup."""
    return self.emb_dim**0.5 if self.version == 2 else 1.0

  @property
  def with_all_sites(self) -> 'T5GemmaConfig':
    """The same model with every site.

    Only version 1 has cross-attention; in version 2, methods skip its sites.
    """
    return dataclasses.replace(self, version=1)

  def with_depth(self, encoder: int, decoder: int) -> 'T5GemmaConfig':
    """The same model with other numbers of layers."""
    return dataclasses.replace(
      self,
      encoder=dataclasses.replace(self.encoder, num_layers=encoder),
      decoder=dataclasses.replace(self.decoder, num_layers=decoder),
    )

  def axis_sizes(self) -> dict[str, tuple[int, ...]]:
    """Sizes of arrays along each logical axis that may be sharded."""
    stacks = (self.encoder, self.decoder)
    queries = tuple(s.num_heads * s.head_dim for s in stacks)
    keys = tuple(s.num_kv_heads * s.head_dim for s in stacks)
    return {
      'embed': tuple(s.emb_dim for s in stacks),
      'vocab': (self.vocab_size,),
      'mlp': tuple(s.mlp_dim for s in stacks),
      'heads': tuple(s.num_heads for s in stacks),
      'kv_heads': tuple(s.num_kv_heads for s in stacks),
      'joined_kv': queries + keys,
    }


def _sizes() -> dict[str, T5GemmaConfig]:
  """The published models: t5gemma_ENCODER_DECODER and t5gemma_2_..."""
  # Layers, width, MLP, heads, heads of keys and values, head size.
  gemma_2 = {
    's': Stack(8, 512, 1024, 8, 8, 64),
    'b': Stack(12, 768, 2048, 12, 12, 64),
    'l': Stack(24, 1024, 2816, 16, 16, 64),
    'ml': Stack(26, 1152, 6912, 4, 4, 256),
    'xl': Stack(24, 2048, 5120, 32, 32, 64),
    '2b': Stack(26, 2304, 9216, 8, 4, 256),
    '9b': Stack(42, 3584, 14336, 16, 8, 256),
  }
  table = {
    f'{size}_{size}': T5GemmaConfig(stack, stack, vocab_size=256_000)
    for size, stack in gemma_2.items()
  }
  table['9b_2b'] = T5GemmaConfig(
    gemma_2['9b'], gemma_2['2b'], vocab_size=256_000
  )
  gemma_3 = {
    '270m': Stack(18, 640, 2048, 4, 1, 256, window=512),
    '1b': Stack(26, 1152, 6912, 4, 1, 256, window=512),
    '4b': Stack(34, 2560, 10240, 8, 4, 256, window=1024),
  }
  for size, stack in gemma_3.items():
    table[f'2_{size}_{size}'] = T5GemmaConfig(
      stack,
      stack,
      vocab_size=262_208,
      version=2,
      window_pattern=6,
      attention_cap=None,
      logits_cap=None,
      theta=1_000_000.0,
      rope_factor=8.0 if size == '4b' else 1.0,
    )
  return {f't5gemma_{name}': config for name, config in table.items()}


SIZES: Mapping[str, T5GemmaConfig] = _sizes()
