"""Per-layer prompts: one before the input and one in every encoder layer.

These are the deep prompts of Qin and Eisner 2021, "Learning How to Ask" (arXiv
2104.06599), and of Liu et al. 2021, "P-Tuning v2" (arXiv 2110.07602). The
implementation of Lester et al. 2021 (arXiv 2104.08691) offers them too. The
encoder reads [P; X]. In the input of layer i, [prompt + length, embed], the
rows x of the prompt become

    replace    P_i
    add        x + P_i

With `replace`, layer 0 reads P_0, and P has no effect; it is kept because the
implementation has it. With `add`, all P_i start at zero, so training starts
from the model with the prompt P alone.

Trained: P and all P_i, each [prompt, embed].

    --gin_file=methods/per_layer.gin
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.prompt import PATH, Prompt, check_length, insert
from ptune.model.adapters import Method, Placement

COMBINE = ('replace', 'add')


class LayerPrompt(nn.Module):
  """Changes the first rows of a layer's input.

  Attributes:
    length: How many rows.
    add: Whether the prompt is added to these rows, or replaces them.
  """

  length: int
  add: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, prompt + length, embed] -> the same shape."""
    del x
    init = nn.initializers.zeros if self.add else nn.initializers.uniform(1.0)
    prompt = Prompt(self.length, init, name='prompt')(y.shape[-1])
    prompt = prompt.astype(y.dtype)[None]
    first, rest = y[:, : self.length], y[:, self.length :]
    first = (
      first + prompt if self.add else jnp.broadcast_to(prompt, first.shape)
    )
    return jnp.concatenate([first, rest], axis=1)


def per_layer(
  length: int = 20,
  combine: str = 'add',
  init: prompt_init.Initializer | None = None,
) -> Method:
  """Prompts of `length` tokens at the input and at every encoder layer.

  Args:
    length: Rows of each prompt (PROMPT_LENGTH).
    combine: 'replace' or 'add'.
    init: Initialiser of the input's prompt, from `prompt_init`; random uniform
      if not given.

  Raises:
    UserError: If the length is below 1 or `combine` is unknown.
  """
  check_length(length)
  if combine not in COMBINE:
    raise UserError(f'combine is {combine!r}; it must be one of {COMBINE}')
  layer = functools.partial(LayerPrompt, length=length, add=combine == 'add')
  return Method(
    name='per_layer',
    placements=(
      insert(length),
      Placement('encoder/layers_*/input', 'prompt', layer),
    ),
    trainable=(PATH, 'encoder/layers_*/prompt/prompt/prompt'),
    settings={'combine': combine},
    initial={PATH: init or prompt_init.random_uniform()},
  )
