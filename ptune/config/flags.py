"""Short settings, on the command line and in Python: macros by their names.

    ptune train --base=ptune://tiny --train=train.csv --validation=dev.csv \\
      --inputs='{text}' --targets='{label}' --steps=300 --model_dir=runs/mine

does the same as a long command line with gin files and `--gin.NAME=VALUE`:
`--model_dir` is the macro MODEL_DIR, and so on. The few settings in `NAMED` are
not macros. `ptune eval RUN` takes all settings from the run's record.
"""

import argparse
import ast
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ptune.config import gin_source
from ptune.config.gin_files import own_directory, own_files
from ptune.config.macros import MACROS
from ptune.errors import UserError, nearest

# Shorter names of macros.
SHORT = {
  'labels': 'LABEL_NAMES',
  'seed': 'RANDOM_SEED',
  'steps': 'TRAIN_STEPS',
}
# What other programs call settings, for suggestions.
ELSEWHERE = {
  'batch': 'batch_size',
  'dev': 'validation',
  'epochs': 'steps',
  'eval_file': 'validation',
  'lr': 'learning_rate',
  'max_length': 'task_feature_lengths',
  'max_steps': 'steps',
  'model_name_or_path': 'base',
  'num_epochs': 'steps',
  'num_train_epochs': 'steps',
  'num_virtual_tokens': 'prompt_length',
  'output_dir': 'model_dir',
  'per_device_train_batch_size': 'batch_size',
  'train_file': 'train',
  'validation_file': 'validation',
}
SPLITS = ('train', 'validation', 'test')
# Settings that are not macros: help, and an example.
NAMED = {
  'base': ('the base model', 'hf://google/flan-t5-base'),
  'train': ('training rows, a file or the name of a task', 'train.csv'),
  'validation': ('rows that pick the best prompt, a file', 'dev.csv'),
  'test': ('rows of the test split, a file', 'test.csv'),
  'method': ('what to train: a file of methods/ or prompts/', 'lora'),
  'loss': ('what replaces the cross entropy: a file of losses/', 'private'),
  'model': ('sizes of the network: a file of models/', 't5_1_1_base'),
  'split': ('the split to run on', 'test'),
}
# Macros that a gin file sets to a reference.
CHOSEN = ('METHOD', 'MODEL', 'OPTIMIZER', 'STUDIES')
SUFFIXES = ('.tsv', '.csv', '.jsonl')
CONFIG, RUN_FILE = 'config.gin', 'run.json'
# Where a run keeps rows that it got from Python.
ROWS = 'rows/{split}.jsonl'
# Programs that train, and programs that run a trained model on a split: the
# macro of the split.
TRAINING = ('train', 'plan', 'doctor')
ASKING = {'ablate': 'EVAL_SPLIT', 'eval': 'EVAL_SPLIT', 'infer': 'INFER_SPLIT'}
# How to call the programs; those that are not listed take gin files alone.
USAGES = {
  'train': 'ptune train --base=BASE --train=FILE --inputs=TEMPLATE'
  ' --targets=TEMPLATE --model_dir=DIR [FLAGS]\n'
  '       ptune train --gin_file=FILE --gin_file=FILE ... [FLAGS]',
  'eval': 'ptune eval RUN [--split=SPLIT] [FLAGS]\n'
  '       ptune eval --gin_file=FILE --gin_file=FILE ... [FLAGS]',
  'study': 'ptune study NAME [FLAGS]',
  'plan': 'ptune plan --devices=N --gin_file=FILE ... [FLAGS]',
  'infer': 'ptune infer RUN FILE [FLAGS]\n'
  '       ptune infer --gin_file=FILE --gin_file=FILE ... [FLAGS]',
}
# Pairs of settings that are the same, or exclude each other.
CLASHES = (
  *SHORT.items(),
  *(('base', name) for name in ('initial_checkpoint_path', 'checkpoint_path')),
  *((split, 'task_files') for split in SPLITS),
  *((split, 'mixture_or_task_name') for split in SPLITS),
  ('split', 'infer_file'),
)
# Prefix of the attributes in which argparse keeps the flags of macros.
_DEST = 'macro_'
# The flags that `ptune PROGRAM --help` explains; few programs use the others.
GROUPS = {
  'most used': (
    *('base', 'train', 'validation', 'test', 'inputs', 'targets', 'labels'),
    *('method', 'prompt_length', 'steps', 'batch_size', 'learning_rate'),
    *('split', 'prompts', 'model_dir'),
  ),
  'data': (
    *('task_files', 'mixture_or_task_name', 'mixture_or_task_module'),
    *('task_feature_lengths', 'vocabulary', 'metrics', 'rank'),
    *('skip_bad_rows', 'bucket_multiple', 'pack', 'use_cached_tasks'),
  ),
  'model': (
    *('model', 'loss', 'initial_checkpoint_path', 'checkpoint_path'),
    *('prompt_file', 'default_prompt', 'dropout_rate', 'seed'),
  ),
  'evaluation': (
    *('eval_period', 'eval_split', 'eval_steps', 'best_metric'),
    *('early_stopping', 'eval_output_dir'),
  ),
  'predictions': (
    *('infer_file', 'infer_split', 'infer_mode', 'infer_output_dir'),
  ),
  'pruning': ('importance', 'keep_rows', 'keep_pieces', 'pieces'),
  'saving': (
    *('checkpoint_period', 'keep_checkpoints', 'tracker', 'profile_steps'),
  ),
  'speed and memory': (
    *('dtype', 'frozen_dtype', 'microbatches', 'model_parallel', 'fsdp'),
    *('remat', 'scan', 'fused_attention', 'fused_mlp'),
  ),
}


