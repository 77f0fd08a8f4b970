"""From a base to what is trained on it: the program `ptune train`."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from ptune.api import rows as rows_lib
from ptune.api.base import Base, as_base
from ptune.api.tuned import Tuned
from ptune.config import flags, gin_files
from ptune.convert import peft
from ptune.convert.hub import SCHEME, locate
from ptune.convert.storage import read_json
from ptune.errors import UserError, nearest
from ptune.tasks.texts import TextTask
from ptune.training import run_file

# A prompt's own files; another file is none.
SUFFIXES = ('.npy', '.safetensors')


def load(
  path: str | os.PathLike[str],
  base: Base | str | None = None,
  *,
  vocabulary: str | os.PathLike[str] | None = None,
  dtype: str = 'float32',
) -> Base | Tuned:
  """Opens a base model, a run, or a prompt with its base.

  Args:
    path: 'ptune://tiny', 'hf://org/name', a directory of Hugging Face or a T5X
      checkpoint: a base. The MODEL_DIR of a run, a .npy file or a PEFT adapter
      (also 'hf://user/prompt'): what was trained.
    base: The base of what was trained. A run and most adapters name it.
    vocabulary: A SentencePiece file, if there is none beside the base.
    dtype: What a base computes in, 'float32' or 'bfloat16'.

  Returns:
    A `Base`, or a `Tuned` for what was trained.

  Raises:
    FileNotFoundError: Nothing is at `path`.
    UserError: What is there is neither, or its base is not known.

  Example:
    >>> base = ptune.load('ptune://tiny')
    >>> base.config.emb_dim
    96
  """

  def as_given(base: Base | str) -> Base:
    if isinstance(base, Base):
      return base
    return Base(base, vocabulary, dtype)

  place = locate(path)
  if (place / run_file.FILE).is_file():
    record = json.loads((place / run_file.FILE).read_text())
    recorded = record['initial_checkpoint_path']
    if recorded is None and base is None:
      raise UserError(
        f'{path} trained a whole model, which starts from no base; use ptune'
        ' eval and infer with its MODEL_DIR'
      )
    return Tuned(as_given(base or recorded), directory=place)
  adapter = (place / peft.CONFIG).is_file()
  if adapter and base is None:
    named = read_json(place / peft.CONFIG).get('base_model_name_or_path')
    if named:
      base = named if pathlib.Path(named).exists() else f'{SCHEME}{named}'
  if adapter or place.suffix in SUFFIXES:
    if base is None:
      raise UserError(
        f'{path} is a prompt, and does not say what its base is; give it, as in'
        f" ptune.load({str(path)!r}, base='ptune://tiny')"
      )
    return Tuned(as_given(base), prompt_file=path)
  if base is not None:
    raise UserError(
      f'{path} is no run and no prompt, so base={str(base)!r} has no meaning'
    )
  return Base(path, vocabulary, dtype)


def tune(
  base: Base | str,
  train: Any,
  *,
  validation: Any = None,
  inputs: str | None = None,
  targets: str | None = None,
  labels: list[str] | None = None,
  method: str = 'prompt',
  prompt_length: int | None = None,
  steps: int | None = None,
  model_dir: str | os.PathLike[str] | None = None,
  seed: int | None = None,
  bindings: Sequence[str] = (),
  **settings: Any,
) -> Tuned:
  """Trains on rows, as `ptune train --base=... --train=...` does.

  Stopped by Ctrl-C, it returns what it has. With a model_dir, the same call
  then goes on from there, and ends with the bits of an undisturbed run.

  Args:
    base: The frozen model, of `ptune.load`, or its path.
    train: Pairs of input and target, dicts by column, a pandas DataFrame, a
      Hugging Face Dataset, the path of a .tsv, .csv or .jsonl file, or the name
      of a SeqIO task.
    validation: Rows of the same kind, which choose the best step. If not given,
      the last step is taken; a SeqIO task has its own.
    inputs: The template of the inputs, such as 'review: {text}'; the column
      inputs if not given, which is the first of a pair.
    targets: The template of the targets; the column targets if not given.
    labels: All targets of a classification, which is then scored by accuracy.
    method: What is trained: 'prompt', or a file of gin/methods or gin/prompts,
      such as 'lora' or 'from_string'.
    prompt_length: Rows of the prompt.
    steps: Training steps.
    model_dir: Where the run is written; a temporary directory if not given.
    seed: Of the initialisation, the order of the rows, and dropout.
    bindings: What is no macro, as gin writes it, such as
      "optim.schedule.decay = 'linear'".
    **settings: Other macros by their names in lower case, such as batch_size,
      learning_rate, eval_period or dtype; `ptune train --help` lists them.

  Returns:
    The model with what was trained: of the best step, if there is a validation.

  Raises:
    UserError: If an argument or a row cannot be used, before anything is
      written.

  Example:
    >>> rows = [('so insightful', 'positive'), ('so dull', 'negative')]
    >>> tuned = ptune.tune('ptune://tiny', rows, prompt_length=5, steps=2)
    >>> tuned.prompt.shape
    (5, 96)
  """
  base = as_base(base)
  known = flags.names()
  if unknown := [name for name in settings if name not in known]:
    raise UserError(
      f'tune() has no setting {unknown[0]!r}'
      + nearest(unknown[0], [*known, *flags.NAMED], most=0)
    )
  rows = rows_lib.taken('train', train)
  if validation is not None:
    rows |= rows_lib.taken('validation', validation)
  given = {
    'base': base.path,
    'method': method,
    'inputs': inputs,
    'targets': targets,
    'labels': labels,
    'prompt_length': prompt_length,
    'steps': steps,
    'seed': seed,
    'vocabulary': base.vocabulary_path,
  }
  given = {name: value for name, value in given.items() if value is not None}
  if base.config.dtype != 'float32':
    given['dtype'] = base.config.dtype
  given = rows_lib.prepared({**given, **settings}, rows)
  if model_dir is not None:
    _train({**given, 'model_dir': os.fspath(model_dir)}, rows, bindings)
    return Tuned(base, model_dir)
  directory = tempfile.mkdtemp(prefix='ptune-')
  try:
    _train({**given, 'model_dir': directory}, rows, bindings)
  except BaseException:
    shutil.rmtree(directory, ignore_errors=True)
    raise
  return Tuned(base, directory, temporary=True)


def _train(
  given: dict[str, Any], rows: dict[str, Any], bindings: Sequence[str]
) -> None:
  """Runs the program, with gin's own settings put aside meanwhile."""
  import gin
  from ptune import train

  with gin_files.isolated():
    files, ours = flags.expand('train', given)
    gin_files.parse(files, [*ours, *bindings], program=train.train)
    rows_lib.bind(rows)
    # Every row is looked at before anything is written.
    task = gin.get_configurable('MIXTURE_OR_TASK_NAME/macro')()
    if isinstance(task, TextTask):
      for split in task.splits:
        task.texts(split)
    gin.get_configurable(train.train)()
