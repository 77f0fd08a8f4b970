"""`ptune export` and `ptune import`: convert prompts to and from other formats.

npy          PATH.npy [prompt, embed] and PATH.json, as a run writes them
safetensors  one file, with the facts about the prompt in its metadata
peft         a directory that PeftModel.from_pretrained loads
t5x          a whole checkpoint: the base model, and the prompt in it
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from ptune.convert import (
  identity,
  open_checkpoint,
  output,
  peft,
  safetensors_files,
)
from ptune.convert.hub import SCHEME
from ptune.convert.prompts import FACTS, PATH, Prompt, write_prompt
from ptune.convert.source import Leaf, Source, sizes
from ptune.convert.storage import read_json
from ptune.convert.tokenizer_files import write_vocabulary
from ptune.errors import UserError

# Methods that consist of a prompt before the first token.
PLAIN = (
  'prompt',
  'p_tuning/mlp',
  'p_tuning/lstm',
  'residual',
  'superpos',
  'ulpt',
)
FORMATS = ('npy', 'peft', 't5x', 'safetensors')

# An output directory that is replaced must contain one of these.
MARKS = {'peft': (peft.CONFIG,), 't5x': ('checkpoint',)}


def export(
  prompt: Prompt,
  layout: str,
  path: epath.PathLike,
  *,
  base: str | None = None,
  base_name: str | None = None,
  step: int | None = None,
  overwrite: bool = False,
) -> list[str]:
  """Writes a prompt.

  Args:
    prompt: From `prompts.read_prompt`.
    layout: One of FORMATS.
    path: The file or directory to write; a file's suffix is added.
    base: The base model, as for `open_checkpoint`. If not given, the base that
      the prompt's run recorded, if it still exists. It must be the model that
      the prompt was trained on.
    base_name: The base model's name for PEFT, such as 'google/t5-v1_1-base'.
    step: The step of a T5X checkpoint; if not given, the base's step plus the
      prompt's.
    overwrite: Whether to replace an earlier output.

  Returns:
    Lines of text that report the result.

  Raises:
    ValueError: The prompt does not suit the format, the base is another model,
      or the output exists.
  """
  if layout == 'huggingface':
    raise UserError(
      f'{prompt.path} is a prompt, and a Hugging Face model has no place for'
      ' it; --format=peft writes it as an adapter beside the model'
    )
  if layout not in FORMATS:
    raise UserError(f'--format={layout}; expected one of {", ".join(FORMATS)}')
  if layout in ('npy', 'safetensors'):
    path = f'{os.fspath(path).removesuffix("." + layout)}.{layout}'
  inputs = [p for p in (prompt.path, base) if p]
  marks = MARKS.get(layout, ())
  target = output.check(path, overwrite, marks, inputs=tuple(inputs))
  if layout == 'npy':
    return _export_npy(prompt, target, overwrite)
  if layout == 'safetensors':
    return _export_safetensors(prompt, target)
  method = prompt.facts.get('method', 'prompt')
  if method not in PLAIN:
    raise UserError(
      f'{prompt.path} was trained by method {method!r}; {layout} only puts a'
      ' prompt before the first token, so it would mean something else there.'
      ' Export it as npy or safetensors'
    )
  named = base is not None
  base = base or recorded_base(prompt.path)
  if base is None and layout == 't5x':
    raise UserError(
      'A T5X checkpoint includes the base model; name it with --base=PATH'
    )
  lines = []
  source = None
  if base is not None:
    try:
      source = open_checkpoint(base)
    except (ValueError, OSError) as error:
      if named or layout == 't5x':
        raise
      reason = str(error).splitlines()[0]
      lines.append(f'the base model of the run cannot be opened: {reason}')
  if source is not None:
    lines.append(f'base {source.describe()}')
    check_width(prompt, source)
  if layout == 't5x':
    assert source is not None
    return lines + _export_t5x(prompt, target, source, step)
  return lines + _export_peft(prompt, target, source, base, base_name)


def _facts(prompt: Prompt) -> dict[str, Any]:
  """Returns the facts to write beside a prompt."""
  return {
    **prompt.facts,
    'prompt_length': prompt.array.shape[0],
    'read_from': prompt.path,
  }


def _text(prompt: Prompt) -> str:
  rows, width = prompt.array.shape
  return f'prompt of {rows} x {width} from {prompt.path}'


def _export_npy(
  prompt: Prompt, target: epath.Path, overwrite: bool
) -> list[str]:
  beside = target.with_suffix('.json')
  output.check(beside, overwrite)
  target.parent.mkdir(parents=True, exist_ok=True)
  write_prompt(target, prompt.array, _facts(prompt))
  return [f'wrote {target}: {_text(prompt)}', f'wrote {beside}']


def _export_safetensors(prompt: Prompt, target: epath.Path) -> list[str]:
  array = prompt.array
  rows = Leaf(array.shape, array.dtype, array.__getitem__)
  facts = json.dumps(_facts(prompt))
  with output.new_file(target) as temporary:
    safetensors_files.write_file(temporary, {peft.ROWS: rows}, {FACTS: facts})
  return [f'wrote {target}: {_text(prompt)}']


def _export_peft(
  prompt: Prompt,
  target: epath.Path,
  source: Source | None,
  base: str | None,
  name: str | None,
) -> list[str]:
  lines = []
  model: dict[str, Any] = {}
  if source is not None:
    model = sizes(source.shapes) | identity.facts(source)
    known = 'base' in prompt.facts
    fingerprint = identity.fingerprint(source) if known else ''
    lines.append(check_base(prompt.path, prompt.facts, source, fingerprint))
  if name is None and source is not None and source.kind == 'huggingface':
    name = os.path.abspath(source.path)
    if str(base).startswith(SCHEME):
      name = str(base).removeprefix(SCHEME).partition('@')[0]
  name = name or prompt.facts.get('base_model')
  if name is None:
    lines.append(
      'no Hugging Face model is named, so load it as PeftModel.from_pretrained('
      'model, path); name one with --base_name=org/name'
    )
  with output.new_directory(target) as temporary:
    peft.write_peft(temporary, prompt.array, _facts(prompt), model, name)
    if source is not None and base is not None and 'vocab_size' in model:
      pad = source.ids.pad if source.ids else 0
      lines += write_vocabulary(temporary, base, model['vocab_size'], pad)
  return [*lines, f'wrote {target}: {_text(prompt)}']


def _export_t5x(
  prompt: Prompt, target: epath.Path, source: Source, step: int | None
) -> list[str]:
  from ptune.convert.t5x import write_t5x

  leaves, config = identity.base_leaves(source), identity.config(source)
  identity.check_whole(source, config)
  identity.check_t5x(source, config)
  checksums = identity.Checksums()
  read = {name: checksums.reading(name, x) for name, x in leaves.items()}
  array = prompt.array
  read[PATH] = Leaf(array.shape, array.dtype, array.__getitem__)
  if step is None:
    step = step_after(prompt.facts, source)
  with output.new_directory(target) as temporary:
    write_t5x(temporary, read, step, trained=(PATH,))
    base = check_base(prompt.path, prompt.facts, source, checksums.digest())
  return [
    base,
    f'wrote {target}: step {step}, {_text(prompt)} at {PATH}',
  ]


def check_base(
  path: epath.PathLike,
  facts: Mapping[str, Any],
  source: Source,
  fingerprint: str,
) -> str:
  """Compares the fingerprint of a base with the one that a prompt recorded.

  Args:
    path: The trained file, for messages.
    facts: The facts about it.
    source: The base.
    fingerprint: The fingerprint of the base.

  Returns:
    A line that says that they are equal, or that none is recorded.

  Raises:
    ValueError: They differ.
  """
  if 'base' not in facts:
    return (
      f'{path} does not record its base model; only its width was compared with'
      ' the base'
    )
  if fingerprint != facts['base']:
    raise UserError(
      f'{path} was trained on a model of fingerprint {facts["base"]}; the'
      f' {source.where} has {fingerprint}. Nothing was written. Give the model'
      ' that it was trained on as --base'
    )
  return f'base {fingerprint}: the model that it was trained on'


def check_width(prompt: Prompt, source: Source) -> None:
  width = sizes(source.shapes).get('emb_dim')
  if width != prompt.array.shape[1]:
    raise UserError(
      f'{prompt.path} is {list(prompt.array.shape)} [prompt, embed], but embed'
      f' is {width} in the {source.describe()}. Give the model that it was'
      ' trained on as --base'
    )


def step_after(facts: Mapping[str, Any], source: Source) -> int:
  """Returns T5X's step after a training, which includes the base's steps."""
  for key, before in (('t5x_step', 0), ('step', source.step or 0)):
    steps = facts.get(key)
    if isinstance(steps, int) and 0 <= steps < 2**31 - before:
      return before + steps
  return source.step or 0


def recorded_base(path: epath.PathLike) -> str | None:
  """Returns the base that a run recorded, for a file of its prompts/."""
  run = epath.Path(path).parent.parent / 'run.json'
  if not run.is_file():
    return None
  base = read_json(run).get('initial_checkpoint_path')
  return base if isinstance(base, str) else None
