"""LoRA: adds a product of two thin matrices to a kernel.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen 2021, "LoRA: Low-Rank
Adaptation of Large Language Models" (arXiv 2106.09685), section 4. At a site
that maps x to W x

    y = W x + (alpha / rank) x A B

A [in, rank] starts with normal numbers of variance 1 / in, B [rank, out] at
zero, so training starts from the model as it is. The default sites are the
paper's: queries and values of every attention.

Trained: A and B. Merging replaces W by W + (alpha / rank) A B.

    --gin_file=methods/lora.gin
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn

from ptune.errors import UserError
from ptune.model.adapters import Method, Placement
from ptune.model.layers import Dense

# The kernels that LoRA can change -> the module that owns them.
OWNERS = {
  **dict.fromkeys(('query', 'key', 'value', 'out'), '*attention'),
  **dict.fromkeys(('wi', 'wi_0', 'wi_1', 'wo'), 'mlp'),
}


class LowRank(nn.Module):
  """Adds scale * x A B to the output of a site.

  Attributes:
    rank: Columns of A.
    scale: alpha / rank.
  """

  rank: int
  scale: float

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """x [batch, length, in], y [batch, length, *out] -> the shape of y."""
    # Queries, keys and values have two output axes: [heads, kv].
    out = int(np.prod(y.shape[2:]))
    h = Dense(
      self.rank,
      ('adapter_in', 'adapter_hidden'),
      y.dtype,
      kernel_init=nn.initializers.normal(x.shape[-1] ** -0.5),
      name='a',
    )(x)
    h = Dense(
      out,
      ('adapter_hidden', 'adapter_out'),
      y.dtype,
      kernel_init=nn.initializers.zeros,
      name='b',
    )(h)
    return y + self.scale * h.reshape(y.shape)


def lora(
  rank: int = 8,
  alpha: float = 16.0,
  sites: Sequence[str] = ('query', 'value'),
) -> Method:
  """Low-rank changes of the kernels at `sites`, in every layer.

  Args:
    rank: Columns of A.
    alpha: The product A B is multiplied by alpha / rank.
    sites: Some of `OWNERS`: 'query', 'key', 'value' and 'out' of every
      attention; 'wi_0', 'wi_1' ('wi' in T5 1.0) and 'wo' of every MLP.

  Raises:
    UserError: If the rank is below 1, or a site is unknown or given twice.
  """
  if not isinstance(rank, int) or rank < 1:
    raise UserError(
      f'the rank of LoRA is {rank!r}; it must be at least 1, a whole number'
    )
  wrong = [s for s in sites if s not in OWNERS or list(sites).count(s) > 1]
  if wrong or not sites:
    raise UserError(
      f'the sites of LoRA are {list(sites)}; choose at least one of'
      f' {list(OWNERS)}, each once'
    )
  scale = alpha / rank

  def merge(path, value, trained):
    if path.split('/')[-2] not in sites:  # It may belong to another LoRA.
      return value
    adapter = f'{path.removesuffix("/kernel")}_lora'
    a, b = (trained.get(f'{adapter}/{name}/kernel') for name in 'ab')
    return value if a is None else value + scale * (a @ b)

  return Method(
    name='lora',
    placements=tuple(
      Placement(
        f'*/layers_*/{OWNERS[site]}/{site}',
        f'{site}_lora',
        functools.partial(LowRank, rank=rank, scale=scale),
      )
      for site in sites
    ),
    trainable=('*_lora/*',),
    merge=merge,
    settings={'rank': rank, 'alpha': alpha, 'sites': list(sites)},
  )