def names() -> dict[str, str]:
  """Returns {flag: macro} for the flags that are macros."""
  plain = {name.lower(): name for name in MACROS if name not in CHOSEN}
  return SHORT | plain


def explained(program: str) -> dict[str, dict[str, str]]:
  """Returns what `ptune PROGRAM --help` lists: {group: {flag: help}}."""
  trains, macros = program in TRAINING, names()
  files = ['methods/prompt.gin', 'tasks/from_files.gin']
  files += ['runs/train.gin' if trains else f'runs/{program}.gin']
  text = '\n'.join(_with_includes(file) for file in files)
  read = set(re.findall(r'%([A-Z_]+)', text))
  named = {*NAMED} - ({'split'} if trains else {'train', 'method', 'loss'})
  found: dict[str, dict[str, str]] = {}
  for title, flags in GROUPS.items():
    for flag in flags:
      if flag in named:
        what, example = NAMED[flag]
      elif macros.get(flag) in read:
        what, example, _ = MACROS[macros[flag]]
      else:
        continue
      example = re.sub(r"^'|'$", '', example)
      if example.startswith("['"):  # As short as a flag may be: no,yes.
        example = ','.join(ast.literal_eval(example))
      found.setdefault(title, {})[flag] = f'{what}, such as {example}'
  return found


def add_arguments(program: str, command: argparse.ArgumentParser) -> None:
  """Adds the flags of a program that gin configures."""
  command.usage = usage(program)
  command.epilog = '\n'.join(
    [
      'Each flag is the macro of the same name: --batch_size=8 is'
      ' --gin.BATCH_SIZE=8.',
      'Write a value as in Python; a string needs no quotes.',
      '',
      'gin files:',
      *(f'  {file}' for file in own_files()),
    ]
  )
  if program in ASKING:
    command.add_argument(
      'run',
      nargs='?',
      metavar='RUN',
      help='the MODEL_DIR of a run; its settings are used',
    )
  if program == 'infer':
    command.add_argument(
      'file',
      nargs='?',
      metavar='FILE',
      help='INFER_FILE: a text file with an input a line, or .tsv, .csv or'
      ' .jsonl with the columns of INPUTS; - reads standard input and prints'
      ' the answers',
    )
  if program == 'study':
    command.add_argument(
      'study',
      metavar='NAME',
      help='a gin file of studies/ without its ending, or your own gin file',
    )
  if program == 'plan':
    _add_plan_flags(command)
  if program != 'study':
    told: set[str] = set()
    for title, flags in explained(program).items():
      group = command.add_argument_group(title)
      for flag, text in flags.items():
        told.add(flag)
        group.add_argument(
          f'--{flag}',
          dest=_DEST + flag,
          metavar='VALUE',
          default=argparse.SUPPRESS,
          help=text,
        )
    for flag in sorted({*names(), *NAMED} - told):
      command.add_argument(
        f'--{flag}',
        dest=_DEST + flag,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
      )
  _add_gin_flags(command.add_argument_group('gin files and data'))
  _add_process_flags(command.add_argument_group('several processes'))


