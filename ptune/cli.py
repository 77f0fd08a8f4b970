"""The `ptune` command: it reads flags and gin files, and runs one program.

    ptune train --gin_file=models/t5_1_1_small.gin --gin_file=... \\
      --gin.MODEL_DIR="'/runs/sst2'"

It accepts T5X's command lines. It looks for gin files in the directories of
--gin_search_paths, then in the working directory, then in ptune's own `gin/`.
It imports nothing heavy before it has read the command line.
"""

import argparse
import functools
import importlib
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from ptune.config import flags, gin_files, words
from ptune.errors import UserError
from ptune.host import collector, paths, processes, terminal
from ptune.host.quiet import quiet_stderr

# Programs that gin configures: module, function, help.
PROGRAMS = {
  'train': ('ptune.train', 'train', 'tune a prompt on a task'),
  'eval': (
    'ptune.evaluate',
    'evaluate',
    "measure a prompt by a task's metrics",
  ),
  'infer': ('ptune.infer', 'infer', 'write predictions, or scores of targets'),
  'distill': (
    'ptune.distill',
    'distill',
    'train a prompt to replace a long text',
  ),
  'ablate': (
    'ptune.analysis.ablate',
    'ablate',
    'measure which rows of a prompt matter, and prune the others',
  ),
  'study': (
    'ptune.studies.study',
    'study',
    'reproduce a figure or table of the paper, and draw it',
  ),
  'plan': (
    'ptune.tools.plan',
    'plan',
    'estimate the memory of each device in a training run; build nothing',
  ),
  'doctor': (
    'ptune.tools.doctor',
    'preflight',
    'check whether a run can start',
  ),
}
# Programs with their own flags, which the module's `add_arguments` adds.
TOOLS = {
  'demo': ('ptune.tools.demo', 'see a prompt work, on a model of 2 MB'),
  'serve': (
    'ptune.serving.serve',
    'serve one model and many prompts over HTTP',
  ),
  'export': (
    'ptune.convert.commands',
    'write a prompt for PEFT, T5X, or as a plain file',
  ),
  'import': (
    'ptune.convert.commands',
    "convert another program's prompt to ptune's format",
  ),
  'convert': (
    'ptune.convert.commands',
    "convert a model between T5X's and Hugging Face's layout",
  ),
  'push': (
    'ptune.convert.commands',
    'publish a prompt on the Hugging Face Hub, with a model card',
  ),
  'inspect': ('ptune.convert.commands', 'describe a file or directory'),
  'neighbours': (
    'ptune.analysis.neighbours',
    'list the vocabulary pieces nearest to each row of a prompt',
  ),
  'similarity': (
    'ptune.analysis.similarity',
    'compare prompts, or find the prompts most similar to one',
  ),
  'recycle': (
    'ptune.analysis.recycle',
    'move a prompt to another model, matching their embeddings',
  ),
  'methods': (
    'ptune.tools.list_methods',
    'list the methods, and how many parameters each trains',
  ),
  'tasks': ('ptune.tools.list_tasks', 'list tasks, or show examples of one'),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one program.

  Args:
    argv: The command line. If it is None, this process's own command line is
      used, and Ctrl-C and SIGTERM are handled too.

  Returns:
    The exit status: 0 for success, 1 if the run failed, 2 if the command line
    is wrong or names something that is wrong.

  Raises:
    Exception: A bug in ptune or in a task, which users cannot fix.
  """
  collector.collect_rarely()  # Before the imports.
  given = sys.argv[1:] if argv is None else list(argv)
  if given[:1] == ['tasks']:  # It has subcommands and its own gin flags.
    from ptune.tools import list_tasks

    terminal.set_up_logging()
    return list_tasks.main(given[1:])
  args = _parse(given)
  # Before `_read` adds gin files.
  rename = functools.partial(words.renamed, words=_words(args))
  if argv is None:
    terminal.leave_on_signals(args.program)
  terminal.set_up_logging()
  try:
    # Read the settings before the imports, which take seconds.
    settings = None if args.program in TOOLS else _read(args)
    _initialize_processes(args)
    with paths.nothing_left(), words.in_log(rename):
      status = _use(args) if settings is None else _run(args, settings)
  except Exception as error:
    error = _in_words(error)
    if _is_for_users(error):
      said = rename(gin_files.message(error))
      print(f'ptune {args.program}: {said}', file=sys.stderr)
      status = 2 if isinstance(error, ValueError | FileNotFoundError) else 1
    else:
      processes.wait_for_news()
      if not processes.several():
        raise
      traceback.print_exc()
      status = 1
  return processes.leave(status)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='ptune',
    description='Soft prompts for frozen T5-family models, in JAX.',
    epilog='ptune COMMAND --help lists the flags and macros of a command.',
  )
  commands = parser.add_subparsers(
    dest='program', metavar='COMMAND', required=True
  )
  for name, (_, _, what) in PROGRAMS.items():
    command = _add_command(commands, name, what)
    if argv[:1] == [name]:
      flags.add_arguments(name, command)
  for name, (module, what) in TOOLS.items():
    command = _add_command(commands, name, what)
    if argv[:1] == [name]:  # Its flags are in a module that imports more.
      importlib.import_module(module).add_arguments(name, command)
  bindings = [a.removeprefix('--gin.') for a in argv if a.startswith('--gin.')]
  args, unknown = parser.parse_known_args(
    [a for a in argv if not a.startswith('--gin.')]
  )
  if unknown:
    parser.error(
      f'unrecognized arguments: {flags.unknown_flags(args.program, unknown)}'
    )
  if args.program in TOOLS:
    return args
  args.gin_bindings += bindings
  several = args.process_count is not None and args.process_index is not None
  if bool(args.coordinator_address) != several or (
    (args.process_count is None) != (args.process_index is None)
  ):
    parser.error(
      'give --coordinator_address, --process_count and --process_index'
      ' together, or none of them'
    )
  if several and not 0 <= args.process_index < args.process_count:
    parser.error(
      f'--process_index is {args.process_index}; expected 0 to'
      f' {args.process_count - 1}, below --process_count'
    )
  if several and not re.fullmatch(r'\S+:\d+', args.coordinator_address):
    parser.error(
      f'--coordinator_address is {args.coordinator_address}; expected host:port'
      ' of process 0'
    )
  return args


def _add_command(commands, name: str, what: str) -> argparse.ArgumentParser:
  return commands.add_parser(
    name,
    help=what,
    description=what[0].upper() + what[1:] + '.',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def _use(args: argparse.Namespace) -> int:
  """Runs one of TOOLS."""
  with quiet_stderr():
    tool = importlib.import_module(TOOLS[args.program][0])
  return tool.run(args) or 0


def _read(args: argparse.Namespace) -> gin_files.Settings:
  """Reads the gin files and flags of one of PROGRAMS."""
  flags.resolve(args)
  if not args.gin_file and args.program != 'doctor':
    raise UserError(
      'no settings were given; usage:\n       ' + flags.usage(args.program)
    )
  search_paths = [p for p in args.gin_search_paths.split(',') if p]
  return gin_files.read(args.gin_file, args.gin_bindings, search_paths)


def _run(args: argparse.Namespace, settings: gin_files.Settings) -> int:
  """Runs one of PROGRAMS."""
  module, function, _ = PROGRAMS[args.program]
  import gin

  with quiet_stderr():
    program: Callable[..., int | None] = getattr(
      importlib.import_module(module), function
    )
  # Users often keep the module that registers their tasks here. We append the
  # directory last, so that nothing in it hides an installed package.
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  # A plan or a preflight reads few macros; the others may be unset.
  whole = args.program not in ('plan', 'doctor')
  gin_files.bind(settings, program if whole else None)
  if args.tfds_data_dir:
    import seqio

    seqio.set_tfds_data_dir_override(args.tfds_data_dir)
  if args.seqio_additional_cache_dirs:
    import seqio

    seqio.add_global_cache_dirs(args.seqio_additional_cache_dirs.split(','))
  if args.program == 'plan':
    program(args.devices, args.accelerator, args.compiler)
    return 0
  if args.program == 'doctor':
    return program() or 0
  gin.get_configurable(program)()
  return 0


def _words(args: argparse.Namespace) -> dict[str, str]:
  """Returns what the command line calls the macros of one of PROGRAMS."""
  given = flags.given_by(args)
  asks = getattr(args, 'run', None) is not None
  if args.program in TOOLS or not (given or asks):
    return {}
  alone = not (args.gin_file or args.gin_bindings)
  found = words.of_flags(args.program, given, alone)
  if getattr(args, 'file', None) is not None:
    found['INFER_FILE'] = 'FILE'
  return found


# -------------------------------------------------------------------- process


def _initialize_processes(args: argparse.Namespace) -> None:
  """Sets up JAX, and joins the other processes if there are any."""
  import jax

  from ptune.host import jax_setup

  jax_setup.cache_compiled_programs()
  jax_setup.configure_cpu()
  if args.program in TOOLS:
    return
  if args.coordinator_address or args.multiprocess:
    processes.join(
      args.coordinator_address, args.process_count, args.process_index
    )
    if jax.process_index() > 0:  # Process 0 logs for all.
      from absl import logging

      logging.set_verbosity(logging.WARNING)


def _in_words(error: Exception) -> Exception:
  """Returns an error that users can mend for one of JAX or TensorFlow."""
  names = {kind.__name__ for kind in type(error).__mro__}
  first = str(error).split('\n')[0]
  if 'JaxRuntimeError' in names and 'RESOURCE_EXHAUSTED' in first:
    return OSError(
      f'{first}\nThe memory of the device is too small. Lower BATCH_SIZE,'
      ' PROMPT_LENGTH or TASK_FEATURE_LENGTHS, or raise MICROBATCHES; ptune'
      ' plan estimates what fits'
    )
  if 'OpError' in names:  # TensorFlow's, for files in buckets.
    return OSError(first)
  return error


def _is_for_users(error: Exception) -> bool:
  """Returns whether to print one line for the user; a bug gets its traceback.

  Users can fix a `UserError` and errors of the file system. Gin raises plain
  ValueErrors, and a TypeError if a call lacks an argument.
  """
  if isinstance(error, UserError | OSError | FloatingPointError):
    return True
  import gin

  trace = error.__traceback__
  assert trace is not None
  while trace.tb_next is not None:
    trace = trace.tb_next
  file = pathlib.Path(trace.tb_frame.f_code.co_filename)
  return isinstance(error, ValueError | TypeError) and file.is_relative_to(
    pathlib.Path(gin.__file__).parent
  )


if __name__ == '__main__':
  sys.exit(main())
