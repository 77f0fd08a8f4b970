"""Per-layer prompts: one before the input, and one for every encoder layer.

The paper's implementation of prompt tuning has these beside the prompt of the
input (Lester et al. 2021, arXiv 2104.08691); they are the deep prompts of Qin
and Eisner 2021, "Learning How to Ask" (arXiv 2104.06599), and of Liu et al.
2021, "P-Tuning v2" (arXiv 2110.07602). The encoder reads [P; X], and layer i
takes, before its norm, for the first rows x of its input [prompt + length,
embed]

    replace    P_i
    add        x + P_i

With `replace`, layer 0 reads P_0 and P has no effect; it is there because the
implementation has it. With `add`, P_i start at zero: as a prompt alone.

Trained: P and all P_i, each [prompt, embed].

    --gin_file=methods/per_layer.gin
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.prompt import PATH, InsertPrompt, Prompt, check_length
from ptune.model.adapters import Method, Placement

COMBINE = ('replace', 'add')


class LayerPrompt(nn.Module):
  """Changes the first rows of a layer's input.

  Attributes:
    length: How many.
    add: Whether the prompt is added to them; otherwise it takes their place.
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
    init: One of `prompt_init`, for the prompt of the input; the paper's random
      uniform if not given.

  Raises:
    ValueError: If the length is below 1, or `combine` unknown.
  """
  check_length(length)
  if combine not in COMBINE:
    raise UserError(f'combine is {combine!r}; it must be one of {COMBINE}')
  layer = functools.partial(LayerPrompt, length=length, add=combine == 'add')
  return Method(
    name='per_layer',
    placements=(
      Placement(
        'encoder/embed',
        'prompt',
        functools.partial(InsertPrompt, length=length),
      ),
      Placement('encoder/layers_*/input', 'prompt', layer),
    ),
    trainable=(PATH, 'encoder/layers_*/prompt/prompt/prompt'),
    settings={'combine': combine},
    initial={PATH: init or prompt_init.random_uniform()},
  )