def _add_gin_flags(group) -> None:
  add = group.add_argument
  add(
    '--gin_file',
    action='append',
    default=[],
    help='a gin file; repeat it for several, in any order. Your files override'
    " ptune's, and flags override both",
  )
  add(
    '--gin_search_paths',
    default='',
    help='directories to search for gin files, separated by commas',
  )
  add(
    '--gin_bindings',
    action='append',
    default=[],
    help='one binding, like --gin.NAME=VALUE; may be repeated',
  )
  add('--tfds_data_dir', help='directory in which TFDS keeps data sets')
  add(
    '--seqio_additional_cache_dirs',
    default='',
    help='where seqio_cache_tasks wrote tasks, separated by commas; needs'
    ' --use_cached_tasks=True',
  )


def _add_process_flags(group) -> None:
  add = group.add_argument
  add('--coordinator_address', help='host:port of process 0')
  add('--process_count', type=int)
  add('--process_index', type=int)
  add(
    '--multiprocess',
    action='store_true',
    help='join the processes that TPU, SLURM or Kubernetes started',
  )


def _add_plan_flags(command: argparse.ArgumentParser) -> None:
  add = command.add_argument
  add('--devices', type=int, required=True, help='devices of the run')
  add(
    '--accelerator',
    help='v4, v5e, v5p, v6e, v7x, a100-40, a100-80, h100 or h200',
  )
  add(
    '--compiler',
    choices=('cpu', 'tpu'),
    help="which compiler estimates: tpu is the TPU's own, the default for TPUs"
    ' if libtpu is installed',
  )


def usage(program: str) -> str:
  """Returns how to call a program."""
  return USAGES.get(program, f'ptune {program} --gin_file=FILE ... [FLAGS]')


def suggested(name: str, dashes: str = '') -> str:
  """Returns '; did you mean ...?' for a setting that does not exist.

  Args:
    name: The name that was given.
    dashes: What settings begin with.
  """
  if name in ELSEWHERE:
    return f'; did you mean {dashes}{ELSEWHERE[name]}?'
  known = [dashes + flag for flag in (*names(), *NAMED)]
  return nearest(dashes + name, known, most=0)


def unknown_flags(program: str, unknown: Sequence[str]) -> str:
  """Returns unknown flags, each with the known flags most like it."""
  if program not in (*TRAINING, *ASKING):
    return ' '.join(unknown)
  near = (
    suggested(flag[2:].partition('=')[0], '--') if flag[:2] == '--' else ''
    for flag in unknown
  )
  return ' '.join(map(str.__add__, unknown, near))


def given_by(args: argparse.Namespace) -> dict[str, str]:
  """Returns the short settings of a command line, as texts."""
  return {
    name.removeprefix(_DEST): text
    for name, text in vars(args).items()
    if name.startswith(_DEST)
  }


def resolve(args: argparse.Namespace) -> None:
  """Turns the short settings of a command line into gin files and bindings.

  Raises:
    UserError: As `expand`, or if a value does not have its macro's type.
  """
  if args.program == 'study':
    own = args.study.endswith('.gin')
    args.gin_file.append(args.study if own else f'studies/{args.study}.gin')
    return
  given = {
    flag: text if flag in NAMED else value_of(flag, text)
    for flag, text in given_by(args).items()
  }
  if getattr(args, 'file', None) is not None:
    given['infer_file'] = args.file
  args.gin_file, bindings = expand(
    args.program, given, args.gin_file, getattr(args, 'run', None)
  )
  args.gin_bindings = bindings + args.gin_bindings


def _with_includes(file: str) -> str:
  """Returns the text of one of ptune's gin files, and of those it includes."""
  text = (own_directory() / file).read_text()
  included = re.findall(r"^include '(.*)'", text, re.MULTILINE)
  return '\n'.join([text, *map(_with_includes, included)])


