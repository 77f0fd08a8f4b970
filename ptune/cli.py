"""The `ptune` command: flags and gin files in, one program run.

    ptune train --gin_file=models/t5_1_1_small.gin --gin_file=... \\
      --gin.MODEL_DIR="'/runs/sst2'"

takes T5X's command lines. Gin files are looked for in the directories of
--gin_search_paths, in the working directory, and in ptune's own `gin/`.
Nothing heavy is imported before the command line has been read.
"""

import argparse
import contextlib
import difflib
import importlib
import logging as python_logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence

# The macros that the gin files of ptune read: what each is, and an example.
MACROS = {
  'BATCH_SIZE': ('examples a step', '32'),
  'BEST_METRIC': ('what chooses the best prompt', "'accuracy'"),
  'BUCKET_MULTIPLE': ('lengths are padded to a multiple of it', '32'),
  'CHECKPOINT_PATH': ('the base model', "'/models/t5_1_1_small'"),
  'CHECKPOINT_PERIOD': ('steps between checkpoints', '1000'),
  'CLASS_LABELS': ('labels that initialise the prompt', "['no', 'yes']"),
  'DROPOUT_RATE': ('dropout in training', '0.1'),
  'DTYPE': ('what activations are computed in', "'bfloat16'"),
  'EARLY_STOPPING': ('evaluations without a better score', '5'),
  'EVAL_OUTPUT_DIR': ('where an evaluation writes', "'/runs/eval'"),
  'EVAL_PERIOD': ('steps between evaluations', '1000'),
  'EVAL_SPLIT': ('the split that is evaluated', "'validation'"),
  'EVAL_STEPS': ('batches of an evaluation, None for all', '20'),
  'INFER_FILE': ('one input a line, or JSON lines', "'inputs.txt'"),
  'INFER_MODE': ('predict or score', "'predict'"),
  'INFER_OUTPUT_DIR': ('where predictions are written', "'/runs/out'"),
  'INFER_SPLIT': ('the split that is predicted', "'test'"),
  'INITIAL_CHECKPOINT_PATH': ('the base model', "'/models/t5_1_1_small'"),
  'INITIAL_TEXT': ('text that initialises the prompt', "'Classify this:'"),
  'KEEP_CHECKPOINTS': ('how many are kept, None for all', '3'),
  'LEARNING_RATE': ('peak learning rate', '0.3'),
  'METHOD': ('set by a file of methods/ or prompts/', '@prompt.prompt()'),
  'MICROBATCHES': ('parts that a batch is computed in', '4'),
  'MIXTURE_OR_TASK_MODULE': ('registers the task', "'my_tasks'"),
  'MIXTURE_OR_TASK_NAME': ('the SeqIO task', "'my_sst2'"),
  'MODEL': ('set by a file of models/', '@network.t5()'),
  'MODEL_DIR': ('where a run writes', "'/runs/sst2'"),
  'MODEL_PARALLEL': ('devices that hold one copy of the weights', '4'),
  'OPTIMIZER': ('set by a file of methods/', '@optim.adafactor'),
  'PROMPT_FILE': ('a saved prompt', "'/runs/sst2/prompts/best.npy'"),
  'PROMPT_LENGTH': ('rows of the prompt', '100'),
  'RANDOM_SEED': ('of data order, initialisation, dropout', '0'),
  'TASK_FEATURE_LENGTHS': ('in tokens', "{'inputs': 128, 'targets': 8}"),
  'TRAIN_STEPS': ('steps of this run', '30000'),
  'USE_CACHED_TASKS': ('read tasks cached by SeqIO', 'True'),
}

PROGRAMS = {
  'train': ('ptune.train', 'train', 'tune a prompt on a task'),
  'eval': (
    'ptune.evaluate',
    'evaluate',
    "measure a prompt by a task's metrics",
  ),
  'infer': ('ptune.infer', 'infer', 'write predictions, or scores of targets'),
}


