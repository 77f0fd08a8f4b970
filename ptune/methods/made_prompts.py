"""Methods whose prompt is made by a module, of fewer or other numbers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from ptune.methods import prompt_init
from ptune.methods.packed_prompts import packed
from ptune.methods.prompt import PATH, SCOPE, InsertPrompt, check_length
from ptune.model.adapters import Method, Placement, Rows


def made_prompt(
  name: str,
  length: int,
  source: Callable[..., nn.Module],
  fold: Callable[[Mapping[str, np.ndarray], Rows], Any],
  initial: Mapping[str, prompt_init.Initializer] | None = None,
  settings: Mapping[str, Any] | None = None,
) -> Method:
  """A prompt that a module makes of what is trained, and that is saved alone.

  Args:
    name: Of the method.
    length: Rows of the prompt (PROMPT_LENGTH).
    source: The module, in place of `Prompt`.
    fold: What the module makes, [prompt, embed], of its parameters by name
      (float32, NumPy) and of rows of the base's embedding.
    initial: `Method.initial`, by the name of the parameter.
    settings: `Method.settings`.

  Raises:
    ValueError: If the length is below 1.
  """
  check_length(length)

  def fold_all(trained, rows):
    # On the host: one process alone may ask for it.
    own = {k.removeprefix(f'{SCOPE}/'): np.array(x) for k, x in trained.items()}
    return {PATH: np.asarray(fold(own, rows), np.float32)}

  return Method(
    name=name,
    placements=(
      Placement(
        'encoder/embed',
        'prompt',
        functools.partial(InsertPrompt, length=length, source=source),
      ),
    ),
    trainable=(f'{SCOPE}/*',),
    prompt=PATH,
    fold=fold_all,
    settings=dict(settings or {}),
    initial={f'{SCOPE}/{k}': init for k, init in (initial or {}).items()},
    packed=packed('encoder', functools.partial(source, length=length), length),
  )
