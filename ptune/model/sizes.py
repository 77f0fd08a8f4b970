"""The sizes of a T5, and a table of the published ones."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ptune import annotations
from ptune.errors import UserError, check_counts
from ptune.model.layers import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class TokenIds:
  """The ids of the tokens that a model treats specially; T5's by default.

  Attributes:
    pad: Fills rows up. It is masked, and has no part in the loss.
    eos: Ends inputs and targets; -1 if nothing ends an answer.
    start: The first token that the decoder reads.
  """

  pad: int = 0
  eos: int = 1
  start: int = 0

  def __str__(self) -> str:
    return ', '.join(f'{k} {v}' for k, v in dataclasses.asdict(self).items())


@dataclasses.dataclass(frozen=True)
class T5Config:
  """The sizes of a T5.

  Attributes:
    vocab_size: Rows of the embedding (a few more than the vocabulary has).
    emb_dim: Width of the residual stream (d_model).
    num_heads: Attention heads.
    head_dim: Size of one head; num_heads * head_dim need not be emb_dim.
    mlp_dim: Width of the MLP (d_ff).
    num_encoder_layers: Encoder layers; 0 for a decoder alone, a prefix LM.
    num_decoder_layers: Decoder layers.
    mlp_activations: ('gelu', 'linear') in T5 1.1, ('relu',) in T5 1.0.
    logits_via_embedding: T5 1.0's output layer: the embedding, scaled by
      emb_dim**-0.5. Otherwise it has its own kernel.
    scale_decoder_outputs: Whether what the output layer reads is multiplied by
      emb_dim**-0.5; if not given, that is so with logits_via_embedding.
    decoder_embedding: Whether the decoder embeds its tokens with a table of its
      own. With logits_via_embedding, the encoder's makes the logits.
    relative_attention_per_layer: Whether each layer has a relative position
      bias of its own, as in UMT5; otherwise the layers of a stack share one.
    ids: The model's special tokens. Gin files may give them as a dict:
      {'pad': 1, 'eos': 2, 'start': 0}.
    dropout_rate: In training, on inputs, sublayers and attention weights.
    dtype: 'float32' or 'bfloat16': what activations are computed in.
    frozen_dtype: What frozen matrices are kept in: 'float32', 'bfloat16', or
      'int8' with a scale for each output channel; `dtype` if not given.
    fsdp: Whether frozen matrices lie split over all devices, `data` included,
      and are gathered where they are used.
    remat: Whether the backward pass computes each layer again, and only what
      goes into it is kept.
    fused_attention: Whether attention is computed by an accelerator's fused
      kernel, where `fused` has one that fits; None does so on TPUs.
    scan: Whether the layers of a stack are one program, run in a loop over
      their parameters (see `scan`). Quicker to compile, and, with remat, in
      less memory; without remat in more, since a loop keeps all that the
      backward pass may want.
    relative_attention_num_buckets: Buckets of the relative position bias.
    relative_attention_max_distance: Where its last bucket starts.
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
  ids: TokenIds = TokenIds()
  dropout_rate: float = 0.0
  dtype: str = 'float32'
  frozen_dtype: str | None = None
  fsdp: bool = False
  remat: bool = False
  fused_attention: bool | None = None
  scan: bool = False
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128

  @property
  def decoder_only(self) -> bool:
    """Whether the decoder reads the inputs itself, before the targets."""
    return self.num_encoder_layers == 0

  @property
  def scales_outputs(self) -> bool:
    """`scale_decoder_outputs`, or what it is if not given."""
    if self.scale_decoder_outputs is None:
      return self.logits_via_embedding
    return self.scale_decoder_outputs

  def __post_init__(self):
    # Gin gives a list, and what describes a network must be hashable.
    object.__setattr__(self, 'mlp_activations', tuple(self.mlp_activations))
    counts = ('vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim')
    counts += ('num_decoder_layers', 'relative_attention_num_buckets')
    check_counts(**{name: getattr(self, name) for name in counts})
    if isinstance(self.ids, Mapping):
      object.__setattr__(self, 'ids', _ids(self.ids))
    annotations.check_fields(self)
    outside = {
      name: value
      for name, value in dataclasses.asdict(self.ids).items()
      if not (-1 if name == 'eos' else 0) <= value < self.vocab_size
    }
    if outside:
      raise UserError(
        f'ids has {outside}; they must be rows of the embedding, from 0 to'
        f' {self.vocab_size - 1}'
      )
    if self.dtype not in ('float32', 'bfloat16'):
      raise UserError(
        f"dtype is {self.dtype!r}; it must be 'float32' or 'bfloat16'"
      )
    if self.frozen_dtype not in (None, 'float32', 'bfloat16', 'int8'):
      raise UserError(
        f'FROZEN_DTYPE is {self.frozen_dtype!r}; it must be None (as DTYPE),'
        " 'float32', 'bfloat16' or 'int8'"
      )
    unknown = sorted(set(self.mlp_activations) - set(ACTIVATIONS))
    if unknown or not self.mlp_activations:
      raise UserError(
        f'mlp_activations are {self.mlp_activations}; they must be of'
        f' {tuple(ACTIVATIONS)}'
      )
    if not 0 <= self.dropout_rate < 1:
      raise UserError(
        f'DROPOUT_RATE is {self.dropout_rate}; it must be in [0, 1)'
      )


def _ids(given: Mapping[str, Any]) -> TokenIds:
  """TokenIds from what a gin file gives."""
  known = [field.name for field in dataclasses.fields(TokenIds)]
  wrong = {
    name: value
    for name, value in given.items()
    if name not in known
    or not isinstance(value, int)
    or isinstance(value, bool)
  }
  if wrong:
    raise UserError(f'ids has {wrong}; it must give whole numbers for {known}')
  return TokenIds(**given)


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


SIZES: Mapping[str, T5Config] = _sizes()


def t5(size: str | T5Config | None = None, **changes) -> T5Config:
  """A published size by name, that of a checkpoint, or one given in numbers.

  Args:
    size: A name in `SIZES`, such as 't5_1_1_base', or the configuration that
      `identity.from_checkpoint` read.
    **changes: Fields of `T5Config` that differ from those of `size`; all the
      sizes if it is not given.

  Raises:
    ValueError: If the name is unknown (the nearest ones are listed), or
      fields are unknown or missing.
  """
  fields = {f.name: f for f in dataclasses.fields(T5Config)}
  unknown = sorted(set(changes) - set(fields))
  if unknown:
    raise UserError(f'T5Config has no {unknown}; it has {sorted(fields)}')
  if isinstance(size, T5Config):
    return dataclasses.replace(size, **changes)
  if size is not None:
    if size not in SIZES:
      near = difflib.get_close_matches(size, SIZES, n=3) or sorted(SIZES)
      raise UserError(f'no model size {size!r}; did you mean {near}?')
    return dataclasses.replace(SIZES[size], **changes)
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
