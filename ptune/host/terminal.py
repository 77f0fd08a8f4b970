"""The terminal of a command: its log, and Ctrl-C before training starts."""

import importlib.util
import logging as python_logging
import os
import pathlib
import signal
import sys

from ptune.host import processes


def leave_on_signals(program: str) -> None:
  """Makes Ctrl-C and SIGTERM end the process while there is nothing to save.

  The process ends at once. An exception would be swallowed by imports of C
  extensions, callbacks and destructors. During training, the run replaces these
  handlers.
  """
  if program == 'train':
    message, status = 'MODEL_DIR is unchanged; the same command resumes', 0
  else:
    message, status = 'nothing was written', 130

  stderr = os.dup(2)  # A copy, because `quiet_stderr` redirects the original.

  def leave(number, frame):
    del frame
    name = signal.Signals(number).name
    os.write(
      stderr, f'ptune {program}: stopped by {name}; {message}\n'.encode()
    )
    processes.leave_early(status)
    os._exit(status)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, leave)


def set_up_logging() -> None:
  """Logs plain lines to stderr: ours from INFO on, others' from ERROR on."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  from absl import flags, logging

  flags.FLAGS.mark_as_parsed()  # We use argparse; absl would complain.
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  # In a checkout, `ptune.tasks` is outside the package directory.
  tasks = importlib.util.find_spec('ptune.tasks')
  assert tasks is not None and tasks.origin is not None
  ours = (
    str(pathlib.Path(__file__).parents[1]),
    str(pathlib.Path(tasks.origin).parent),
  )
  handler = logging.get_absl_handler()

  def shown(record):
    # Orbax and its threads log tracebacks of errors that they also raise.
    quiet = f'{os.sep}orbax{os.sep}' in record.pathname or (
      record.name in ('asyncio', 'concurrent.futures')
    )
    loud = record.levelno >= python_logging.ERROR and not quiet
    return loud or record.pathname.startswith(ours)

  for old in list(handler.filters):
    handler.removeFilter(old)
  handler.addFilter(shown)
  handler.setFormatter(
    python_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S')
  )
  handler.python_handler.setStream(_Stderr())


class _Stderr:
  """The current sys.stderr, which the progress bar replaces."""

  def write(self, text: str) -> None:
    sys.stderr.write(text)

  def flush(self) -> None:
    sys.stderr.flush()

  def close(self) -> None:
    """Does nothing; absl closes its stream."""