def value_of(flag: str, text: str) -> Any:
  """Returns the value of a macro's flag: '5' -> 5, 'a,b' -> ['a', 'b'].

  Raises:
    UserError: If it does not have the macro's type.
  """
  example = MACROS[names()[flag]].example
  expected = ast.literal_eval(example)
  if text == 'None':
    return None
  if isinstance(expected, str):
    return text
  parts = [part.strip() for part in text.split(',')]
  of_texts = isinstance(expected, list) and isinstance(expected[0], str)
  if of_texts and not text.lstrip().startswith(('[', '(', '{', '"', "'")):
    return parts  # Also for 0,1 or True,False, which are names here.
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    if isinstance(expected, list):
      return parts
    raise UserError(
      f'--{flag} is {text!r}; expected a value such as {example}'
    ) from None


def is_file(rows: str) -> bool:
  """Returns whether rows are given as a file, not as a SeqIO task."""
  return rows.lower().removesuffix('.gz').endswith(SUFFIXES)


def expand(
  program: str,
  given: Mapping[str, Any],
  files: Sequence[str] = (),
  run: str | None = None,
) -> tuple[list[str], list[str]]:
  """Returns the gin files and bindings that are equal to short settings.

  Args:
    program: One of TRAINING or ASKING.
    given: Settings, by their names in `NAMED` and `names()`.
    files: Additional gin files.
    run: The MODEL_DIR of a trained run, which provides all other settings.

  Returns:
    Files and bindings. The MODEL_DIR of a run's config.gin is the directory
    that holds this file now.

  Raises:
    UserError: If the settings contradict each other, or there is no such run.
  """
  given, files, trains = dict(given), list(files), program in TRAINING
  bound: dict[str, Any] = {}
  if run is not None:
    _check_of_run(run, given)
    files.append(os.fspath(_config(run)))
  for config in map(pathlib.Path, files):
    if config.name == CONFIG:
      # A run that was moved: the paths that it noted may be another run's.
      if (config.parent / RUN_FILE).is_file():
        bound['MODEL_DIR'] = str(config.parent)
      if kept := kept_rows(config.parent):
        bound['TASK_FILES'] = kept
  if not given and run is None:
    return files, [f'{name} = {value!r}' for name, value in bound.items()]
  for one, other in CLASHES:
    if one in given and (other := other.lower()) in given:
      raise UserError(
        f'{one} and {other} exclude each other, and both are given; give one'
      )
  bound |= _base(given.pop('base', None), run, trains)
  rows = {split: given.pop(split) for split in SPLITS if split in given}
  if not _has(files, 'runs'):
    run_file = 'tune' if rows and trains else 'train' if trains else program
    files.append(f'runs/{run_file}.gin')
  if rows:
    bound |= _rows(rows, given)
    if 'TASK_FILES' in bound and run is None:
      files.append('tasks/from_files.gin')
    if not trains:
      given.setdefault('split', list(rows)[-1])
  files += _choices(given, files, default=trains and bool(rows))
  if 'split' in given:
    if trains:
      raise UserError(f'--split is only a flag of {", ".join(ASKING)}')
    bound[ASKING[program]] = given.pop('split')
  macros = names()
  bound |= {macros[name]: value for name, value in given.items()}
  return files, [f'{name} = {value!r}' for name, value in bound.items()]


def _has(files: Sequence[str], *kinds: str) -> bool:
  """Returns whether one of ptune's own files of some kinds is given."""
  return not {*files}.isdisjoint(own_files(kinds))


def kept_rows(run: str | os.PathLike[str]) -> dict[str, str]:
  """Returns the files in which a run keeps rows from Python, by split."""
  files = sorted(pathlib.Path(run).glob(ROWS.format(split='*')))
  return {file.stem: str(file.absolute()) for file in files}


def _config(run: str) -> pathlib.Path:
  """Returns the gin file with the settings of a run."""
  config = pathlib.Path(run, CONFIG)
  if not config.is_file():
    raise UserError(
      f'{run} is not a run of ptune train: it has no {CONFIG}. Give a'
      ' MODEL_DIR, or give the settings by --gin_file and --gin.NAME'
    )
  return config


