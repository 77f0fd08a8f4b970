"""`ptune tasks`: lists tasks and mixtures, or shows examples of one.

    ptune tasks 'taskless_super_glue_*'
    ptune tasks show taskless_glue_sst2_v200
    ptune tasks show --gin_file=tasks/from_files.gin --gin.TASK_FILES=...

A list needs no network. Examples of a task are read as in training, so their
data may be downloaded.
"""

import argparse
import fnmatch
import importlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ptune.config import gin_files
from ptune.errors import UserError
from ptune.host.columns import aligned
from ptune.host.quiet import quiet_stderr
from ptune.tasks.texts import TextTask


def main(argv: Sequence[str]) -> int:
  """Runs the command line after `ptune tasks`; returns the exit status."""
  shows = list(argv[:1]) == ['show']
  args = (_parse_show if shows else _parse_list)(list(argv)[shows:])
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    if args.module or not shows:
      with quiet_stderr():
        importlib.import_module('ptune.data.seqio_registry')
    for module in args.module:
      importlib.import_module(module)
    lines = _show(args) if shows else _list(args.pattern)
    for line in lines:
      print(line)
  except BrokenPipeError:  # The reader, as in `ptune tasks | head`, has quit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (ValueError, OSError, ModuleNotFoundError) as error:
    print(f'ptune tasks: {error}', file=sys.stderr)
    return 2
  return 0


def _parser(prog: str, what: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog=prog, description=what)
  parser.add_argument(
    '--module',
    action='append',
    default=[],
    help='the module that registers your tasks, as MIXTURE_OR_TASK_MODULE',
  )
  return parser


def _parse_list(argv: Sequence[str]) -> argparse.Namespace:
  parser = _parser(
    'ptune tasks',
    'Lists tasks and mixtures: name, source, vocabulary, metrics. `ptune tasks'
    ' show NAME` prints examples of one.',
  )
  parser.add_argument(
    'pattern',
    nargs='*',
    help="part of a name, or a pattern of whole names: 'taskless_glue_*_v200'",
  )
  return parser.parse_args(argv)


def _parse_show(argv: Sequence[str]) -> argparse.Namespace:
  parser = _parser(
    'ptune tasks show', 'Prints examples of a task, as text and as ids.'
  )
  parser.add_argument(
    'name', nargs='?', help='the task; not needed if a gin file names it'
  )
  parser.add_argument('--split', help='the split (default: the first)')
  parser.add_argument('--examples', type=int, default=3)
  parser.add_argument('--inputs', type=int, default=512, help='in tokens')
  parser.add_argument('--targets', type=int, default=512, help='in tokens')
  parser.add_argument('--tfds_data_dir', help='directory of TFDS data sets')
  parser.add_argument('--gin_file', action='append', default=[])
  bindings = [a.removeprefix('--gin.') for a in argv if a.startswith('--gin.')]
  args = parser.parse_args([a for a in argv if not a.startswith('--gin.')])
  args.bindings = bindings
  if (args.name is None) != bool(args.gin_file):
    parser.error('give the name of a task, or a gin file that sets it')
  return args


# ------------------------------------------------------------------------ list


def _list(patterns: Sequence[str]) -> Iterator[str]:
  import seqio

  importlib.import_module('ptune.tasks.library')
  names = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
  found = [
    name
    for name in names
    if not patterns or any(_matches(name, pattern) for pattern in patterns)
  ]
  if not found:
    raise UserError(f'none of {len(names)} names matches {" ".join(patterns)}')
  rows = [(name, *_about(seqio.get_mixture_or_task(name))) for name in found]
  yield from aligned(rows)


def _matches(name: str, pattern: str) -> bool:
  if any(c in pattern for c in '*?['):
    return fnmatch.fnmatchcase(name, pattern)
  return pattern in name


