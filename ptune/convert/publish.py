"""`ptune push`: a prompt on the Hugging Face Hub, with a model card.

The repository has files that other programs open: a PEFT adapter, the prompt as
`prompt.npy`, the run's `config.gin`, and README.md. README.md is the model
card, which says how to load and use the prompt. `hf://user/name` reads it back.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from ptune.config import gin_source
from ptune.convert import export as export_lib
from ptune.convert.hub import SCHEME, library
from ptune.convert.prompts import Prompt, read_prompt
from ptune.errors import UserError


def push(
  path: epath.PathLike,
  name: str,
  *,
  base: str | None = None,
  base_name: str | None = None,
  private: bool = False,
  task: int | None = None,
) -> list[str]:
  """Uploads a prompt, and creates the repository if necessary.

  Args:
    path: A run, or any prompt that `read_prompt` reads.
    name: The repository, 'user/name'.
    base: The base model, if the prompt does not record it.
    base_name: The base's name on the Hub, such as 'google/flan-t5-base'.
    private: Whether a new repository is private.
    task: The task whose prompt to upload, for a multi-task run.

  Returns:
    Lines of text that report the result; the last one is the address.

  Raises:
    UserError: huggingface_hub is not installed, nobody is logged in, the name
      is taken or wrong, or PEFT cannot hold the prompt.
  """
  if not isinstance(name, str) or not re.fullmatch(r'[\w.-]+/[\w.-]+', name):
    raise UserError(
      f'the repository is {name!r}; expected user/name, such as me/sst2'
    )
  hub = library(f'pushing {name}')
  prompt = read_prompt(path, task)
  with tempfile.TemporaryDirectory() as folder:
    place = epath.Path(folder) / 'repository'
    lines = write(prompt, place, name, base=base, base_name=base_name)
    api = hub.HfApi()
    try:
      api.create_repo(name, private=private, exist_ok=True)
      api.upload_folder(
        repo_id=name,
        folder_path=os.fspath(place),
        commit_message=f'{prompt.array.shape[0]} tokens, by ptune',
      )
    except Exception as error:  # From HTTP, its login, or its checks.
      raise UserError(
        f'{name} cannot be uploaded: {type(error).__name__}: {error}\nLog in'
        ' with `hf auth login` and a token that may write, and give a name as'
        ' user/name'
      ) from error
  return [*lines, f'{SCHEME}{name}']


def write(
  prompt: Prompt,
  folder: epath.Path,
  name: str,
  *,
  base: str | None = None,
  base_name: str | None = None,
) -> list[str]:
  """Writes the repository's files into a new folder; see `push`."""
  lines = export_lib.export(
    prompt, 'peft', folder, base=base, base_name=base_name
  )
  export_lib.export(prompt, 'npy', folder / 'prompt')
  for file in (folder / 'ptune.json', folder / 'prompt.json'):
    facts = json.loads(file.read_text())
    del facts['read_from']  # A path on this machine.
    file.write_text(json.dumps(facts, indent=2) + '\n')
  adapter = folder / 'adapter_config.json'
  config = json.loads(adapter.read_text())
  named = config['base_model_name_or_path']
  if named and os.path.isabs(named):  # A path of this machine helps nobody.
    recorded = base or export_lib.recorded_base(prompt.path) or ''
    named = recorded if '://' in recorded else os.path.basename(named)
    config['base_model_name_or_path'] = named
    adapter.write_text(json.dumps(config, indent=2) + '\n')
  run, settings = epath.Path(prompt.path).parent.parent / 'config.gin', None
  if run.is_file():
    (folder / 'config.gin').write_text(run.read_text())
    settings = gin_source.parse(run.read_text()).macros
  (folder / 'README.md').write_text(card(prompt, name, named, settings))
  return lines


