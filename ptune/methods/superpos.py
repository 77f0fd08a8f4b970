"""SuperPos: each row of the prompt is a learned mix of token embeddings.

Ali Sadraei Javaheri, Asgari, McHardy and Rabiee 2024, "SuperPos-Prompt"
(arXiv 2406.05279). With the embeddings E [tokens, embed] of sampled tokens, the
prompt is

    P = W E      W [prompt, tokens]

The tokens are drawn without replacement from the first ids of the vocabulary,
which are the most common ones, and are the same for all rows of the prompt.
Each row of W starts as normal numbers of variance 1 / tokens, so that a row of
P is about as large as a token's embedding. The start and the drawing are our
choices.

The paper turns dropout off in the frozen network: set DROPOUT_RATE to 0.

Trained: W, prompt * tokens numbers (12,800 for 100 and 128), whatever the
model's size. A run writes P, for methods/prompt.gin.

    --gin_file=methods/superpos.gin
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods.made_prompts import made_prompt
from ptune.methods.p_tuning import AXES
from ptune.model.adapters import Method
from ptune.model.layers import Embed


class Mixture(nn.Module):
  """A prompt [prompt, embed] mixed from the embeddings of `ids`."""

  length: int
  ids: tuple[int, ...]

  @nn.compact
  def __call__(self, embed: int) -> jax.Array:
    table = _embedder(self)
    if max(self.ids) >= table.vocab_size:
      raise UserError(
        f'the tokens of SuperPos are drawn from ids up to {max(self.ids)}, and'
        f' the vocabulary has {table.vocab_size}; lower'
        ' superpos.superpos.population'
      )
    weights = partitioning.param_with_axes(
      'weights',
      nn.initializers.normal(len(self.ids) ** -0.5),
      (self.length, len(self.ids)),
      jnp.float32,
      axes=('prompt', AXES[1]),
    )
    tokens = table(np.array(self.ids)).astype(jnp.float32)
    return jnp.matmul(weights, tokens, precision='highest')


def _embedder(module: nn.Module) -> Embed:
  """The token embedding of the stack that a module stands in."""
  while not hasattr(module, 'token_embedder'):
    assert isinstance(module.parent, nn.Module)
    module = module.parent
  return module.token_embedder


def superpos(
  length: int = 100,
  tokens: int = 128,
  population: int = 2000,
  seed: int = 0,
) -> Method:
  """A prompt of `length` rows, each a mix of the same `tokens` embeddings.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    tokens: How many embeddings are mixed.
    population: The tokens are drawn from this many first ids.
    seed: Draws them.

  Raises:
    ValueError: If a size is below 1, or the population below the tokens.
  """
  if not 1 <= tokens <= population:
    raise UserError(
      f'SuperPos mixes {tokens} tokens of the first {population} ids; it needs'
      ' at least 1 token, and at least as many ids'
    )
  drawn = np.random.default_rng(seed).choice(population, tokens, replace=False)
  ids = tuple(map(int, drawn))

  def fold(trained, rows):
    return trained['weights'] @ rows(ids)

  return made_prompt(
    'superpos',
    length,
    functools.partial(Mixture, ids=ids),
    fold,
    settings={'tokens': tokens, 'population': population, 'seed': seed},
  )
