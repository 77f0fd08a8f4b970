"""run.json: the facts of the run in a MODEL_DIR."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from ptune.config import gin_source
from ptune.errors import UserError
from ptune.host import paths
from ptune.host.files import absolute, write_atomically

FILE = 'run.json'
# The names of facts in messages, if their keys are not clear enough.
_FACTS = {
  'base': 'frozen weights, from INITIAL_CHECKPOINT_PATH (their fingerprint)',
  'rows': 'training texts, of TASK_FILES, INPUTS, TARGETS and LABEL_NAMES'
  ' (their fingerprint)',
  'initial_step': 'step of INITIAL_CHECKPOINT_PATH',
  'best_metric': 'BEST_METRIC',
  'metrics': 'METRICS',
  'rank': 'RANK',
  'eval_split': 'EVAL_SPLIT',
  'eval_examples': 'evaluated examples, of EVAL_STEPS and the batch size',
  'eval_rows': 'texts that are evaluated (their fingerprint)',
}
# Settings that a restart may change without a word: what they change is in
# sight, or their content is compared.
_FREE = {'MODEL_DIR', 'TASK_FILES'}


def run_directory(model_dir: os.PathLike[str] | str | None) -> epath.Path:
  """MODEL_DIR as an absolute path: Orbax takes no other.

  Raises:
    UserError: If it is empty, or cannot be written.
  """
  if not model_dir or not isinstance(model_dir, str | os.PathLike):
    raise UserError(
      f'MODEL_DIR is {model_dir!r}; it must be a directory, for example'
      ' --gin.MODEL_DIR="\'/runs/sst2\'"'
    )
  if os.fspath(model_dir).startswith(('hf://', 'ptune://')):
    raise UserError(
      f'MODEL_DIR is {os.fspath(model_dir)}, which cannot be written; choose a'
      ' local directory, or one in a bucket. ptune push uploads the result'
    )
  return absolute(model_dir)


def read(model_dir: os.PathLike[str]) -> dict[str, Any]:
  """The facts that `claim` wrote to a MODEL_DIR; {} if there are none."""
  path = epath.Path(model_dir) / FILE
  if not path.exists():
    return {}
  paths.check_file(path)
  try:
    return dict(json.loads(path.read_text()))
  except (ValueError, TypeError, RecursionError) as error:
    raise UserError(
      f'{path} is damaged ({error}), so ptune cannot tell which run'
      f' {path.parent} holds. Restore the file, or choose another MODEL_DIR'
    ) from error


def claim(
  model_dir: os.PathLike[str],
  run: Mapping[str, Any],
  notes: Mapping[str, Any],
) -> None:
  """Writes those facts of a run to its MODEL_DIR that are not there yet.

  Args:
    model_dir: The directory.
    run: The facts that a restart may not change; anything that JSON can hold.
    notes: Further facts, which a restart may change.
  """
  if jax.process_index() != 0:
    return
  present = read(model_dir)
  facts = {**run, **notes, **present}
  if facts.keys() != present.keys():
    path = epath.Path(model_dir) / FILE
    write_atomically(path, json.dumps(facts, indent=2) + '\n')


def compare(
  model_dir: os.PathLike[str] | str,
  present: Mapping[str, Any],
  run: Mapping[str, Any],
) -> None:
  """Checks that the run on disk, if there is one, has the given facts.

  Args:
    model_dir: The directory, for the message.
    present: The facts on disk, from `read`.
    run: The facts of this run.

  Raises:
    ValueError: If they differ; lists every difference.
  """
  differing = [
    f'  {_FACTS.get(key, key)}: {present[key]!r} there, {value!r} here'
    for key, value in run.items()
    if key in present and present[key] != value
  ]
  if differing:
    raise UserError(
      f'MODEL_DIR {os.fspath(model_dir)} holds a run that is not this one:\n'
      + '\n'.join(differing)
      + '\nNothing was changed. Use the settings of that run, or choose'
      ' another MODEL_DIR'
    )


def changed(before: str, now: str) -> list[str]:
  """The settings that differ between two configs of gin and may change.

  Args:
    before: The text of config.gin, from the last start.
    now: The text of this start. It need not be complete.

  Returns:
    Such as ['LEARNING_RATE 0.3 before, 0.1 now'].
  """
  old, new = gin_source.parse(before).sets, gin_source.parse(now).sets
  return [
    f'{name} {old[name]!r} before, {new[name]!r} now'
    for name in sorted(old.keys() & new.keys() - _FREE)
    if old[name] != new[name]
  ]


def from_where(checkpoint: str | None) -> dict[str, str | None]:
  """The base model's path as run.json records it: absolute."""
  if checkpoint is not None and '://' not in checkpoint:
    checkpoint = os.fspath(absolute(checkpoint))
  return {'initial_checkpoint_path': checkpoint}
