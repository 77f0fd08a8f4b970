"""A prompt before the decoder's input.

As in prompt tuning (Lester et al. 2021, arXiv 2104.08691), in the other stack:
with the prompt P [prompt, embed] and a row's embedded decoder inputs X
[length, embed], the decoder reads

    [P; X]  [prompt + length, embed]

and what comes out behind P are the logits. P is read once and then lies in
the cache of a decode, so that it costs nothing per token but attention.

Trained: P, as decoder/prompt/prompt/prompt.

    --gin_file=methods/decoder_prompt.gin; together with a prompt before the
    encoder's input, --gin_file=methods/prompt_and_decoder_prompt.gin
"""

import functools

from ptune.methods import prompt_init
from ptune.methods.packed_prompts import packed
from ptune.methods.prompt import InsertPrompt, Prompt, check_length
from ptune.model.adapters import Method, Placement

PATH = 'decoder/prompt/prompt/prompt'


def decoder_prompt(
  length: int = 100, init: prompt_init.Initializer | None = None
) -> Method:
  """A soft prompt of `length` tokens for the decoder; the rest is frozen.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    init: One of `prompt_init`; random uniform if not given.

  Raises:
    ValueError: If the length is below 1.
  """
  check_length(length)
  adapter = functools.partial(InsertPrompt, length=length)
  return Method(
    name='decoder_prompt',
    placements=(Placement('decoder/embed', 'prompt', adapter),),
    trainable=(PATH,),
    initial={PATH: init or prompt_init.random_uniform()},
    packed=packed('decoder', functools.partial(Prompt, length=length), length),
  )
