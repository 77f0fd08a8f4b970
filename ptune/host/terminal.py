"""The terminal of a command: its log, and Ctrl-C before there is a run."""

import importlib.util
import logging as python_logging
import os
import pathlib
import signal
import sys

from ptune.host import processes


def leave_on_signals(program: str) -> None:
  """Ends the process at Ctrl-C and SIGTERM, while there is nothing to save.

  At once, and not by an exception: imports of C extensions, callbacks and
  destructors would swallow that. While it trains, `train` has its own way.
  """
  if program == 'train':
    message, status = 'MODEL_DIR is unchanged; the same command goes on', 0
  else:
    message, status = 'nothing was written', 130

  stderr = os.dup(2)  # Which is closed for a while: see `quiet_stderr`.

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
  """Plain lines on stderr: ours from INFO on, other packages' from ERROR."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  from absl import flags, logging

  flags.FLAGS.mark_as_parsed()  # Else absl complains; argparse has read them.
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  # `ptune.tasks` lies beside the package in a checkout, and in it elsewhere.
  tasks = importlib.util.find_spec('ptune.tasks')
  assert tasks is not None and tasks.origin is not None
  ours = (
    str(pathlib.Path(__file__).parents[1]),
    str(pathlib.Path(tasks.origin).parent),
  )
  handler = logging.get_absl_handler()

  def shown(record):
    # Orbax and its threads show tracebacks of what is raised too.
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
  """What is stderr now: the progress bar puts itself in its place."""

  def write(self, text: str) -> None:
    sys.stderr.write(text)

  def flush(self) -> None:
    sys.stderr.flush()

  def close(self) -> None:
    """Absl closes what it writes to."""
