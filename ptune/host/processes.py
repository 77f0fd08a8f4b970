"""The processes of one run: joining, and noticing at once if one is gone.

If a process dies, the others would wait for it forever in a collective
operation. JAX's heartbeats notice this after a while and end the processes with
a C++ trace that may not name the dead one. So each process also keeps a TCP
connection to process 0. The kernel closes the connection when a process ends in
any way, or when its machine does not answer. Process 0 then tells the others,
and all of them exit. After a restart, the run resumes from its last checkpoint.
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

# A process counts as lost after this many seconds without a JAX heartbeat,
# which also detects a hanging process, or without an answer over TCP.
SILENCE = 40
# Seconds that a process has to exit by itself after another one exited.
GRACE = 5
_KEEP_ALIVE = {'TCP_KEEPIDLE': 15, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 4}
_RECORD = 512  # Bytes of a process' description of itself.

_watch: '_Watch | None' = None


def join(
  coordinator_address: str | None = None,
  count: int | None = None,
  index: int | None = None,
) -> None:
  """Joins the processes of a run, and watches them from then on.

  If no arguments are given, JAX finds them on TPUs, SLURM and Kubernetes.

  Args:
    coordinator_address: host:port of process 0.
    count: The number of processes.
    index: The index of this process.

  Raises:
    OSError: If the processes cannot join.
  """
  import jax  # Not at the top, because parsing the command line needs no JAX.

  try:
    jax.distributed.initialize(
      coordinator_address,
      count,
      index,
      heartbeat_timeout_seconds=SILENCE,
      shutdown_timeout_seconds=SILENCE,
    )
  # From C++, or from a check of JAX's.
  except (RuntimeError, ValueError) as error:
    reason = str(error).split('\n')[0]
    raise OSError(
      f'the processes cannot join: {reason}. Check --coordinator_address'
      ' (host:port of process 0), --process_count and --process_index, or run'
      ' without --multiprocess'
    ) from error
  if jax.process_count() > 1:
    global _watch
    _watch = _Watch(coordinator_address)


def leave(status: int) -> int:
  """Tells the other processes that this one ends.

  If this process failed and is one of several, this function exits the process
  itself: a normal exit would wait for the others, and they for it.

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
  """Tells the others that this process ends early, so that all end."""
  if _watch is not None:
    _watch.leave(f'ended {status}')


def several() -> bool:
  """Whether this process has joined others."""
  return _watch is not None


def wait_for_news() -> None:
  """After an error, ends this process if another one is lost.

  An error in a collective operation may be the first sign of a lost process.
  """
  if _watch is not None:
    _watch.gone.wait(GRACE)
    if _watch.gone.is_set():
      threading.Event().wait()  # The watching thread ends this process.


class _Watch:
  """Connections between process 0 and all others, and the thread reading them.

  A process sends `left` when it has finished, and `ended 1` with its exit
  status when it ends early. If a connection closes without such a line, the
  process was killed. Process 0 passes the message on: `ended 1 TEXT` or
  `gone 1 TEXT`.
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
      # Anyone may connect to the port, so processes identify by a token.
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
        '%s and process 0 have no connection (%s): if one of them dies, the'
        ' other notices only after %d s',
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
    """If this is process 0, waits until the others have ended.

    Process 0 hosts JAX's coordination service. Without it, JAX's C++ code ends
    the others before they can print the reason.
    """
    deadline = time.monotonic() + GRACE + 2
    for other in self._sockets if self._index == 0 else ():
      try:
        other.settimeout(max(deadline - time.monotonic(), 0.01))
        while other.recv(4096):
          pass
      except OSError:  # The time is over, or the process has ended.
        continue

  def _tell(self, word: str, but: socket.socket | None = None) -> None:
    for other in self._sockets:
      if other is not but:
        try:
          other.sendall(word.encode() + b'\n')
        except OSError:  # This process has ended, too.
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
    """Ends this process because another one ended, and tells the rest."""
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
      # The other process ended on its own; this one may be about to end, too.
      time.sleep(GRACE)
      if self._left:
        return
    os.write(
      2,
      f'ptune: {text}. {self._names[self._index]} ends too; when all have'
      ' ended, the same command resumes\n'.encode(),
    )
    self._linger()
    os._exit(int(status))


def _listen() -> socket.socket:
  if socket.has_dualstack_ipv6():
    return socket.create_server(
      ('', 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
    )
  return socket.create_server(('', 0), backlog=1024)
