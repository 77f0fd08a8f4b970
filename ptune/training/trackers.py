"""Experiment trackers: programs that plot the metrics of many runs (TRACKER).

    wandb     Weights & Biases; WANDB_MODE=offline keeps all on this machine
    trackio   open source, in Hugging Face's cache or TRACKIO_DIR;
              `trackio show` opens its page

A tracker gets the numbers of metrics.jsonl, named `train/loss` or
`eval/<task>/accuracy`. The file MODEL_DIR/tracker.json holds the tracker's id
of the run and the last step that was sent, so a restarted run continues the
same run in the tracker.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import secrets
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
    known = {'id': secrets.token_hex(4), 'step': 0}
    if self._file.exists():
      known |= json.loads(self._file.read_text()).get(name, {})
    self._id, self._sent = known['id'], known['step']
    self._note(self._sent)
    module = importlib.import_module(name)
    settings: dict[str, Any] = {}
    if name == 'wandb':
      settings['id'] = self._id
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
          name=f'{directory.name}-{self._id}',
          config=dict(config),
          resume='allow',
          **settings,
        )
    except Exception as error:
      raise UserError(
        f'TRACKER {name!r} cannot start a run: {error}. Log in as its'
        ' documentation says, or leave TRACKER out'
      ) from error

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Sends the numbers of a step, unless an earlier start has sent them."""
    if step > self._sent:
      self._run.log(dict(values), step=step)
      self._note(step)

  def close(self) -> None:
    """Waits until everything is sent."""
    with contextlib.redirect_stdout(sys.stderr):
      self._run.finish()

  def _note(self, step: int) -> None:
    known = {self._name: {'id': self._id, 'step': step}}
    write_atomically(self._file, json.dumps(known) + '\n')
