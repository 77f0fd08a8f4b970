"""The records of a run: a bar, metrics.jsonl, TensorBoard and curves.png."""

import contextlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from etils import epath

from ptune.host.files import to_disk, write_atomically
from ptune.training import events, progress

if TYPE_CHECKING:
  from ptune.training.trackers import Tracker

Record = dict[str, Any]


def read_records(model_dir: os.PathLike[str]) -> list[Record]:
  """Reads metrics.jsonl; skips a last line that a kill left incomplete."""
  path = epath.Path(model_dir) / 'metrics.jsonl'
  if not path.exists():
    return []
  records = []
  for line in path.read_text().splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      break
    records.append({k: np.nan if v is None else v for k, v in record.items()})
  return records


def to_json(record: Mapping[str, Any]) -> str:
  """Converts a record to one line of JSON.

  A record may hold anything, such as bytes and NumPy values. JSON has no NaN
  and no infinity: they become null, with a warning.
  """

  def plain(value):
    if isinstance(value, np.ndarray | np.generic):
      value = value.tolist()
    if isinstance(value, bytes):
      return value.decode('utf-8', errors='replace')
    if isinstance(value, Mapping):
      return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
      return [plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
      logging.log_first_n(
        logging.WARNING,
        'a score is %s; it is written as null, because JSON has no such number'
        ' (this is logged once)',
        1,
        value,
      )
      return None
    simple = value is None or isinstance(value, str | int | float)
    return value if simple else str(value)

  return json.dumps(plain(record), ensure_ascii=False, allow_nan=False)


def numbers(scores: Mapping[str, Any]) -> dict[str, float]:
  """The scores that are plain numbers, as floats."""
  found = {}
  for name, value in scores.items():
    value = getattr(value, 'value', value)  # A clu or SeqIO scalar.
    if np.ndim(value) == 0 and np.issubdtype(
      np.asarray(value).dtype, np.number
    ):
      found[name] = float(value)
  return found


def format_scores(scores: Mapping[str, float]) -> str:
  """'accuracy 91.2, loss 0.34'."""
  return ', '.join(f'{name} {value:.4g}' for name, value in scores.items())


def evaluated_steps(records: Iterable[Record]) -> list[int]:
  """The steps that have scores."""
  return sorted({r['step'] for r in records if 'task' in r})


def scores_at(
  records: Iterable[Record], step: int
) -> dict[str, dict[str, float]]:
  """The scores recorded at a step, by task; empty if there are none."""
  return {
    r['task']: {
      k: v for k, v in r.items() if k not in ('step', 'split', 'task')
    }
    for r in records
    if r['step'] == step and 'task' in r
  }


def write_records(
  model_dir: os.PathLike[str], records: Iterable[Record]
) -> None:
  """Replaces the content of metrics.jsonl by these records."""
  text = ''.join(to_json(record) + '\n' for record in records)
  write_atomically(epath.Path(model_dir) / 'metrics.jsonl', text)


class Report:
  """Writes and shows the records of one run while it trains.

  As a context manager, it always restores the terminal, and draws curves.png if
  no error occurred.
  """

  def __init__(
    self,
    model_dir: os.PathLike[str],
    start_step: int,
    total_steps: int,
    batch_size: float,
    write: bool = True,
    name: str = '',
    tracker: 'Tracker | None' = None,
    curves: bool = True,
  ):
    """Continues the records of a directory from a step.

    Args:
      model_dir: The directory.
      start_step: The restored step. Later records are deleted, because these
        steps are repeated.
      total_steps: The last step.
      batch_size: The examples in a step, to compute their rate.
      write: Whether this process writes files (process 0 does).
      name: The name of one of several runs, which the log then shows. Several
        runs have no progress bar.
      tracker: Also gets every record.
      curves: Whether to draw curves.png.
    """
    self._dir = epath.Path(model_dir)
    self._write, self._tracker, self._curves = write, tracker, curves
    self._name = f'{name}: ' if name else ''
    self._batch_size = batch_size
    self.records = [
      r for r in read_records(model_dir) if r['step'] <= start_step
    ]
    self._writers: dict[str, Any] = {}
    if write:
      write_records(self._dir, self.records)
    for record in self.records:  # The tracker may not have all of them.
      self._track(record)
    self._time, self._step = time.monotonic(), start_step
    self._shown = ''
    # Several runs at once have no bar.
    self._bar = (
      None if name or not write else progress.bar(total_steps, start_step)
    )

  def __enter__(self) -> 'Report':
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if self._bar is not None:
      self._bar.stop()
    for writer in self._writers.values():
      # If an error is being raised already, another one would add nothing.
      with contextlib.suppress(*([Exception] if kind else [])):
        writer.close()
    drawn = self._write and self._curves and kind is None
    if drawn and self.records:
      plot(self.records, self._dir / 'curves.png')

  def train(self, step: int, sums: Mapping[str, float]) -> None:
    """Records training up to `step`.

    Args:
      step: Steps taken.
      sums: `loss`, `z_loss`, `correct` and `tokens`, summed over the steps
        since the last record. Other values are recorded as they are.
    """
    values = self._values(step, sums)
    self._step, self._time = step, time.monotonic()
    self._add([{'step': step, 'split': 'train', **values}])
    if self._bar is None:
      logging.info('%sstep %d  %s', self._name, step, _shown(values))
    else:
      self._show(_shown(values), step)

  def progress(self, step: int, sums: Mapping[str, float]) -> None:
    """Moves the progress bar, if there is one; see `train`."""
    if self._bar is not None:
      self._show(_shown(self._values(step, sums)), step)

  def _show(self, shown: str, step: int | None = None) -> None:
    if self._bar is not None:
      self._shown = shown
      self._bar.update(step, shown)

  def _values(self, step: int, sums: Mapping[str, float]) -> dict[str, float]:
    # Count only steps of this start, because earlier ones were not timed.
    steps = max(step - self._step, 1)
    seconds = max(time.monotonic() - self._time, 1e-9)
    tokens = max(sums['tokens'], 1.0)
    others = {
      k: v
      for k, v in sums.items()
      if k not in ('loss', 'z_loss', 'correct', 'tokens')
    }
    return {
      'loss': sums['loss'] / tokens,
      'z_loss': sums['z_loss'] / tokens,
      'accuracy': sums['correct'] / tokens,
      **others,
      'seconds_per_step': seconds / steps,
      'examples_per_second': steps * self._batch_size / seconds,
    }

  def evaluate(
    self, step: int, split: str, scores: Mapping[str, Mapping[str, float]]
  ) -> None:
    """Records the scores of all tasks, in one write."""
    self._add(
      [
        {'step': step, 'split': split, 'task': task, **values}
        for task, values in scores.items()
      ]
    )
    for task, values in scores.items():
      shown = format_scores(values)
      logging.info('%sstep %d  %s %s: %s', self._name, step, task, split, shown)

  @contextlib.contextmanager
  def paused(self, doing: str) -> Iterator[None]:
    """Excludes the time spent inside from the reported training rate."""
    start, before = time.monotonic(), self._shown
    self._show(doing)
    try:
      yield
    finally:
      self._time += time.monotonic() - start
      self._show(before)

  def _add(self, records: Sequence[Record]) -> None:
    self.records.extend(records)
    if not self._write:
      return
    with (self._dir / 'metrics.jsonl').open('a') as f:
      f.write(''.join(to_json(r) + '\n' for r in records))
      to_disk(f)
    for record in records:
      name = _directory(record)
      if name not in self._writers:
        self._writers[name] = events.open_events(self._dir / name)
      self._writers[name].write_scalars(record['step'], _scalars(record))
      self._writers[name].flush()
      self._track(record)

  def _track(self, record: Record) -> None:
    """Sends a record to the tracker, if there is one."""
    if self._tracker is not None:
      place = _directory(record)
      named = {f'{place}/{k}': v for k, v in _scalars(record).items()}
      self._tracker.log(record['step'], named)


def _directory(record: Record) -> str:
  """The directory of a record's events: 'train' or 'eval/<task>'."""
  return f'eval/{record["task"]}' if 'task' in record else 'train'


def _scalars(record: Record) -> dict[str, float]:
  return numbers({k: v for k, v in record.items() if k != 'step'})


def _shown(values: Mapping[str, float]) -> str:
  return (
    f'loss {values["loss"]:.4f}  accuracy {values["accuracy"]:.3f}'
    f'  {values["examples_per_second"]:.1f} examples/s'
  )


def plot(records: Sequence[Record], path: epath.Path) -> None:
  """Writes the figure of `draw` as a PNG."""
  drawn = io.BytesIO()
  draw(records).savefig(drawn, format='png', dpi=120)
  write_atomically(path, drawn.getvalue())


def draw(records: Sequence[Record]) -> Any:
  """Draws the training loss and the evaluation scores against the step.

  Returns:
    A `matplotlib.figure.Figure`.
  """
  # We use Figure, because pyplot looks for a display and has global state.
  from matplotlib import figure

  train = [r for r in records if r['split'] == 'train']
  scores: dict[str, list[tuple[int, float]]] = {}
  for r in records:
    for name, value in numbers(r).items():
      if 'task' in r and name not in ('step', 'loss'):
        if name == 'token_accuracy':  # Other metrics range from 0 to 100.
          name, value = 'token_accuracy, %', 100 * value
        scores.setdefault(f'{r["task"]} {name}', []).append((r['step'], value))
  fig = figure.Figure(figsize=(9, 3.2), layout='constrained')
  left, right = fig.subplots(1, 2)
  left.plot(
    [r['step'] for r in train], [r['loss'] for r in train], label='train'
  )
  held_out = [r for r in records if 'task' in r and 'loss' in r]
  for task in sorted({r['task'] for r in held_out}):
    chosen = [r for r in held_out if r['task'] == task]
    left.plot(
      [r['step'] for r in chosen],
      [r['loss'] for r in chosen],
      marker='.',
      label=f'{task} {chosen[0]["split"]}',
    )
  left.set(xlabel='step', ylabel='loss per token')
  left.legend(fontsize='small')
  for name, points in sorted(scores.items()):
    right.plot(*zip(*points, strict=True), marker='.', label=name)
  right.set(xlabel='step', ylabel='score')
  for axes in (left, right):
    axes.xaxis.get_major_locator().set_params(integer=True)  # No step 2.5.
  if scores:
    right.legend(fontsize='small')
  else:
    right.set_axis_off()
  return fig
