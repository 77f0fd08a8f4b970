"""`ptune export` of methods other than prompts: merges them into the base.

A merged model has the base's own parameters. It answers as the base does with
the method's adapters, and any program that reads the layout can use it.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from ptune import methods
from ptune.convert import identity, open_checkpoint, output
from ptune.convert.conversion import MARKS
from ptune.convert.export import check_base, recorded_base, step_after
from ptune.convert.prompts import ONE, SEVERAL
from ptune.convert.safetensors_files import open_file
from ptune.convert.source import Index, Leaf, Source
from ptune.convert.tokenizer_files import write_vocabulary
from ptune.convert.trained import SUFFIX, open_trained
from ptune.errors import UserError
from ptune.model import network, structure
from ptune.model.adapters import Method
from ptune.model.sizes import Config


def is_trained(place: epath.Path) -> bool:
  """Returns whether a file holds a method's parameters, and not prompts."""
  if place.suffix != SUFFIX or place.is_dir():
    return False
  return set(open_file(place)[0]) not in (ONE, SEVERAL)


def export_merged(
  file: epath.PathLike,
  layout: str,
  directory: epath.PathLike,
  *,
  base: str | None = None,
  step: int | None = None,
  overwrite: bool = False,
) -> list[str]:
  """Writes a merged model, in float32; holds one of its arrays at a time.

  Args:
    file: A .safetensors file of a run's `prompts/`.
    layout: 't5x' or 'huggingface'.
    directory: The directory to write.
    base: The base model, as for `open_checkpoint`; the run's if not given. It
      must be the model that the file was trained on.
    step: The training step of a T5X checkpoint; if not given, the base's step
      plus the run's.
    overwrite: Whether to replace an earlier output.

  Returns:
    Lines of text that report the result.

  Raises:
    ValueError: The method cannot be merged, the base is another model, or the
      output exists.
  """
  if layout not in MARKS:
    raise UserError(
      f'{file} holds the parameters of a method that is not a prompt:'
      f' --format={layout} cannot hold them; use {" or ".join(MARKS)}, which'
      ' merge them into the base'
    )
  trained, facts = open_trained(file)
  method = _method(file, facts)
  base = base or recorded_base(file)
  if base is None:
    raise UserError(
      f'{file} must be merged into the model that it was trained on; name that'
      ' model with --base=PATH'
    )
  target = output.check(
    directory, overwrite, MARKS[layout], inputs=(str(file), base)
  )
  source = open_checkpoint(base)
  config = identity.config(source)
  identity.check_whole(source, config)
  if layout == 't5x':
    identity.check_t5x(source, config)
  _check_shapes(method, trained, config)
  checksums = identity.Checksums()
  leaves = {
    # The fingerprint covers the frozen parameters.
    path: leaf if path in trained.leaves else checksums.reading(path, leaf)
    for path, leaf in identity.base_leaves(source).items()
  }
  values = {path: leaf.read() for path, leaf in trained.leaves.items()}
  merged = {
    path: _merged(method, path, leaf, values) for path, leaf in leaves.items()
  }
  if step is None:
    step = step_after(facts, source)
  vocabulary: list[str] = []
  with output.new_directory(target) as temporary:
    if layout == 't5x':
      from ptune.convert.t5x import write_t5x

      write_t5x(temporary, merged, step)
    else:
      from ptune.convert.huggingface import write_huggingface

      write_huggingface(temporary, merged, config, step)
      vocabulary = write_vocabulary(
        temporary, base, config.vocab_size, config.ids.pad
      )
    line = check_base(file, facts, source, checksums.digest())
  return [
    f'base {source.describe()}',
    line,
    *vocabulary,
    f'wrote {target}: step {step}, {method.name} of {file} merged',
  ]


def _method(file: epath.PathLike, facts: Mapping[str, Any]) -> Method:
  if 'method' not in facts:
    raise UserError(
      f'{file} does not say which method trained it: the .json that a run'
      ' writes beside it is missing'
    )
  method = methods.make(facts['method'], facts.get('settings'))
  if method.merge is None:
    raise UserError(
      f'{file} was trained by method {method.name!r}; no model without adapters'
      ' can answer like it, so it cannot be merged. Use the file as PROMPT_FILE'
    )
  return method


def _check_shapes(method: Method, trained: Source, config: Config) -> None:
  """Raises ValueError if a parameter is missing, unknown or misshapen."""
  params = structure.parameters(network.Transformer(config, method.placements))
  expected = {p: x.shape for p, x in params.items() if method.trains(p)}
  wrong = identity.misshapen(trained.shapes, expected)
  if wrong:
    raise UserError(
      f'{trained.path} does not match what method {method.name!r} trains:\n'
      + '\n'.join(wrong)
    )


def _merged(
  method: Method, path: str, leaf: Leaf, trained: Mapping[str, np.ndarray]
) -> Leaf:
  def fetch(index: Index) -> np.ndarray:
    assert method.merge is not None
    value = np.asarray(leaf.read(), np.float32)
    return np.asarray(method.merge(path, value, trained), np.float32)[index]

  return Leaf(leaf.shape, jnp.dtype(jnp.float32), fetch)
