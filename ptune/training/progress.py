"""The progress bar of a run, in a terminal or in a notebook."""

import contextlib
import warnings
from typing import Protocol

import rich.console
import rich.progress


class Bar(Protocol):
  """A progress bar with a text beside it."""

  def start(self) -> None: ...

  def stop(self) -> None: ...

  def update(self, step: int | None = None, shown: str | None = None) -> None:
    """Moves to a step, or shows another text; None changes nothing."""
    ...


def bar(total: int, start: int) -> Bar | None:
  """The bar of a run with `total` steps; None if stderr is not a terminal."""
  console = rich.console.Console(stderr=True)
  if console.is_jupyter:
    return _Notebook(total, start)
  if console.is_terminal and not console.is_dumb_terminal:
    return _Terminal(console, total, start)
  return None


class _Terminal:
  """A bar of rich; log lines appear above it."""

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
  """A bar of tqdm: a widget if ipywidgets is installed, else a line of text."""

  def __init__(self, total: int, start: int):
    with warnings.catch_warnings():  # tqdm warns if there are no widgets.
      warnings.simplefilter('ignore')
      from tqdm.auto import tqdm

      self._bar = tqdm(total=total, initial=start, unit='step')

  def start(self) -> None:
    pass

  def stop(self) -> None:
    with contextlib.suppress(AttributeError):  # The widget may be closed.
      self._bar.close()

  def update(self, step: int | None = None, shown: str | None = None) -> None:
    if step is not None:
      self._bar.update(step - self._bar.n)
    if shown is not None:
      self._bar.set_postfix_str(shown)
