"""Reads and writes PEFT's prompt adapters, without PEFT.

    adapter_config.json         the kind, the number of rows, the base model
    adapter_model.safetensors   the rows, under the name `prompt_embeddings`
    ptune.json                  ptune's facts about the prompt; PEFT ignores it

PEFT puts the rows before the encoder's input embeddings, as ptune does: the
same array means the same in both.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ptune.convert import safetensors_files
from ptune.convert.source import Leaf
from ptune.convert.storage import read_json
from ptune.errors import UserError

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
FACTS = 'ptune.json'
ROWS = 'prompt_embeddings'

# The tensors of a file, by peft_type. A P-tuning file holds its MLP's output.
TENSORS = {
  'PROMPT_TUNING': {ROWS},
  'P_TUNING': {ROWS},
  'MULTITASK_PROMPT_TUNING': {ROWS, 'prefix_task_cols', 'prefix_task_rows'},
}


def read_peft(
  path: epath.Path, task: int | None = None
) -> tuple[np.ndarray, dict[str, Any], list[str]]:
  """Reads the prompt of a PEFT adapter.

  Args:
    path: The adapter's directory.
    task: The task whose prompt to read, for a multi-task adapter.

  Returns:
    [prompt, embed], the facts about it, and notes for the user.

  Raises:
    ValueError: The files are damaged, contradict each other, or have no prompt.
  """
  config = read_json(path / CONFIG)
  kind = str(config.get('peft_type'))
  if kind not in TENSORS:
    raise UserError(
      f'{path} is a PEFT adapter of type {kind}, not a prompt before the '
      f'encoder; the types of prompts are {", ".join(TENSORS)}'
    )
  if config.get('task_type') not in (None, 'SEQ_2_SEQ_LM'):
    raise UserError(
      f'{path / CONFIG}: task_type {config["task_type"]!r}; a prompt for a T5 '
      "has 'SEQ_2_SEQ_LM'"
    )
  tensors = _tensors(path, kind)
  rows, notes = _encoder_rows(path, config, tensors[ROWS].read())
  if kind == 'MULTITASK_PROMPT_TUNING':
    rows = _of_task(path, rows, tensors, task)
  elif task is not None:
    raise UserError(f'{path} is of type {kind}: it has no tasks to choose from')
  facts = read_json(path / FACTS) if (path / FACTS).exists() else {}
  base = config.get('base_model_name_or_path')
  if base and 'base_model' not in facts:
    facts['base_model'] = str(base)
  if kind != 'PROMPT_TUNING':
    facts['peft_type'] = kind
  return rows, facts, notes


def _tensors(path: epath.Path, kind: str) -> dict[str, Leaf]:
  if not (path / WEIGHTS).exists():
    found = sorted(child.name for child in path.iterdir())
    message = f'{path} has no {WEIGHTS}. Found: {", ".join(found)}.'
    if 'adapter_model.bin' in found:
      message += (
        ' ptune does not read adapter_model.bin, because it never loads a '
        'pickle; load and save the adapter with PEFT, which writes safetensors.'
      )
    raise UserError(message)
  tensors, _ = safetensors_files.open_file(path / WEIGHTS)
  if set(tensors) != TENSORS[kind]:
    raise UserError(
      f'{path / WEIGHTS} holds {sorted(tensors)}; expected '
      f'{sorted(TENSORS[kind])} for {kind}'
    )
  return tensors


def _encoder_rows(
  path: epath.Path, config: Mapping[str, Any], rows: np.ndarray
) -> tuple[np.ndarray, list[str]]:
  """Returns the rows that PEFT puts before the encoder's input.

  By default PEFT makes as many again for the decoder and saves them. Its
  `generate` never reads those, and its `forward` reads them only for multi-task
  adapters: [2 prompt, embed] -> [prompt, embed].
  """
  length, width = config.get('num_virtual_tokens'), config.get('token_dim')
  if rows.ndim != 2 or rows.shape[1] != (width or rows.shape[1]):
    raise UserError(
      f'{path / WEIGHTS}: {ROWS} is {list(rows.shape)}; expected [prompt, '
      f'{width or "embed"}] by {CONFIG}'
    )
  if not isinstance(length, int) or rows.shape[0] not in (length, 2 * length):
    raise UserError(
      f'{path / WEIGHTS}: {ROWS} has {rows.shape[0]} rows, but {CONFIG} says '
      f'num_virtual_tokens {length}; the files do not belong together'
    )
  if rows.shape[0] == length:
    return rows, []
  return rows[:length], [
    f'{path} has {rows.shape[0]} rows for {length} virtual tokens; PEFT '
    f'generates with the first {length}, so the others were left out'
  ]


def _of_task(
  path: epath.Path,
  rows: np.ndarray,
  tensors: Mapping[str, Leaf],
  task: int | None,
) -> np.ndarray:
  """Multi-task prompt tuning (arXiv 2303.02861): P * (columns @ rows)."""
  columns = tensors['prefix_task_cols']  # [task, prompt, rank]
  factors = tensors['prefix_task_rows']  # [task, rank, embed]
  length, width = rows.shape
  fits = (
    len(columns.shape) == len(factors.shape) == 3
    and columns.shape[0] == factors.shape[0]
    and columns.shape[1] in (length, 2 * length)
    and columns.shape[2] == factors.shape[1]
    and factors.shape[2] == width
  )
  if not fits:
    raise UserError(
      f'{path / WEIGHTS}: prefix_task_cols {list(columns.shape)} and '
      f'prefix_task_rows {list(factors.shape)} do not fit a prompt of '
      f'{list(rows.shape)}'
    )
  tasks = columns.shape[0]
  if task is None or not 0 <= task < tasks:
    raise UserError(
      f'{path} holds the prompts of {tasks} tasks; got --task={task}, expected '
      f'one of 0 ... {tasks - 1}'
    )
  product = columns.read()[task, :length].astype(np.float32) @ factors.read()[
    task
  ].astype(np.float32)
  return rows.astype(np.float32) * product


def write_peft(
  directory: epath.Path,
  prompt: np.ndarray,
  facts: Mapping[str, Any],
  sizes: Mapping[str, Any],
  base_name: str | None = None,
) -> None:
  """Writes an adapter that `PeftModel.from_pretrained` loads.

  Args:
    directory: An empty directory.
    prompt: [prompt, embed] float32.
    facts: The facts about it.
    sizes: Sizes of the base model, from `identity.facts`; may be empty.
    base_name: The base model's name for PEFT.
  """
  length, width = prompt.shape
  config = {
    'auto_mapping': None,
    'base_model_name_or_path': base_name,
    'inference_mode': True,
    'modules_to_save': None,
    'num_attention_heads': sizes.get(
      'num_heads', sizes.get('encoder.num_heads')
    ),
    'num_layers': sizes.get('num_encoder_layers'),
    # 1, not PEFT's 2: see `_encoder_rows`.
    'num_transformer_submodules': 1,
    'num_virtual_tokens': length,
    'peft_type': 'PROMPT_TUNING',
    'prompt_tuning_init': 'RANDOM',
    'prompt_tuning_init_text': None,
    'revision': None,
    'task_type': 'SEQ_2_SEQ_LM',
    'token_dim': width,
    'tokenizer_kwargs': None,
    'tokenizer_name_or_path': None,
  }
  (directory / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
  (directory / FACTS).write_text(json.dumps(facts, indent=2) + '\n')
  leaf = Leaf(prompt.shape, prompt.dtype, prompt.__getitem__)
  safetensors_files.write_file(directory / WEIGHTS, {ROWS: leaf}, {})
