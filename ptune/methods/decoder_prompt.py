"""A prompt before the decoder's input.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691) in the decoder: with the
prompt P [prompt, embed] and a row's embedded decoder inputs X [length, embed],
the decoder reads

    [P; X]  [prompt + length, embed]

The logits are those of X. Cached decoding reads P once, so that each token pays
only for its attention to P.

Trained: P, as decoder/prompt/prompt/prompt.

    --gin_file=methods/decoder_prompt.gin

methods/prompt_and_decoder_prompt.gin adds a prompt before the encoder's input.
"""

import functools

from ptune.methods import prompt_init
from ptune.methods.packed_prompts import packed
from ptune.methods.prompt import Prompt, check_length, insert
from ptune.model.adapters import Method

PATH = 'decoder/prompt/prompt/prompt'


def decoder_prompt(
  length: int = 100, init: prompt_init.Initializer | None = None
) -> Method:
  """A soft prompt of `length` tokens for the decoder; the rest is frozen.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    init: Its initialiser from `prompt_init`; random uniform if not given.

  Raises:
    UserError: If the length is below 1.
  """
  check_length(length)
  return Method(
    name='decoder_prompt',
    placements=(insert(length, 'decoder'),),
    trainable=(PATH,),
    initial={PATH: init or prompt_init.random_uniform()},
    packed=packed('decoder', functools.partial(Prompt, length=length), length),
  )