def card(
  prompt: Prompt,
  name: str,
  base_name: str | None,
  settings: Mapping[str, Any] | None,
) -> str:
  """Returns the model card, in Markdown after the Hub's metadata.

  Args:
    prompt: The prompt, and the facts about it.
    name: The repository.
    base_name: The base model's name: on the Hub, ptune://..., or a directory's.
    settings: The macros in the run's config.gin; None if there is no run.
  """
  facts, (length, width) = prompt.facts, prompt.array.shape
  of_hub = base_name and '://' not in base_name and '/' in base_name
  hub = library('a model card')
  metadata = hub.ModelCardData(
    base_model=base_name if of_hub else None,
    library_name='peft',
    pipeline_tag='text2text-generation',
    tags=['ptune', 'prompt-tuning', 'soft-prompt'],
    model_name=name.rpartition('/')[2],
    eval_results=_results(hub, facts.get('scores') or {}) or None,
  )
  known = {
    'base model': f'`{base_name}`' if base_name else None,
    'fingerprint of the base': facts.get('base') and f'`{facts["base"]}`',
    'task': facts.get('task') and f'`{facts["task"]}`',
    **_data(settings or {}),
    'method': facts.get('method'),
    'steps': facts.get('step'),
    'batch size': facts.get('batch_size'),
    'seed': facts.get('seed'),
    'prompt': f'{length} tokens of {width} numbers, float32',
  }
  lines = [
    '---',
    metadata.to_yaml(),
    '---',
    '',
    f'# {name.rpartition("/")[2]}',
    '',
    f'A soft prompt of {length} tokens'
    + (f' for `{base_name}`' if base_name else '')
    + ', trained with ptune. The base model is frozen; the prompt comes before'
    ' its embedded input.',
    '',
    '| | |',
    '|---|---|',
    *(f'| {k} | {v} |' for k, v in known.items() if v is not None),
    '',
  ]
  if facts.get('scores'):
    lines += ['## Scores', '', '| task | metric | value |', '|---|---|---:|']
    for task, scores in facts['scores'].items():
      lines += [f'| {task} | {k} | {v:.4g} |' for k, v in scores.items()]
    lines.append('')
  ours, theirs = repr(SCHEME + name), repr(base_name)
  if not of_hub:
    theirs = "'path/to/the/base'"
    if not base_name or '://' not in base_name:
      ours += f', base={theirs}'
  lines += [
    '## Use it with ptune',
    '',
    '```python',
    'import ptune',
    '',
    f'tuned = ptune.load({ours})',
    f'print(tuned.predict([{_example(settings or {})!r}]))',
    '```',
    '',
    '## Use it with PEFT',
    '',
    '```python',
    'from peft import PeftModel',
    'from transformers import AutoModelForSeq2SeqLM, AutoTokenizer',
    '',
    f'base = AutoModelForSeq2SeqLM.from_pretrained({theirs})',
    f'tokenizer = AutoTokenizer.from_pretrained({theirs})',
    f'model = PeftModel.from_pretrained(base, {name!r})',
    '```',
    '',
    'With NumPy: `numpy.load("prompt.npy")`.',
    '',
  ]
  if settings is not None:
    lines += [
      '## Train it again',
      '',
      '`config.gin` has every setting of the run:',
      '',
      '```',
      'ptune train --gin_file=config.gin --gin.MODEL_DIR="\'runs/again\'"',
      '```',
      '',
    ]
  return '\n'.join(lines)


def _data(settings: Mapping[str, Any]) -> dict[str, str]:
  """Returns what the macros of a run say about its rows, for the table."""
  names = ('INPUTS', 'TARGETS', 'LABEL_NAMES')
  found = {
    name.lower().replace('_', ' '): f'`{settings[name]}`'
    for name in names
    if settings.get(name)
  }
  files = settings.get('TASK_FILES')
  if isinstance(files, Mapping):
    found['data'] = ', '.join(
      f'{split}: `{os.path.basename(str(file))}`'
      for split, file in files.items()
    )
  return found


def _example(settings: Mapping[str, Any]) -> str:
  """Returns an input for the card's code."""
  template = settings.get('INPUTS')
  if isinstance(template, str) and template != '{inputs}':
    return template
  return 'an input, in the form of the task'


def _results(hub: Any, scores: Mapping[str, Mapping[str, float]]):
  """Returns the Hub's records of scores."""
  return [
    hub.EvalResult(
      task_type='text2text-generation',
      dataset_type=task,
      dataset_name=task,
      metric_type=metric,
      metric_value=float(value),
    )
    for task, of_task in scores.items()
    for metric, value in of_task.items()
  ]
