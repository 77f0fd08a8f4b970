"""The settings that the networks of all families have."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ptune.config import annotations
from ptune.errors import UserError, check_counts


@dataclasses.dataclass(frozen=True)
class TokenIds:
  """The ids of a model's special tokens; T5's by default.

  Attributes:
    pad: Padding. It is masked, and the loss leaves it out.
    eos: Ends inputs and targets; -1 if nothing ends an answer.
    start: The first token that the decoder reads.
    also_ends: Other tokens that end an answer, as <end_of_turn> does in models
      for chats. Answers have `eos` in their place. Not compared with those of a
      checkpoint, because model files do not list them.
  """

  pad: int = 0
  eos: int = 1
  start: int = 0
  also_ends: tuple[int, ...] = dataclasses.field(default=(), compare=False)

  def __post_init__(self):
    object.__setattr__(self, 'also_ends', tuple(self.also_ends))

  @property
  def has_own_start(self) -> bool:
    """Whether `start` is neither padding nor EOS.

    Gemma's vocabulary puts such a token, <bos>, before every text. Targets are
    then what comes after it: the decoder reads it first in any case.
    """
    return self.start not in (self.pad, self.eos)

  def __str__(self) -> str:
    told = dataclasses.asdict(self).items()
    return ', '.join(f'{k} {v}' for k, v in told if v != ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A model's special tokens, and how its network is computed.

  Attributes:
    vocab_size: Rows of the embedding.
    ids: The model's special tokens. Gin files may give them as a dict:
      {'pad': 1, 'eos': 2, 'start': 0}.
    dropout_rate: Dropout in training, of inputs, sublayers and attention
      weights.
    dtype: Type of activations: 'float32' or 'bfloat16'.
    frozen_dtype: Type of frozen matrices in memory: 'float32', 'bfloat16', or
      'int8' with a scale for each output channel; `dtype` if not given.
    fsdp: Whether frozen matrices are sharded over all devices, those of the
      axis `data` too, and gathered when they are used.
    remat: Whether the forward pass keeps only the inputs of each layer, and the
      backward pass computes the layer again.
    fused_attention: Whether an accelerator's fused kernel computes attention,
      if `fused` has one that fits; None does so on TPUs.
    fused_mlp: The same of MLPs with frozen weights, for which only TPUs have
      one.
    scan: Whether a loop computes the layers of a stack, see `scan`. It compiles
      faster. It needs less memory with remat, and more without, because the
      loop keeps everything that the backward pass may read.
    length_multiple: Padding rounds the encoder's positions, prompt and inputs
      together, up to a multiple of this; None follows the device, see
      `layers.fill_tiles`.
  """

  vocab_size: int
  ids: TokenIds = TokenIds()
  dropout_rate: float = 0.0
  dtype: str = 'float32'
  frozen_dtype: str | None = None
  fsdp: bool = False
  remat: bool = False
  fused_attention: bool | None = None
  fused_mlp: bool | None = None
  scan: bool = False
  length_multiple: int | None = None

  @property
  def norm_offset(self) -> float:
    """The number that norms add to their stored scale."""
    return 0.0

  def __post_init__(self):
    if isinstance(self.ids, Mapping):
      object.__setattr__(self, 'ids', _ids(self.ids))
    annotations.check_fields(self)
    if self.length_multiple is not None:
      check_counts(length_multiple=self.length_multiple)
    outside = {
      name: value
      for name, value in dataclasses.asdict(self.ids).items()
      for token in _ends(name, value)
      if not (-1 if name == 'eos' else 0) <= token < self.vocab_size
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
    if not 0 <= self.dropout_rate < 1:
      raise UserError(
        f'DROPOUT_RATE is {self.dropout_rate}; it must be in [0, 1)'
      )


def _ends(name: str, value: Any) -> Sequence[Any]:
  """The tokens of a field of TokenIds."""
  several = name == 'also_ends' and isinstance(value, list | tuple)
  return value if several else [value]


def _ids(given: Mapping[str, Any]) -> TokenIds:
  """Makes TokenIds from the dict of a gin file."""
  known = [field.name for field in dataclasses.fields(TokenIds)]
  wrong = {
    name: value
    for name, value in given.items()
    if name not in known or any(type(x) is not int for x in _ends(name, value))
  }
  if wrong:
    raise UserError(f'ids has {wrong}; it must give whole numbers for {known}')
  return TokenIds(**given)
