"""Trackers (ptune/training/trackers.py) get the records of metrics.jsonl."""

import contextlib
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys

import pytest

from ptune.training import report, trackers

SUMS = {'loss': 6.0, 'z_loss': 1.0, 'correct': 3.0, 'tokens': 4.0}


def reported(name, directory, steps, start=0, end='finished'):
  """Runs a part of a run, whose records also go to a tracker.

  Args:
    name: The tracker.
    directory: The directory of the run.
    steps: The steps that are recorded.
    start: The step of the restored checkpoint.
    end: 'finished'; 'stopped' in the evaluation of the last step; or 'killed'
      after it.
  """
  tracker = trackers.Tracker(name, directory, {'task': 'my_sst2'})
  with report.Report(directory, start, 100, 8, tracker=tracker) as r:
    for step in steps:
      if step > start:
        r.train(step, SUMS)
      if end == 'stopped' and step == steps[-1]:
        break
      r.evaluate(step, 'validation', {'my_sst2': {'accuracy': float(step)}})
    if end == 'killed':
      os.kill(os.getpid(), signal.SIGKILL)
  if end == 'finished':
    tracker.send()
  tracker.close()


@pytest.fixture
def run(tmp_path):
  """Returns the directory of a run."""
  directory = tmp_path / 'runs' / 'sst2'
  directory.mkdir(parents=True)
  return directory


def restarted(name, run, *starts, **environment):
  """Runs each start in a process of its own."""
  for steps, start, end in starts:
    call = f'reported({name!r}, epath.Path({str(run)!r}), {steps}, {start}'
    done = subprocess.run(
      [
        *(sys.executable, '-c'),
        'from etils import epath\nfrom tests import trackers_test\n'
        f'trackers_test.{call}, {end!r})',
      ],
      env={**os.environ, **environment},
      capture_output=True,
      text=True,
    )
    expected = -signal.SIGKILL if end == 'killed' else 0
    assert done.returncode == expected, done.stderr


def trackio_rows(place):
  with contextlib.closing(sqlite3.connect(place / 'ptune.db')) as database:
    rows = database.execute('select run_id, step, metrics from metrics')
    rows = [(name, step, json.loads(text)) for name, step, text in rows]
  assert len({name for name, *_ in rows}) == 1
  return [row[1:] for row in rows]


def wandb_rows(run):
  """The rows in the files that Weights & Biases would upload."""
  from wandb.proto import wandb_internal_pb2

  rows, names = [], set()
  for file in sorted((run / 'wandb').glob('offline-run-*/*.wandb')):
    names.add(file.name)
    data, at, whole = file.read_bytes(), 7, b''
    while len(data) - at >= 7:
      left = 32768 - at % 32768  # A part does not cross the end of a block.
      if left < 7:
        at += left
        continue
      _, size, kind = struct.unpack('<IHB', data[at : at + 7])
      whole += data[at + 7 : at + 7 + size]
      at += 7 + size
      if kind in (1, 4):  # The only part, or the last one.
        record = wandb_internal_pb2.Record.FromString(whole)
        whole = b''
        if record.HasField('history'):
          items = {
            item.key or '/'.join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
          }
          rows.append((record.history.step.num, items))
  assert len(names) == 1
  return rows


@pytest.mark.parametrize('name', trackers.TRACKERS)
def test_a_restart_neither_loses_nor_repeats_a_row(name, run, tmp_path):
  pytest.importorskip(name)
  place = {'TRACKIO_DIR': str(tmp_path), 'WANDB_MODE': 'offline'}
  starts = [
    ([10, 20], 0, 'stopped'),
    ([20, 30], 20, 'killed'),  # After the checkpoint of step 30.
    ([40], 30, 'killed'),  # Before that of step 40, which is repeated.
  ]
  restarted(name, run, *starts, **place)
  run = run.rename(run.with_name('moved'))
  restarted(name, run, ([40, 50], 30, 'finished'), **place)
  rows = trackio_rows(tmp_path) if name == 'trackio' else wandb_rows(run)
  assert [step for step, _ in rows] == [10, 20, 30, 40, 50]
  assert {row['train/loss'] for _, row in rows} == {1.5}
  assert all(row['eval/my_sst2/accuracy'] == step for step, row in rows)


def test_wandb_goes_on_under_the_same_id(run, monkeypatch):
  wandb = pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  asked = []
  init = wandb.init

  def noted(**settings):
    asked.append(settings)
    return init(**settings)

  monkeypatch.setattr(wandb, 'init', noted)
  reported('wandb', run, [10])
  reported('wandb', run, [20], start=10)
  first, second = asked
  assert first['id'] == second['id'] and second['resume'] == 'allow'
  assert first['config'] == {'task': 'my_sst2'}
  assert len(list((run / 'wandb').glob(f'offline-run-*-{first["id"]}'))) == 2
  known = json.loads((run / 'tracker.json').read_text())['wandb']
  assert known['id'] == first['id'] and known['step'] == 20


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('wanb', "TRACKER is 'wanb'; did you mean wandb"),
    ('trackio', r'not installed: pip install "ptune\[trackio\]"'),
  ],
)
def test_a_tracker_that_is_not_there_is_refused(name, message, monkeypatch):
  monkeypatch.setattr(trackers.importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ValueError, match=message):
    trackers.check(name)


def test_a_tracker_that_refuses_is_said_in_words(run, monkeypatch):
  class Refuses:
    @staticmethod
    def init(**_):
      raise RuntimeError('no API key')

  monkeypatch.setitem(sys.modules, 'trackio', Refuses)
  monkeypatch.setattr(trackers.importlib.util, 'find_spec', lambda _: True)
  with pytest.raises(ValueError, match=r'no API key\. Log in'):
    trackers.Tracker('trackio', run, {})