class UsageError(ValueError):
  """What is wrong with a command line."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one program; returns the exit status."""
  argv = sys.argv[1:] if argv is None else list(argv)
  args = _parse(argv)
  _set_up_logging()
  try:
    with _clean_errors():
      _initialize_processes(args)
      _run(args)
  except UsageError as error:
    print(f'ptune {args.program}: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f'ptune {args.program}: interrupted', file=sys.stderr)
    return 130
  return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='ptune',
    description='Soft prompts for frozen T5-family models, in JAX.',
    epilog='ptune COMMAND --help lists the flags and macros of a command.',
  )
  commands = parser.add_subparsers(
    dest='program', metavar='COMMAND', required=True
  )
  width = max(map(len, MACROS)) + 2
  macros = '\n'.join(
    f'  {name.ljust(width)}{what}, e.g. {example}'
    for name, (what, example) in MACROS.items()
  )
  for name, (_, _, what) in PROGRAMS.items():
    command = commands.add_parser(
      name,
      help=what,
      description=what[0].upper() + what[1:] + '.',
      formatter_class=argparse.RawDescriptionHelpFormatter,
      epilog=f'macros, set with --gin.NAME=VALUE:\n{macros}\n\ngin files:\n'
      + '\n'.join(f'  {file}' for file in _own_files()),
    )
    command.add_argument(
      '--gin_file',
      action='append',
      default=[],
      help='a gin file; repeat it for several, in any order',
    )
    command.add_argument(
      '--gin_search_paths',
      default='',
      help='directories to look for gin files in, separated by commas',
    )
    command.add_argument(
      '--gin_bindings',
      action='append',
      default=[],
      help='one binding, like --gin.NAME=VALUE; may be repeated',
    )
    command.add_argument('--tfds_data_dir', help='where TFDS keeps data sets')
    command.add_argument(
      '--coordinator_address', help='host:port of process 0, for several'
    )
    command.add_argument('--process_count', type=int)
    command.add_argument('--process_index', type=int)
    command.add_argument(
      '--multiprocess',
      action='store_true',
      help='join the processes that TPU, SLURM or Kubernetes started',
    )
  bindings = [a.removeprefix('--gin.') for a in argv if a.startswith('--gin.')]
  args = parser.parse_args([a for a in argv if not a.startswith('--gin.')])
  args.gin_bindings += bindings
  return args


# ------------------------------------------------------------------------ gin


def gin_directory() -> pathlib.Path:
  """Where ptune's own gin files lie."""
  # In a wheel `ptune.gin` lies inside the package, in a checkout beside it.
  package = pathlib.Path(__file__).parent
  inside = package / 'gin'
  return inside if inside.is_dir() else package.parent / 'gin'


def _own_files() -> list[str]:
  directory = gin_directory()
  return sorted(
    str(path.relative_to(directory)) for path in directory.glob('*/*.gin')
  )


def _find(file: str, search_paths: Iterable[str]) -> pathlib.Path:
  """The gin file of a name; an error names the nearest ones."""
  places = [*search_paths, '.', str(gin_directory())]
  for place in places:
    path = pathlib.Path(place, file)
    if path.is_file():
      return path.resolve()
  known = _own_files()
  near = difflib.get_close_matches(file, known, n=3, cutoff=0.5)
  raise UsageError(
    f'there is no gin file {file!r} in {places}'
    + (f'; did you mean {near}?' if near else f'; ptune has {known}')
  )


def parse_gin(
  files: Sequence[str],
  bindings: Sequence[str],
  search_paths: Sequence[str] = (),
) -> None:
  """Reads gin files and bindings, and checks every macro.

  ptune's own files set different macros each, the user's are read after them,
  and the bindings last: the order in which --gin_file names ptune's files
  makes no difference.

  Raises:
    UsageError: If a file or macro is unknown, or two of ptune's files set the
      same macro.
  """
  import gin

  own = gin_directory().resolve()
  paths = list(dict.fromkeys(_find(file, search_paths) for file in files))
  ours = [path for path in paths if path.is_relative_to(own)]
  _check_kinds(ours, own)
  for place in [*search_paths, str(own)]:
    gin.add_config_file_search_path(place)
  for path in [*ours, *(path for path in paths if path not in ours)]:
    gin.parse_config_file(str(path))
  gin.parse_config(list(bindings))
  _check_macros(paths, bindings)


_SETS_MACRO = re.compile(r'^\s*([A-Z][A-Z0-9_]*)\s*=', re.MULTILINE)
_READS_MACRO = re.compile(r'%([A-Z][A-Z0-9_]*)')


def _check_kinds(ours: Iterable[pathlib.Path], own: pathlib.Path) -> None:
  """Refuses two files that set the same macro, such as two of models/."""
  set_by: dict[str, tuple[pathlib.Path, pathlib.Path]] = {}
  for path in ours:
    # A file counts with what it includes; what it sets itself comes last.
    included = re.findall(r"^include '(.*)'", path.read_text(), re.MULTILINE)
    for source in [path, *(own / file for file in included)]:
      for macro in _SETS_MACRO.findall(source.read_text()):
        other, its_source = set_by.setdefault(macro, (path, source))
        if other != path and its_source != source:
          pair = sorted(str(p.relative_to(own)) for p in (path, other))
          raise UsageError(
            f'{pair[0]} and {pair[1]} both set {macro}; choose one of them'
          )


