"""SuperPos: each row of the prompt is a learned mix of token embeddings.

Ali Sadraei Javaheri, Asgari, McHardy and Rabiee 2024, "SuperPos-Prompt"
(arXiv 2406.05279). With the embeddings E [tokens, embed] of sampled tokens, the
prompt is

    P = W E      W [prompt, tokens]

The tokens are drawn without replacement from the first ids of the vocabulary,
which are the most common ones. All rows of the prompt share them. W starts with
normal numbers of variance 1 / tokens, so a row of P is about as large as a
token's embedding. How tokens are drawn and how W starts are our choices.

The paper turns dropout off in the frozen network: set DROPOUT_RATE to 0.

Trained: W, prompt * tokens parameters (12,800 for 100 and 128), whatever the
model's size. A run writes P to `prompts/`, and methods/prompt.gin reads it.

    --gin_file=methods/superpos.gin
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods.adapter_layers import PROMPT_AXES
from ptune.methods.made_prompts import made_prompt
from ptune.model.adapters import Method
from ptune.model.layers import Embed


class Mixture(nn.Module):
  """W E, [prompt, embed].

  Attributes:
    length: Rows of the prompt.
    ids: The tokens whose embeddings are E.
  """

  length: int
  ids: tuple[int, ...]

  @nn.compact
  def __call__(self, embed: int) -> jax.Array:
    table = _embedder(self)
    if max(self.ids) >= table.vocab_size:
      raise UserError(
        f'SuperPos drew token {max(self.ids)}, but the vocabulary has only'
        f' {table.vocab_size} tokens; lower superpos.superpos.population to'
        ' that'
      )
    weights = partitioning.param_with_axes(
      'weights',
      nn.initializers.normal(len(self.ids) ** -0.5),
      (self.length, len(self.ids)),
      jnp.float32,
      axes=('prompt', PROMPT_AXES[1]),
    )
    tokens = table(np.array(self.ids)).astype(jnp.float32)
    return jnp.matmul(weights, tokens, precision='highest')


def _embedder(module: nn.Module) -> Embed:
  """The token embedding of the encoder or decoder that owns a module."""
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
    tokens: Number of embeddings in the mix.
    population: The tokens are drawn from the ids below this.
    seed: Draws the tokens.

  Raises:
    UserError: If a size is below 1, or population is smaller than tokens.
  """
  if not 1 <= tokens <= population:
    raise UserError(
      f'SuperPos got tokens = {tokens} and population = {population}; tokens'
      ' must be at least 1 and at most population'
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
