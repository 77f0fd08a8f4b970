"""Several processes of one run: the same results, and no one waits for ever.

Two kinds of processes: `launch/local.py` starts the program at the end of this
file, and `tiny.processes` forks others from a server, which is quick.
"""

import os
import pathlib
import signal
import sys
import time

import numpy as np
import pytest

from ptune import processes
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 10


def prompt_at(model_dir, step=STEPS):
  return np.load(pathlib.Path(model_dir, 'prompts', f'step_{step}.npy'))


# ---------------------------------------------------- one process that is lost


def wait_or_hang():
  """A process that joins the others; then one ends and the rest wait."""
  flags = dict(a.removeprefix('--').split('=') for a in sys.argv[1:])
  processes.join(
    flags['coordinator_address'],
    int(flags['process_count']),
    int(flags['process_index']),
  )
  print('joined', flush=True)
  if flags.get('leaves') == flags['process_index']:
    return processes.leave(int(flags['status']))
  if 'status' in flags and flags['status'] == '0':
    return processes.leave(0)
  while True:  # As in a collective, but not even an error comes.
    time.sleep(60)


@pytest.mark.parametrize('victim', [0, 1])
def test_the_others_end_and_name_the_one_that_was_killed(victim):
  started = tiny.processes(3, [], call='tests.multiprocess_test:wait_or_hang')
  for process in started:
    process.wait_for('joined')
  begin = time.monotonic()
  started[victim].send(signal.SIGKILL)
  for index, process in enumerate(started):
    status = process.wait()
    if index == victim:
      assert status == -signal.SIGKILL
      continue
    assert status not in (0, -signal.SIGKILL)
    host = os.uname().nodename
    text = f'process {victim} (host {host}, pid {started[victim].pid}) is gone'
    assert text in process.output
    assert 'the same command goes on' in process.output
  assert time.monotonic() - begin < 10


@pytest.mark.parametrize('leaver', [0, 2])
def test_who_ends_with_an_error_is_named_too(leaver):
  started = tiny.processes(
    3,
    [f'--leaves={leaver}', '--status=2'],
    call='tests.multiprocess_test:wait_or_hang',
  )
  assert [process.wait() for process in started] == [2, 2, 2]
  for index, process in enumerate(started):
    told = f'process {leaver} (host' in process.output
    assert told == (index != leaver)
    assert 'absl::' not in process.output  # No C++ trace.


def test_processes_that_finish_at_different_times_end_well():
  started = tiny.processes(
    3, ['--status=0'], call='tests.multiprocess_test:wait_or_hang'
  )
  assert [process.wait() for process in started] == [0, 0, 0]
  assert not any('ptune:' in process.output for process in started)