def _base(base: str | None, run: str | None, trains: bool) -> dict[str, str]:
  """Returns the macros of the base model."""
  bound = {}
  if run is not None:
    # Absolute, so that a later command finds it from any working directory.
    bound['INITIAL_CHECKPOINT_PATH'] = _recorded_base(run)
  if base is not None and (trains or run is not None):
    bound['INITIAL_CHECKPOINT_PATH'] = base
  if base is not None and not trains:
    bound['CHECKPOINT_PATH'] = base
  return bound


def _recorded_base(run: str) -> str | None:
  """Returns the base model that a run started from."""
  file = pathlib.Path(run, RUN_FILE)
  try:
    return json.loads(file.read_text())['initial_checkpoint_path']
  except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
    raise UserError(
      f'{file} is missing or damaged ({type(error).__name__}), so ptune cannot'
      f' tell what the run {run} started from; restore the file'
    ) from error


def reordered(labels: Sequence[Any], names: Sequence[str]) -> bool:
  """Whether some labels are these names in another order."""
  same = sorted(map(str, labels)) == sorted(names)
  return same and list(labels) != list(names)


def _check_of_run(run: str, given: Mapping[str, Any]) -> None:
  """Refuses settings that a trained run has already."""
  own = [name for name in ('method', 'model', 'loss') if name in given]
  if own:
    raise UserError(
      f'the run {run} has its own {" and ".join(own)}; leave out'
      f' {", ".join(own)}'
    )
  labels = given.get('labels', given.get('label_names'))
  if not isinstance(labels, list | tuple):
    return
  trained = gin_source.read_file(_config(run)).macros.get('LABEL_NAMES')
  if isinstance(trained, list | tuple) and reordered(labels, trained):
    raise UserError(
      f'labels are {labels!r}, and the run {run} was trained with {trained!r}:'
      ' the numbers of labels would change their meaning. Use its order, or'
      ' leave labels out'
    )


def check_task(name: str, given: Mapping[str, Any], dashes: str = '') -> None:
  """Refuses templates for rows that have theirs.

  Args:
    name: The setting `train`, which is not a file.
    given: The other settings.
    dashes: What settings begin with, for the message.
  """
  own = [name for name in ('inputs', 'targets', 'labels') if name in given]
  if own:
    raise UserError(
      f'{dashes}train is {name!r}, which does not end in {", ".join(SUFFIXES)},'
      f' so it names a SeqIO task. A task has its own {", ".join(own)}; leave'
      ' them out, or give a file'
    )


def _rows(rows: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the macros of the rows of some splits."""
  if list(rows) == ['train'] and not is_file(rows['train']):
    check_task(rows['train'], given, '--')
    return {'MIXTURE_OR_TASK_NAME': rows['train']}
  if wrong := [split for split in rows if not is_file(rows[split])]:
    raise UserError(
      ', '.join(f'--{split} is {rows[split]!r}' for split in wrong)
      + f'; expected a file that ends in {", ".join(SUFFIXES)}. For a SeqIO'
      ' task, give only --train: a task has its own splits'
    )
  # Absolute, so that config.gin works from any working directory.
  return {
    'TASK_FILES': {split: _absolute(file) for split, file in rows.items()}
  }


def _absolute(file: str) -> str:
  return file if '://' in file else os.path.abspath(os.path.expanduser(file))


def _choices(
  given: dict[str, Any], files: Sequence[str], default: bool
) -> list[str]:
  """Removes `model`, `loss` and `method` from `given`; returns their files."""
  chosen = []
  for flag, kind in (('model', 'models'), ('loss', 'losses')):
    if (name := given.pop(flag, None)) is not None:
      chosen.append(_choice(flag, name, [kind]))
  method = given.pop('method', None)
  if method not in (None, 'prompt'):
    chosen.append(_choice('method', method, ['methods', 'prompts']))
  elif method or (default and not _has(files, 'methods', 'prompts')):
    labels = 'labels' in given or 'label_names' in given
    start = 'from_class_labels' if labels else 'sampled_vocab'
    chosen.append(f'prompts/{start}.gin')
  return chosen


def _choice(flag: str, name: str, kinds: Sequence[str]) -> str:
  """Returns the gin file of a name: 'lora' -> 'methods/lora.gin'."""
  by_name = {pathlib.Path(file).stem: file for file in own_files(kinds)}
  if name not in by_name:
    raise UserError(f'there is no {flag} {name!r}{nearest(name, by_name)}')
  return by_name[name]
