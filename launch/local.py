"""Starts several processes of one ptune command on this machine.

    python launch/local.py --processes=2 --devices_per_process=4 -- \\
      ptune train --gin_file=... --gin.MODEL_DIR="'/runs/try'"

Each line of output begins with the number of its process. SIGTERM and Ctrl-C
go to all processes. If one fails, the others would wait for it forever. So this
program ends them, and returns the exit status of the failed one.

One process can use all devices of a machine, so training needs this only to
rehearse a run of many hosts. --devices_per_process sets the number of fake CPU
devices of each process.
"""

import argparse
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the processes; returns the exit status of the first failure."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--processes', type=int, default=2)
  parser.add_argument(
    '--devices_per_process',
    type=int,
    help="fake CPU devices of each process (the machine's own devices)",
  )
  parser.add_argument(
    '--grace_seconds',
    type=float,
    default=10,
    help='after a failure, seconds until the others are killed',
  )
  parser.add_argument('command', nargs='+', help='after --')
  args = parser.parse_args(argv)
  if args.processes < 1:
    parser.error(f'--processes is {args.processes}; it must be at least 1')
  return run(
    args.command, args.processes, args.devices_per_process, args.grace_seconds
  )


def run(
  command: Sequence[str],
  count: int,
  devices: int | None = None,
  grace_seconds: float = 10,
) -> int:
  """Runs `count` processes of a ptune command to their end.

  Args:
    command: The command, which takes --coordinator_address, --process_count
      and --process_index.
    count: Number of processes.
    devices: Fake CPU devices of each; the machine's own if not given.
    grace_seconds: How long the others may take to exit after a failure.

  Returns:
    0 if all succeeded, otherwise the status of the one that failed first
    (128 + the signal's number, if a signal ended it).
  """
  environment = {**os.environ, 'PYTHONUNBUFFERED': '1'}
  if devices is not None:
    environment['JAX_PLATFORMS'] = 'cpu'
    environment['XLA_FLAGS'] = (
      environment.get('XLA_FLAGS', '')
      + f' --xla_force_host_platform_device_count={devices}'
    ).strip()
  address = f'localhost:{_free_port()}'
  processes: list[subprocess.Popen[bytes]] = []
  ended: queue.Queue[int] = queue.Queue()

  def forward(number, frame):
    del frame
    for process in processes:
      if process.poll() is None:
        process.send_signal(number)

  before = {
    s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    for i in range(count):
      flags = [
        f'--coordinator_address={address}',
        f'--process_count={count}',
        f'--process_index={i}',
      ]
      # A new session; otherwise Ctrl-C in a terminal would reach it twice.
      process = subprocess.Popen(
        [*command, *flags],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
      processes.append(process)
      threading.Thread(target=_follow, args=(i, process, ended)).start()
    return _wait(processes, ended, grace_seconds)
  finally:
    _end(processes, signal.SIGKILL)
    for number, handler in before.items():
      signal.signal(number, handler)


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def _follow(
  index: int, process: subprocess.Popen[bytes], ended: 'queue.Queue[int]'
) -> None:
  """Prints a process's output, line by line, until it ends."""
  assert process.stdout is not None
  for line in process.stdout:
    text = line.decode(errors='replace').rstrip('\n')
    # In one write, because another process's line could come between two.
    print(f'[{index}] {text}\n', end='', flush=True)
  process.wait()
  ended.put(index)


def _wait(
  processes: Sequence[subprocess.Popen[bytes]],
  ended: 'queue.Queue[int]',
  grace_seconds: float,
) -> int:
  """Waits for all; after a failure, no longer than the grace period."""
  status, deadline = 0, None
  remaining = len(processes)
  while remaining:
    # A short timeout, so that signal handlers can run.
    try:
      index = ended.get(timeout=0.2)
    except queue.Empty:
      if deadline is not None and time.monotonic() > deadline:
        _end(processes, signal.SIGKILL)
        deadline = None
      continue
    remaining -= 1
    code = processes[index].returncode
    if code and not status:
      status = 128 - code if code < 0 else code
      deadline = time.monotonic() + grace_seconds
      print(
        f'launch/local.py: process {index} failed (exit status {status});'
        f' the others have {grace_seconds:g} s to end',
        file=sys.stderr,
        flush=True,
      )
      _end(processes, signal.SIGTERM)
  return status


def _end(
  processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals
) -> None:
  """Signals the processes that still run, and their children."""
  for process in processes:
    if process.poll() is None:
      os.killpg(process.pid, number)


if __name__ == '__main__':
  sys.exit(main())
