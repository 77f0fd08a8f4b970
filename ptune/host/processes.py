"""The processes of one run: they join, and learn at once that one is gone.

A process that waits for a dead one in a collective waits for ever. JAX's
heartbeats notice, after a while, and end it with a C++ trace that may not say
who is gone. So each process also holds a TCP connection to process 0. The
kernel closes it when a process ends, in whatever way, and gives it up when the
machine does not answer; process 0 tells the others. All of them then leave:
a run goes on from its last checkpoint when it is started again.
"""

import json
import logging as python_logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time

# Seconds without a sign of life, after which a process counts as lost: by
# JAX's heartbeats, which also see one that stands still, and by TCP.
SILENCE = 40
# What a process gets to leave by itself when another said that it leaves.
GRACE = 5
_KEEP_ALIVE = {'TCP_KEEPIDLE': 15, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 4}
_RECORD = 512  # Bytes in which a process introduces itself.

_watch: '_Watch | None' = None


def join(
  coordinator_address: str | None = None,
  count: int | None = None,
  index: int | None = None,
) -> None:
  """Joins the processes of a run, and watches them from then on.

  Args:
    coordinator_address: host:port of process 0; found by JAX on TPUs, SLURM
      and Kubernetes if not given, as are the others.
    count: How many processes there are.
    index: Which one this is.

  Raises:
    OSError: If they do not come together.
  """
  import jax  # Not at the top: the command line is read without it.

  try:
    jax.distributed.initialize(
      coordinator_address,
      count,
      index,
      heartbeat_timeout_seconds=SILENCE,
      shutdown_timeout_seconds=SILENCE,
    )
  except (RuntimeError, ValueError) as error:  # Of its C++, or its checks.
    reason = str(error).split('\n')[0]
    raise OSError(
      f'the processes cannot join: {reason}. Look at --coordinator_address'
      ' (host:port of process 0), --process_count and --process_index, or run'
      ' without --multiprocess'
    ) from error
  if jax.process_count() > 1:
    global _watch
    _watch = _Watch(coordinator_address)


def leave(status: int) -> int:
  """Says good-bye to the other processes, before the end of this one.

  Does not return in one of several processes that has failed: the usual way
  out would wait there for the others, and they for it.

  Args:
    status: The exit status.

  Returns:
    The exit status.
  """
  if _watch is not None:
    _watch.leave('left' if status == 0 else f'ended {status}')
    if status:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)
  return status


def leave_early(status: int) -> None:
  """Says that this process ends before the run does, so that all do."""
  if _watch is not None:
    _watch.leave(f'ended {status}')


def several() -> bool:
  """Whether this process has joined others."""
  return _watch is not None


def wait_for_news() -> None:
  """Ends the process if another one is lost; called after an error.

  An error of a collective may be the first sign of that.
  """
  if _watch is not None:
    _watch.gone.wait(GRACE)
    if _watch.gone.is_set():
      threading.Event().wait()  # The watching thread tells it, and ends us.


