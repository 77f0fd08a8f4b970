"""Prefix tuning: learned keys and values in every attention.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation"
(arXiv 2101.00190), section 4. In an attention with keys K and values V [length,
heads, kv], each head attends to

    [P_k; K]  and  [P_v; V]      [prefix + length, heads, kv]

Every query sees the prefix, at a relative position bias of 0. As in the paper,
the encoder's attention and both attentions of the decoder have a prefix. PEFT
has none in the encoder; `attentions` chooses.

P often trains badly when it is trained directly. With `hidden`, an MLP computes
it from a smaller matrix (section 4.3), and is dropped after training:

    P = tanh(E A) B      E [prefix, hidden], A [hidden, hidden],
                         B [hidden, joined_kv]

Here each P has its own E and A, which the paper's layers share, and there are
no biases.

Trained: P, or E, A and B. In both cases a run writes P; to use it, leave out
`hidden`.

    --gin_file=methods/prefix.gin
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.prompt import check_length
from ptune.model.adapters import Method, Placement, Rows
from ptune.model.layers import Dense

STACKS = {
  'attention': 'encoder',
  'self_attention': 'decoder',
  'encoder_decoder_attention': 'decoder',
}
# About the scale of T5's keys and values.
_INIT = nn.initializers.normal(1.0)


class Prefix(nn.Module):
  """Inserts a prefix before the keys, or before the values, of every row.

  Attributes:
    length: Rows of the prefix.
    hidden: Hidden units of the MLP; None to train the prefix directly.
  """

  length: int
  hidden: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, k, heads, kv] -> [batch, prefix + k, heads, kv]."""
    del x
    joined = math.prod(y.shape[2:])
    if self.hidden is None:
      prefix = partitioning.param_with_axes(
        'prefix',
        _INIT,
        (self.length, joined),
        jnp.float32,
        axes=('prompt', 'adapter_out'),
      )
    else:
      prefix = Made(self.length, self.hidden, name='made')(joined)
    prefix = prefix.astype(y.dtype).reshape(1, self.length, *y.shape[2:])
    prefix = jnp.broadcast_to(prefix, (y.shape[0], *prefix.shape[1:]))
    return jnp.concatenate([prefix, y], axis=1)


class Made(nn.Module):
  """tanh(E A) B, [prefix, joined_kv].

  Attributes:
    length: Rows of E.
    hidden: Columns of E and A.
  """

  length: int
  hidden: int

  @nn.compact
  def __call__(self, joined: int) -> jax.Array:
    rows = partitioning.param_with_axes(
      'embedding',
      _INIT,
      (self.length, self.hidden),
      jnp.float32,
      axes=('prompt', 'adapter_in'),
    )
    h = Dense(self.hidden, ('adapter_in', 'adapter_hidden'), name='wi')(rows)
    return Dense(joined, ('adapter_hidden', 'adapter_out'), name='wo')(
      jnp.tanh(h)
    )


def _fold(trained: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
  """{'.../made/embedding': E, ...} -> {'.../prefix': tanh(E A) B}."""
  del rows
  places = {path.partition('/made/')[0] for path in trained}
  return {
    f'{place}/prefix': np.tanh(
      trained[f'{place}/made/embedding'] @ trained[f'{place}/made/wi/kernel']
    )
    @ trained[f'{place}/made/wo/kernel']
    for place in sorted(places)
  }


def prefix(
  length: int = 20,
  hidden: int | None = None,
  attentions: Sequence[str] = tuple(STACKS),
  init: prompt_init.Initializer | None = None,
) -> Method:
  """Prefixes of `length` keys and values in every layer; the rest is frozen.

  Args:
    length: Rows of each prefix (PROMPT_LENGTH).
    hidden: Hidden units of the MLP; None to train the prefixes directly.
    attentions: The attentions that have a prefix: 'attention' (the encoder's),
      'self_attention' and 'encoder_decoder_attention' (the decoder's).
    init: `prompt_init.from_keys_and_values`, for the attentions that read the
      input; random if not given.

  Raises:
    UserError: If a size is below 1, an attention is unknown, or both `hidden`
      and `init` are given.
  """
  check_length(length)
  if hidden is not None and hidden < 1:
    raise UserError(f'hidden is {hidden}; it must be None or at least 1')
  unknown = sorted(set(attentions) - set(STACKS))
  if unknown or not attentions:
    raise UserError(
      f'attentions are {list(attentions)}; choose at least one of'
      f' {list(STACKS)}'
    )
  if init is not None and hidden is not None:
    raise UserError(
      f'init cannot initialise a prefix that an MLP computes (hidden is'
      f' {hidden}); leave one of the two out'
    )
  adapter = functools.partial(Prefix, length=length, hidden=hidden)
  return Method(
    name='prefix' if hidden is None else 'prefix/mlp',
    placements=tuple(
      Placement(
        f'{STACKS[attention]}/layers_*/{attention}/{site}',
        f'{site}_prefix',
        adapter,
      )
      for attention in STACKS
      if attention in attentions
      for site in ('keys', 'values')
    ),
    trainable=('*_prefix/*',),
    fold=None if hidden is None else _fold,
    settings={'attentions': [a for a in STACKS if a in attentions]},
    initial={
      f'{STACKS[attention]}/layers_*/{attention}/*{prompt_init.PREFIX}': init
      for attention in attentions
      if init is not None and attention != 'self_attention'
    },
  )
