"""Methods whose prompt is computed from other parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from ptune.methods import prompt_init
from ptune.methods.packed_prompts import packed
from ptune.methods.prompt import PATH, SCOPE, check_length, insert
from ptune.model.adapters import Method, Rows


def made_prompt(
  name: str,
  length: int,
  source: Callable[..., nn.Module],
  fold: Callable[[Mapping[str, np.ndarray], Rows], Any],
  initial: Mapping[str, prompt_init.Initializer] | None = None,
  settings: Mapping[str, Any] | None = None,
) -> Method:
  """A method that trains the inputs of `source`, and saves only the prompt.

  Args:
    name: Name of the method.
    length: Rows of the prompt (PROMPT_LENGTH).
    source: The module that computes the prompt, instead of `Prompt`.
    fold: Computes the same prompt [prompt, embed] from the module's parameters
      by name (float32, NumPy) and from rows of the base's embedding.
    initial: `Method.initial`, by the name of the parameter.
    settings: `Method.settings`.

  Raises:
    UserError: If the length is below 1.
  """
  check_length(length)

  def fold_all(trained, rows):
    # In NumPy, because one process may ask for it without the others.
    own = {k.removeprefix(f'{SCOPE}/'): np.array(x) for k, x in trained.items()}
    return {PATH: np.asarray(fold(own, rows), np.float32)}

  return Method(
    name=name,
    placements=(insert(length, source=source),),
    trainable=(f'{SCOPE}/*',),
    prompt=PATH,
    fold=fold_all,
    settings=dict(settings or {}),
    initial={f'{SCOPE}/{k}': init for k, init in (initial or {}).items()},
    packed=packed('encoder', functools.partial(source, length=length), length),
  )