class _Watch:
  """Connections of process 0 with all others, and the thread that reads them.

  A line says how the process at the other end is: `left` when it has finished,
  `ended 1` when it ends before that, with its exit status. A connection that
  ends without either tells of a process that was killed. Process 0 passes it
  on: `ended 1 TEXT`, `gone 1 TEXT`.
  """

  def __init__(self, coordinator_address: str | None):
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    self.gone = threading.Event()
    self._index = jax.process_index()
    self._sockets: dict[socket.socket, int] = {}
    self._left = False
    host = socket.gethostname()
    name = f'process {self._index} (host {host}, pid {os.getpid()})'
    mine = {'name': name, 'host': host}
    server = None
    if self._index == 0:
      server = _listen()
      # Of all that may connect to a port, only who knows the token is heard.
      mine |= {'port': server.getsockname()[1], 'token': secrets.token_hex(8)}
    record = json.dumps(mine).encode().ljust(_RECORD)
    gathered = multihost_utils.process_allgather(np.frombuffer(record, 'u1'))
    everyone = [json.loads(bytes(row.astype('u1'))) for row in gathered]
    self._names = [other['name'] for other in everyone]
    first = everyone[0]
    try:
      if server is not None:
        self._accept(server, first['token'], len(everyone) - 1)
      else:
        address = first['host']
        if coordinator_address is not None:
          address = coordinator_address.rsplit(':', 1)[0].strip('[]')
        self._connect(address, first['port'], first['token'])
    except OSError as error:
      python_logging.getLogger(__name__).warning(
        '%s and process 0 have no connection (%s): that one of them is gone'
        ' is noticed after %d s only',
        name if server is None else 'some processes',
        error,
        SILENCE,
      )
    threading.Thread(target=self._read, name='ptune-watch', daemon=True).start()

  def leave(self, word: str) -> None:
    """Tells the others how this process ends, once."""
    if not self._left:
      self._left = True
      self._tell(word)
      if word != 'left':
        self._linger()

  def _linger(self) -> None:
    """Lets the others end first, if this is process 0.

    With it goes the service of JAX, without which their C++ ends them before
    they can say why.
    """
    deadline = time.monotonic() + GRACE + 2
    for other in self._sockets if self._index == 0 else ():
      try:
        other.settimeout(max(deadline - time.monotonic(), 0.01))
        while other.recv(4096):
          pass
      except OSError:  # Time is up, or it is gone.
        continue

  def _tell(self, word: str, but: socket.socket | None = None) -> None:
    for other in self._sockets:
      if other is not but:
        try:
          other.sendall(word.encode() + b'\n')
        except OSError:  # It is gone as well.
          continue

  def _accept(self, server: socket.socket, token: str, count: int) -> None:
    deadline = time.monotonic() + SILENCE
    with server:
      while len(self._sockets) < count:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        other, _ = server.accept()
        try:
          other.settimeout(GRACE)
          index, given = other.makefile().readline().split()
          if not secrets.compare_digest(given, token):
            raise ValueError
        except (OSError, ValueError):
          other.close()
          continue
        self._add(other, int(index))

  def _connect(self, host: str, port: int, token: str) -> None:
    other = socket.create_connection((host, port), timeout=SILENCE)
    other.sendall(f'{self._index} {token}\n'.encode())
    self._add(other, 0)

  def _add(self, other: socket.socket, index: int) -> None:
    other.settimeout(None)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE.items():
      if hasattr(socket, option):
        other.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    self._sockets[other] = index

  def _read(self) -> None:
    with selectors.DefaultSelector() as selector:
      for other in self._sockets:
        selector.register(other, selectors.EVENT_READ)
      while selector.get_map():
        for key, _ in selector.select():
          other = key.fileobj
          assert isinstance(other, socket.socket)
          try:
            line = other.recv(4096).decode()
          except OSError:
            line = ''
          if not line.startswith('left'):
            self._end(other, line)
          selector.unregister(other)

  def _end(self, other: socket.socket, line: str) -> None:
    """Ends this process because of another one, and tells the rest."""
    name = self._names[self._sockets[other]]
    word, _, rest = line.strip().partition(' ')
    status, _, text = rest.partition(' ')
    if not word:
      word, status = 'gone', '1'
      text = f'{name} is gone: it was killed, or its host was'
    text = text or f'{name} ended with exit status {status}; see its output'
    if self._left:
      return
    self.gone.set()
    self._tell(f'{word} {status} {text}', but=other)
    if word == 'ended':
      # Of its own will: this process may be about to do the same.
      time.sleep(GRACE)
      if self._left:
        return
    os.write(
      2,
      f'ptune: {text}. {self._names[self._index]} ends too; when all have'
      ' ended, the same command goes on\n'.encode(),
    )
    self._linger()
    os._exit(int(status))


def _listen() -> socket.socket:
  if socket.has_dualstack_ipv6():
    return socket.create_server(
      ('', 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
    )
  return socket.create_server(('', 0), backlog=1024)