def _check_macros(
  paths: Iterable[pathlib.Path], bindings: Iterable[str]
) -> None:
  """Refuses a macro on the command line that no gin file reads."""
  text = '\n'.join(path.read_text() for path in paths)
  known = sorted({*MACROS, *_READS_MACRO.findall(text)})
  for name in _SETS_MACRO.findall('\n'.join(bindings)):
    if name not in known:
      near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
      raise UsageError(
        f'there is no macro {name!r}'
        + (f'; did you mean {near}?' if near else f'; known: {known}')
      )


def _missing_macro(name: str) -> str:
  what, example = MACROS.get(name, ('', '...'))
  if name in ('MODEL', 'METHOD'):
    kinds = ('models',) if name == 'MODEL' else ('methods', 'prompts')
    files = [f for f in _own_files() if f.split('/')[0] in kinds]
    return f'the command needs one of these --gin_file: {", ".join(files)}'
  return (
    f'the macro {name} ({what}) is needed; for example --gin.{name}="{example}"'
  )


def _run(args: argparse.Namespace) -> None:
  module, function, _ = PROGRAMS[args.program]
  if not args.gin_file:
    raise UsageError(
      'no --gin_file; for example --gin_file=models/t5_1_1_small.gin'
      ' --gin_file=prompts/from_class_labels.gin'
      f' --gin_file=runs/{args.program}.gin'
    )
  import gin

  with _quiet_stderr():
    program: Callable[[], object] = getattr(
      importlib.import_module(module), function
    )
  # Where users keep the module that registers their tasks. Last, so that no
  # directory of theirs hides a package.
  sys.path.append(os.getcwd())
  search_paths = [p for p in args.gin_search_paths.split(',') if p]
  parse_gin(args.gin_file, args.gin_bindings, search_paths)
  if args.tfds_data_dir:
    import seqio

    seqio.set_tfds_data_dir_override(args.tfds_data_dir)
  gin.finalize()
  gin.get_configurable(program)()


# -------------------------------------------------------------------- process


def _initialize_processes(args: argparse.Namespace) -> None:
  """Joins the other processes of a run, where there are any."""
  import jax

  # Compiled programs are kept: a second start skips the compilation.
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or os.path.join(
    os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache')), 'ptune'
  )
  jax.config.update('jax_compilation_cache_dir', cache)
  if args.coordinator_address:
    jax.distributed.initialize(
      args.coordinator_address, args.process_count, args.process_index
    )
  elif args.multiprocess:
    jax.distributed.initialize()


@contextlib.contextmanager
def _clean_errors():
  """Turns what users can mend into one message without a traceback."""
  try:
    yield
  except UsageError:
    raise
  except (ValueError, FileNotFoundError, FloatingPointError) as error:
    raise UsageError(_readable(error)) from error


def _readable(error: Exception) -> str:
  """An error's message, without what gin adds about its configurables."""
  text = str(error)
  missing = re.search(r"[Mm]acro '?([A-Z][A-Z0-9_]*)", text)
  if missing:
    return _missing_macro(missing[1])
  return re.sub(r'\n\s*In call to configurable .*', '', text)


@contextlib.contextmanager
def _quiet_stderr():
  """Drops what TensorFlow's C++ prints while it is imported.

  It says that there is no CUDA, before it reads any setting of its own.
  Exceptions are not affected.
  """
  sys.stderr.flush()
  kept = os.dup(2)
  with open(os.devnull, 'w') as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)


def _set_up_logging() -> None:
  """Plain lines on stderr: ours from INFO on, other packages' from ERROR."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  from absl import flags, logging

  flags.FLAGS.mark_as_parsed()  # Else absl complains; argparse has read them.
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  package = str(pathlib.Path(__file__).parent)
  handler = logging.get_absl_handler()

  def shown(record):
    # Gin calls each place where it does not find an included file an error.
    loud = record.levelno >= python_logging.ERROR
    loud = loud and record.module != 'resource_reader'
    return loud or record.pathname.startswith(package)

  handler.addFilter(shown)
  handler.setFormatter(
    python_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S')
  )


if __name__ == '__main__':
  sys.exit(main())
