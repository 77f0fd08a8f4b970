"""Experiment trackers: programs that plot the metrics of many runs (TRACKER).

    wandb     Weights & Biases; WANDB_MODE=offline keeps all on this machine
    trackio   open source, in Hugging Face's cache or TRACKIO_DIR;
              `trackio show` opens its page

A tracker gets the numbers of metrics.jsonl, named `train/loss` or
`eval/<task>/accuracy`, in one row a step. MODEL_DIR/tracker.json holds the
tracker's name of the run, so a restarted run continues the same run in the
tracker. A tracker may have lost the last rows of a start that was killed, so a
restart sends all rows that the tracker does not have.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from ptune.errors import UserError, nearest
from ptune.host.files import write_atomically

TRACKERS = ('trackio', 'wandb')
FILE = 'tracker.json'


def check(name: str | None) -> None:
  """Raises UserError unless a tracker of this name is installed."""
  if name is None:
    return
  if name not in TRACKERS:
    raise UserError(f'TRACKER is {name!r}{nearest(name, TRACKERS)}')
  if importlib.util.find_spec(name) is None:
    raise UserError(
      f'TRACKER is {name!r}, which is not installed: pip install'
      f' "ptune[{name}]"'
    )


class Tracker:
  """A run in a tracker."""

  def __init__(
    self, name: str, model_dir: os.PathLike[str], config: Mapping[str, Any]
  ):
    """Continues the tracker's run for a directory, or starts one.

    Args:
      name: One of TRACKERS.
      model_dir: The existing directory of the run.
      config: The settings that the tracker shows.

    Raises:
      UserError: If the tracker cannot start, for example without a login.
    """
    check(name)
    directory = epath.Path(model_dir)
    self._file, self._name = directory / FILE, name
    self._step, self._row = 0, dict[str, float]()
    self._known = {}
    if self._file.exists():
      self._known = json.loads(self._file.read_text())
    new = secrets.token_hex(4)
    known = self._known.setdefault(
      name, {'id': new, 'name': f'{directory.name}-{new}', 'step': 0}
    )
    self._write()
    module = importlib.import_module(name)
    settings: dict[str, Any] = {}
    if name == 'wandb':
      # A start that was killed leaves a part of its rows in a file of its own,
      # which would be uploaded beside ours.
      if left := known.get('unfinished'):
        place = directory / 'wandb' / left
        if not any(place.glob('*.synced')):  # Nobody has uploaded it.
          shutil.rmtree(place, ignore_errors=True)
      settings['id'] = known['id']
      settings['dir'] = os.fspath(directory)
      settings['reinit'] = 'create_new'  # Several runs may share a process.
      settings['settings'] = module.Settings(silent=True)
    else:
      settings['auto_log_cpu'] = settings['auto_log_gpu'] = False
      settings['embed'] = False
    try:
      # Trackio prints the address of its pages; stdout is for results.
      with contextlib.redirect_stdout(sys.stderr):
        self._run = module.init(
          project=os.environ.get(f'{name.upper()}_PROJECT', 'ptune'),
          name=known['name'],
          config=dict(config),
          resume='allow',
          **settings,
        )
    except Exception as error:
      raise UserError(
        f'TRACKER {name!r} cannot start a run: {error}. Log in as its'
        ' documentation says, or leave TRACKER out'
      ) from error
    # Both trackers tell the step after the last one that they have. Offline,
    # Weights & Biases does not know it.
    if name == 'wandb':
      following = self._run.starting_step
      place = pathlib.Path(self._run.dir).parent
      offline = place.name.startswith('offline-run-')
      known['unfinished'] = place.name if offline else None
      self._write()
    else:
      following = self._run._next_step
    self._sent = max(known['step'], following - 1)

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Adds numbers to the row of a step, unless the tracker has that row.

    The row is sent when the next step begins: a run that stops during an
    evaluation repeats it, and a tracker takes no second row of a step.
    """
    if step <= self._sent:
      return
    if step != self._step:
      self.send()
    self._step = step
    self._row |= values

  def send(self) -> None:
    """Sends the row of the last step, to which nothing will be added."""
    if self._row:
      self._run.log(self._row, step=self._step)
      self._sent, self._row = self._step, {}

  def close(self) -> None:
    """Waits until everything is sent."""
    with contextlib.redirect_stdout(sys.stderr):
      self._run.finish()
    self._known[self._name] |= {'step': self._sent, 'unfinished': None}
    self._write()

  def _write(self) -> None:
    write_atomically(self._file, json.dumps(self._known) + '\n')
