"""`load` opens a model, `tune` trains on it by the program `ptune train`."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from ptune.api import rows as rows_lib
from ptune.api.base import Base, as_base
from ptune.api.tuned import Tuned
from ptune.config import flags, gin_files, macros, words
from ptune.convert import peft
from ptune.convert.export import recorded_base
from ptune.convert.hub import SCHEME, locate
from ptune.convert.storage import read_json
from ptune.errors import UserError
from ptune.host import paths
from ptune.tasks.texts import TextTask
from ptune.training import run_file

# The files that hold a prompt.
SUFFIXES = ('.npy', '.safetensors')


@words.in_python()
def load(
  path: str | os.PathLike[str],
  base: Base | str | None = None,
  *,
  vocabulary: str | os.PathLike[str] | None = None,
  dtype: str = 'float32',
) -> Base | Tuned:
  """Opens a base model, a run, or a prompt with its base.

  Args:
    path: A base model: 'ptune://tiny', 'hf://org/name', a Hugging Face
      directory or a T5X checkpoint. Or a trained one: the MODEL_DIR of a run, a
      .npy file or a PEFT adapter (also 'hf://user/prompt').
    base: The base of a trained model. Runs and most adapters name theirs.
    vocabulary: A SentencePiece file, if the base comes without one.
    dtype: The type that the base computes in, 'float32' or 'bfloat16'.

  Returns:
    A `Base`, or a `Tuned` for a trained model.

  Raises:
    FileNotFoundError: If nothing is at `path`.
    UserError: If `path` is something else, its base is unknown, or a prompt
      does not fit its base.

  Example:
    >>> base = ptune.load('ptune://tiny')
    >>> base.config.emb_dim
    96
  """
  if not isinstance(path, str | os.PathLike):
    raise UserError(
      f'path is {type(path).__name__} {str(path)[:60]!r}; expected that of a'
      " base model, a run or a prompt, such as 'ptune://tiny'"
    )
  place = locate(path)
  if record := run_file.read(place):
    base = record.get('initial_checkpoint_path') if base is None else base
    if base is None:
      raise UserError(
        f'{path} trained a whole model, which starts from no base; use ptune'
        ' eval and infer with its MODEL_DIR'
      )
    try:
      return Tuned(as_base(base, vocabulary, dtype), directory=place)
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f'{error}\nIf the base of this run has moved, give its path: '
        f'ptune.load({str(path)!r}, base=...)'
      ) from error
  adapter = (place / peft.CONFIG).is_file()
  if adapter and base is None:
    named = read_json(place / peft.CONFIG).get('base_model_name_or_path')
    if named:
      known = '://' in named or pathlib.Path(named).exists()
      base = named if known else f'{SCHEME}{named}'
  if adapter or place.suffix in SUFFIXES:
    base = recorded_base(place) if base is None else base
    if base is None:
      raise UserError(
        f'{path} is a prompt that does not name its base; give the base, as in'
        f" ptune.load({str(path)!r}, base='ptune://tiny')"
      )
    return Tuned(as_base(base, vocabulary, dtype), prompt_file=path)
  if base is not None:
    raise UserError(
      f'{path} is neither a run nor a prompt, so it takes no base; leave base'
      ' out, or give the path of a run or a prompt'
    )
  return Base(path, vocabulary, dtype)


@words.in_python()
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

  If you stop it by Ctrl-C, it returns what it has. With a model_dir, the same
  call then resumes, and ends with the same bits as an undisturbed run.

  Args:
    base: The frozen model from `ptune.load`, or its path.
    train: Pairs of input and target, dicts by column, a pandas DataFrame, a
      Hugging Face Dataset, the path of a .tsv, .csv or .jsonl file, or the name
      of a SeqIO task.
    validation: Rows of the same kind, by which the best step is chosen. Without
      them, you get the last step. A SeqIO task has its own validation split.
    inputs: The template of the inputs, such as 'review: {text}'. The default is
      the column inputs, which is the first item of a pair.
    targets: The template of the targets. The default is the column targets.
    labels: All targets of a classification, which is then scored by accuracy.
    method: 'prompt', or the name of a file in gin/methods or gin/prompts, such
      as 'lora' or 'from_string'.
    prompt_length: Rows of the prompt.
    steps: Training steps.
    model_dir: The directory of the run, which also keeps the rows if they are
      not in files. The default is a temporary one.
    seed: Seeds the initialisation, the order of the rows, and dropout.
    bindings: Gin bindings for settings that are not macros, such as
      ["optim.schedule.decay = 'linear'"].
    **settings: Other macros by their names in lower case, such as batch_size,
      learning_rate, eval_period or dtype; and `loss`, the name of a file in
      gin/losses, such as 'private'. `ptune train --help` lists them.

  Returns:
    The trained model, at its best step if there are validation rows.

  Raises:
    UserError: If an argument or a row is wrong. Nothing has been written then.

  Example:
    >>> rows = [('so insightful', 'positive'), ('so dull', 'negative')]
    >>> tuned = ptune.tune('ptune://tiny', rows, prompt_length=5, steps=2)
    >>> tuned.prompt.shape
    (5, 96)
  """
  base = as_base(base)
  known = (*flags.names(), 'loss')
  if unknown := [name for name in settings if name not in known]:
    raise UserError(
      f'tune() has no setting {unknown[0]!r}' + flags.suggested(unknown[0])
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
  if model_dir is not None:
    given['model_dir'] = model_dir
  if isinstance(bindings, str):
    bindings = [bindings]
  if not isinstance(bindings, tuple | list) or bindings:
    bindings = rows_lib.texts('bindings', bindings)
  _check({**given, **settings})
  if base.config.dtype != 'float32':
    given['dtype'] = base.config.dtype
  # Without a vocabulary, tasks have that of the base.
  given |= {k: v for k, v in settings.items() if (k, v) != ('vocabulary', None)}
  if model_dir is not None:
    _train(given, rows, os.fspath(model_dir), bindings)
    return Tuned(base, model_dir)
  directory = tempfile.mkdtemp(prefix='ptune-')
  try:
    # Nobody looks into this directory, and Matplotlib takes a second to import.
    no_curves = 'settings.Saving.curves = False'
    _train(given, rows, directory, [no_curves, *bindings])
  except BaseException:
    shutil.rmtree(directory, ignore_errors=True)
    raise
  return Tuned(base, directory, temporary=True)


def _check(given: Mapping[str, Any]) -> None:
  """Checks settings as the command line does, by the names of the arguments.

  Raises:
    UserError: If some values are wrong; it lists them all.
  """
  macro_of, wrong = flags.names(), []
  for name, value in given.items():
    if name in flags.NAMED:
      what, example = flags.NAMED[name]
      good = isinstance(value, str) and value.strip()
      expected, example = '' if good else 'a text', repr(example)
    else:
      what, example, kind = macros.MACROS[macro_of[name]]
      # Paths may be objects.
      plain = os.fspath(value) if isinstance(value, os.PathLike) else value
      expected = kind(plain)
    if expected:
      wrong.append(
        f'{name} ({what}) is {value!r:.200}; expected {expected}, such as'
        f' {example}'
      )
  if wrong:
    raise UserError('\n'.join(wrong))


def _train(
  given: dict[str, Any],
  rows: dict[str, Any],
  directory: str,
  bindings: Sequence[str],
) -> None:
  """Runs the program. Gin's global settings are restored afterwards."""
  import gin
  from ptune import train

  given = rows_lib.prepared(given, rows, directory) | {'model_dir': directory}
  with gin_files.isolated(), paths.nothing_left():
    files, ours = flags.expand('train', given)
    gin_files.parse(files, [*ours, *bindings], program=train.train)
    rows_lib.bind(rows)
    # Check every row before anything is written.
    task = gin.get_configurable('MIXTURE_OR_TASK_NAME/macro')()
    if isinstance(task, TextTask):
      for split in task.splits:
        task.texts(split)
      rows_lib.keep(rows, task, directory)
    gin.get_configurable(train.train)()