def _about(task: Any) -> tuple[str, str, str]:
  """Describes a task: its source, features and metrics."""
  if isinstance(task, TextTask):
    metrics = ', '.join(_metric(f) for f in task.metric_fns)
    words = os.path.join(*str(task.vocabulary).split('/')[-2:])
    return 'your rows', f'inputs, targets: {words}', metrics or '-'
  import seqio

  features: dict[str, list[str]] = {}
  for name, feature in task.output_features.items():
    features.setdefault(_vocabulary(feature.vocabulary), []).append(name)
  described = '; '.join(
    f'{", ".join(names)}: {vocab}' for vocab, names in features.items()
  )
  if isinstance(task, seqio.Mixture):
    rates = ', '.join(f'{t.name} {task.get_rate(t):g}' for t in task.tasks)
    return f'mixture of {len(task.tasks)}', described, rates
  metrics = ', '.join(_metric(f) for f in task.metric_fns)
  return _source(task.source), described, metrics or '-'


def _metric(function: Any) -> str:
  function = getattr(function, 'func', function)
  name = getattr(function, '__qualname__', type(function).__name__)
  return name.split('.')[0]


def _source(source: Any) -> str:
  loader = getattr(source, 'tfds_dataset', None)
  return loader.name if loader is not None else type(source).__name__


def _vocabulary(vocabulary: Any) -> str:
  path = getattr(vocabulary, 'sentencepiece_model_file', None)
  if path is None:
    return type(vocabulary).__name__
  # .../cc_all.32000.100extra/sentencepiece.model
  return os.path.join(*path.split('/')[-2:])


# ------------------------------------------------------------------------ show


def _show(args: argparse.Namespace) -> Iterator[str]:
  from ptune.data import seqio_task

  if args.tfds_data_dir:
    with quiet_stderr():
      import seqio

    seqio.set_tfds_data_dir_override(args.tfds_data_dir)
  name = args.name
  if name is None:
    gin_files.parse(args.gin_file, args.bindings)
    name = _named_by_gin()
  return examples(
    seqio_task.load(name),
    args.split,
    {'inputs': args.inputs, 'targets': args.targets},
    args.examples,
  )


def _named_by_gin() -> Any:
  """Returns the value of MIXTURE_OR_TASK_NAME: a name or a task."""
  import gin

  gin.parse_config(
    'from __gin__ import dynamic_registration\n'
    'from ptune.tools import list_tasks\n'
    'list_tasks.itself.name = %MIXTURE_OR_TASK_NAME'
  )
  try:
    gin.query_parameter('%VOCABULARY')
  except ValueError:
    pass  # It is unset. The files of runs/ bind it, and are not needed here.
  else:
    gin.parse_config(
      'from __gin__ import dynamic_registration\n'
      'from ptune.tasks import texts\n'
      'texts.chosen_vocabulary.path = %VOCABULARY'
    )
  module = importlib.import_module('ptune.tools.list_tasks')
  return gin.get_configurable(module.itself)()


def itself(name: Any) -> Any:
  """Returns its argument, so that gin can resolve a reference."""
  return name


def examples(
  task: Any, split: str | None, lengths: dict[str, int], count: int
) -> Iterator[str]:
  """Yields a description of a task and its first examples.

  Args:
    task: The task or mixture. For a mixture, we show its first task that has
      the split.
    split: The split; the first one if not given.
    lengths: TASK_FEATURE_LENGTHS.
    count: How many examples.
  """
  from ptune.data import seqio_task

  splits = seqio_task.splits(task)
  split = split or ('train' if 'train' in splits else splits[0])
  source, features, metrics = _about(task)
  yield f'{task.name}: {source}'
  yield f'  splits    {", ".join(splits)}'
  yield f'  features  {features}'
  tasks = list(getattr(task, 'tasks', ()))  # A mixture has tasks.
  yield f'  {"tasks   " if tasks else "metrics "}  {metrics}'
  parts = [t for t in tasks or [task] if split in t.splits]
  if not parts:
    raise UserError(f'{task.name} has no split {split!r}; it has {splits}')
  rows = seqio_task.examples(parts[0], lengths, split)
  for i, (texts, batch) in enumerate(itertools.islice(rows, count)):
    yield f'\n{parts[0].name}, {split} {i}'
    for name, ids in (
      ('inputs', batch['encoder_input_tokens']),
      ('targets', batch['decoder_target_tokens']),
    ):
      yield f'  {name.ljust(8)}  {texts[name]!r}'
      yield f'  {len(ids):4} ids  {" ".join(map(str, ids.tolist()))}'


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
