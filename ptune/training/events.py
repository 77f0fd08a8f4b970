"""Writes TensorBoard's event files without TensorFlow."""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from ptune.convert import storage


def open_events(directory: os.PathLike[str] | str) -> Any:
  """Opens a writer with `write_scalars(step, scalars)`, `flush` and `close`.

  On gs:// this is clu's writer, which loads TensorFlow.
  """
  local = storage.local(directory)
  if local is not None:
    return Events(local)
  from clu import metric_writers

  return metric_writers.SummaryWriter(os.fspath(directory))


class Events:
  """An event file in a local directory."""

  def __init__(self, directory: str):
    """Opens a new file; TensorBoard reads all files of a directory."""
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    os.makedirs(directory, exist_ok=True)
    name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}'
    self._events, self._summaries = event_pb2, summary_pb2
    path = os.path.join(directory, f'{name}.{os.getpid()}')
    self._records = RecordWriter(open(path, 'wb'))
    self._write(file_version='brain.Event:2')

  def _write(self, **fields: Any) -> None:
    event = self._events.Event(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends scalars, by tag."""
    values = [
      self._summaries.Summary.Value(tag=tag, simple_value=value)
      for tag, value in scalars.items()
    ]
    self._write(step=step, summary=self._summaries.Summary(value=values))

  def flush(self) -> None:
    """Passes the written events to the operating system."""
    self._records.flush()

  def close(self) -> None:
    """Closes the file."""
    self._records.close()
