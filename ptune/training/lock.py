"""The lock of a MODEL_DIR: only one run may use it at a time.

On a local file system or NFS, the operating system holds the lock. It releases
the lock when the process ends in any way, so a killed run never blocks its
restart. A bucket has no such locks. There, the run writes a heartbeat every few
seconds; another start waits for one, and takes over if none comes.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from ptune.errors import UserError

FILE = 'run.lock'
# Seconds between two heartbeats, and seconds without one after which a run
# counts as dead. If two runs start at once, the last write wins, so each waits
# SETTLE seconds and then reads the file.
BEAT, LEASE, SETTLE = 15.0, 60.0, 3.0


@contextlib.contextmanager
def acquire(
  directory: os.PathLike[str] | str,
) -> Iterator[Callable[[], bool]]:
  """Locks a MODEL_DIR for this run; process 0 does so for all processes.

  Args:
    directory: MODEL_DIR, which must exist.

  Yields:
    A function that tells whether the directory and the lock file are still the
    ones that we opened, and not others of the same names. On a bucket it always
    returns True.

  Raises:
    ValueError: If another run has locked it; names that run.
  """
  if jax.process_index() != 0:
    yield lambda: True
    return
  path = epath.Path(directory) / FILE
  remote = '://' in os.fspath(path)
  opened: dict[epath.Path, os.stat_result] = {}
  with contextlib.ExitStack() as stack:
    if not remote:
      opened[path.parent] = os.stat(path.parent)
    try:
      if remote:
        stack.enter_context(_leased(path))
      else:
        opened[path] = stack.enter_context(_locked(path))
    except OSError as error:  # A file system without locks.
      if remote:
        raise
      logging.warning('%s cannot be locked (%s)', path, error)
      stack.enter_context(_leased(path))
    yield lambda: all(_is_same(place, opened[place]) for place in opened)


def _is_same(path: epath.Path, before: os.stat_result) -> bool:
  try:
    return os.path.samestat(before, os.stat(path))
  except OSError as error:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
      return False
    raise


def _owner() -> dict[str, Any]:
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'since': time.strftime('%Y-%m-%d %H:%M:%S %Z'),
    'command': shlex.join(sys.argv)[:1000],
  }


def _refusal(path: epath.Path, text: str, otherwise: str) -> ValueError:
  try:
    owner = json.loads(text)
    who = 'process {pid} on host {host}, since {since}'.format(**owner)
  except (ValueError, KeyError, TypeError):  # It was written just now.
    who = f'another process, which {path} names'
  return UserError(
    f'MODEL_DIR {path.parent} is in use by {who}. Nothing was changed. Wait'
    f' for it, or stop it with SIGTERM; {otherwise}. For a run of its own,'
    ' choose another MODEL_DIR'
  )


@contextlib.contextmanager
def _locked(path: epath.Path) -> Iterator[os.stat_result]:
  """Holds a lock of the operating system; yields the identity of its file."""
  while True:
    file = open(path, 'a+')  # Closing it releases the lock.
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      with file:
        raise _refusal(
          path,
          file.read(),
          'a dead run holds no lock, but a hanging one does: stop it with kill'
          ' -9',
        ) from None
    except OSError:
      file.close()
      raise
    try:  # The run that held the lock may have deleted the file just now.
      if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        break
    except FileNotFoundError:
      pass
    file.close()
  with file:
    file.truncate(0)
    file.write(json.dumps(_owner()) + '\n')
    file.flush()
    ours = os.fstat(file.fileno())
    try:
      yield ours
    finally:
      if _is_same(path, ours):  # It may be a later run's.
        path.unlink()


@contextlib.contextmanager
def _leased(path: epath.Path) -> Iterator[None]:
  """Holds a lock by writing heartbeats to a file."""
  owner = {**_owner(), 'token': secrets.token_hex(8)}
  _wait_until_dead(path)
  _write(path, owner, 0)
  time.sleep(SETTLE)
  if not _is_ours(text := _read(path), owner):
    raise _refusal(path, text, f'if it is dead, this takes {LEASE:g} s')
  ended = threading.Event()

  def live():
    beat = 0
    while not ended.wait(BEAT):
      beat += 1
      try:
        text = _read(path)
        if text and not _is_ours(text, owner):
          # We could not reach the file for so long that another run started.
          # If both wrote, both would be corrupted.
          message = str(_refusal(path, text, 'it took over from this one'))
          os.write(2, f'ptune: {message}\n'.encode())
          os._exit(1)
        _write(path, owner, beat)
      except Exception as error:  # A bucket can raise anything: try again.
        logging.warning('%s cannot be renewed: %s', path, error)

  thread = threading.Thread(target=live, name='ptune-lease', daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    if _is_ours(_read(path), owner):
      path.unlink(missing_ok=True)


def _wait_until_dead(path: epath.Path) -> None:
  """Returns if no other run writes heartbeats; else raises ValueError."""
  if not path.exists():
    return
  first = _read(path)  # '' if the other run is writing it just now.
  logging.info(
    '%s is there: waiting up to %g s to see whether its run is alive',
    path,
    LEASE,
  )
  # We look for a change, not at the time in the file, because clocks differ.
  end = time.monotonic() + LEASE
  while time.monotonic() < end:
    time.sleep(min(BEAT, LEASE) / 5)
    if not path.exists():
      return
    if (text := _read(path)) not in (first, ''):
      raise _refusal(
        path,
        text,
        f'if it dies, the same command takes over within {LEASE:g} s',
      )
  logging.warning('the run that held %s is dead: taking over', path)


def _read(path: epath.Path) -> str:
  try:
    return path.read_text()
  except FileNotFoundError:
    return ''


def _write(path: epath.Path, owner: dict[str, Any], beat: int) -> None:
  path.write_text(json.dumps({**owner, 'beat': beat}) + '\n')


def _is_ours(text: str, owner: dict[str, Any]) -> bool:
  return owner['token'] in text
