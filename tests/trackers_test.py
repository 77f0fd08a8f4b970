"""Trackers (ptune/training/trackers.py) get the records of metrics.jsonl."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from ptune.training import report, trackers

SUMS = {'loss': 6.0, 'z_loss': 1.0, 'correct': 3.0, 'tokens': 4.0}


def reported(name, directory, steps, start=0):
  """Runs a part of a run, whose records also go to a tracker."""
  tracker = trackers.Tracker(name, directory, {'task': 'my_sst2'})
  with report.Report(directory, start, 100, 8, tracker=tracker) as r:
    for step in steps:
      r.train(step, SUMS)
      r.evaluate(step, 'validation', {'my_sst2': {'accuracy': float(step)}})
  tracker.close()


@pytest.fixture
def run(tmp_path):
  """Returns the directory of a run."""
  directory = tmp_path / 'runs' / 'sst2'
  directory.mkdir(parents=True)
  return directory


def test_trackio_goes_on_in_the_same_run_after_a_stop(run, tmp_path):
  pytest.importorskip('trackio')
  program = f"""
import pathlib
from tests import trackers_test
run = pathlib.Path({str(run)!r})
trackers_test.reported('trackio', run, [10, 20])
# Killed after step 20, whose checkpoint was of step 10: 20 is taken again.
trackers_test.reported('trackio', run, [20, 30], start=10)
"""
  subprocess.run(
    [sys.executable, '-c', program],
    env={**os.environ, 'TRACKIO_DIR': str(tmp_path)},
    capture_output=True,
    check=True,
  )
  with contextlib.closing(sqlite3.connect(tmp_path / 'ptune.db')) as database:
    rows = database.execute('select run_id, step, metrics from metrics')
    rows = [(name, step, json.loads(text)) for name, step, text in rows]
  assert len({name for name, *_ in rows}) == 1
  losses = [(s, v['train/loss']) for _, s, v in rows if 'train/loss' in v]
  assert losses == [(step, 1.5) for step in (10, 20, 30)]
  key = 'eval/my_sst2/accuracy'
  scores = [(s, v[key]) for _, s, v in rows if key in v]
  assert scores == [(step, float(step)) for step in (10, 20, 30)]


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
  known = json.loads((run / 'tracker.json').read_text())
  assert known == {'wandb': {'id': first['id'], 'step': 20}}


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
