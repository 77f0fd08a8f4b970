"""A line that shows how far a run is: in a terminal, or in a notebook."""

import contextlib
import warnings
from typing import Protocol

import rich.console
import rich.progress


class Bar(Protocol):
  """How far a run is, and what is told beside it."""

  def start(self) -> None: ...

  def stop(self) -> None: ...

  def update(self, step: int | None = None, shown: str | None = None) -> None:
    """Moves to a step, or tells something else; what is None stays."""
    ...


def bar(total: int, start: int) -> Bar | None:
  """The line of a run that takes `total` steps; None if nobody sees it."""
  console = rich.console.Console(stderr=True)
  if console.is_jupyter:
    return _Notebook(total, start)
  if console.is_terminal and not console.is_dumb_terminal:
    return _Terminal(console, total, start)
  return None


class _Terminal:
  """A bar of rich, which log lines pass by."""

  def __init__(self, console: rich.console.Console, total: int, start: int):
    self._bar = rich.progress.Progress(
      rich.progress.BarColumn(bar_width=24),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn('{task.fields[shown]}'),
      rich.progress.TimeRemainingColumn(),
      console=console,
    )
    self._task = self._bar.add_task(
      'training', total=total, completed=start, shown=''
    )

  def start(self) -> None:
    self._bar.start()

  def stop(self) -> None:
    self._bar.stop()

  def update(self, step: int | None = None, shown: str | None = None) -> None:
    if shown is None:
      self._bar.update(self._task, completed=step)
    else:
      self._bar.update(self._task, completed=step, shown=shown)


class _Notebook:
  """A bar of tqdm: a widget if ipywidgets is there, and else a line of text."""

  def __init__(self, total: int, start: int):
    with warnings.catch_warnings():  # That there are no widgets.
      warnings.simplefilter('ignore')
      from tqdm.auto import tqdm

      self._bar = tqdm(total=total, initial=start, unit='step')

  def start(self) -> None:
    pass

  def stop(self) -> None:
    with contextlib.suppress(AttributeError):  # Of a widget that is gone.
      self._bar.close()

  def update(self, step: int | None = None, shown: str | None = None) -> None:
    if step is not None:
      self._bar.update(step - self._bar.n)
    if shown is not None:
      self._bar.set_postfix_str(shown)
