"""One run at a time in a MODEL_DIR.

On a file system of the machine, or of a cluster (NFS), the operating system
holds the lock: it ends with the process that has it, however that ends, so a
run that was killed is never in its own way. A bucket has no such locks. There
the run writes a sign of life every few seconds; another start waits to see
whether one comes, and takes over if none does.
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
# Seconds: between two signs of life, and without one until a run counts as
# dead. What is written last wins; SETTLE is for two starts at the same time.
BEAT, LEASE, SETTLE = 15.0, 60.0, 3.0


@contextlib.contextmanager
def acquire(
  directory: os.PathLike[str] | str,
) -> Iterator[Callable[[], bool]]:
  """Holds a MODEL_DIR for this run; process 0 does it for all of them.

  Args:
    directory: MODEL_DIR; must exist.

  Yields:
    What tells whether the directory of that name, and the lock in it, are still
    those that were opened here. A bucket has no such identity.

  Raises:
    ValueError: If another run holds it; says which.
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
  """Holds a lock of the operating system; yields which file has it."""
  while True:
    file = open(path, 'a+')  # To close it ends the lock.
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      with file:
        raise _refusal(
          path,
          file.read(),
          'if it is dead, so is its lock, but if it hangs, kill -9 it',
        ) from None
    except OSError:
      file.close()
      raise
    try:  # Whoever held it before may have just deleted the file.
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
      if _is_same(path, ours):  # And not that of a run in its place.
        path.unlink()


@contextlib.contextmanager
def _leased(path: epath.Path) -> Iterator[None]:
  """Holds a file by signs of life."""
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
          # It could not be reached for so long that another run began. Two
          # that write would spoil both.
          message = str(_refusal(path, text, 'it took over from this one'))
          os.write(2, f'ptune: {message}\n'.encode())
          os._exit(1)
        _write(path, owner, beat)
      except Exception as error:  # Whatever a bucket may raise: once more.
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
  """Returns if no other run shows signs of life, else raises ValueError."""
  if not path.exists():
    return
  first = _read(path)  # Perhaps '', while it is being written.
  logging.info(
    '%s is there: waiting up to %g s to see whether its run is alive',
    path,
    LEASE,
  )
  # By what changes, not by the time that is written there: clocks differ.
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
