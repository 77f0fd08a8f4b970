"""Reports (ptune/training/report.py): records across restarts, and display."""

import contextlib
import os
import pty
import re
import threading

import numpy as np
import pytest

from ptune.host.files import write_atomically
from ptune.training import report
from tests import tiny

SUMS = {'loss': 6.0, 'z_loss': 1.0, 'correct': 3.0, 'tokens': 4.0}


def open_report(directory, start=0, total=10, **settings):
  return report.Report(directory, start, total, batch_size=8, **settings)


def test_a_record_holds_means_over_tokens(tmp_path):
  with open_report(tmp_path) as r:
    r.train(4, {**SUMS, 'gradient_norm': 9.0})
  (record,) = report.read_records(tmp_path)
  assert record.pop('seconds_per_step') * record.pop('examples_per_second') == (
    pytest.approx(8)
  )
  assert record == {
    **{'step': 4, 'split': 'train', 'loss': 1.5, 'z_loss': 0.25},
    **{'accuracy': 0.75, 'gradient_norm': 9.0},
  }
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
  assert list((tmp_path / 'train').glob('events*'))


def test_tensorboard_reads_the_scalars(tmp_path):
  accumulator = pytest.importorskip(
    'tensorboard.backend.event_processing.event_accumulator'
  )
  with open_report(tmp_path) as r:
    r.train(2, SUMS)
    r.evaluate(2, 'validation', {'a': {'f1': 50.0, 'nan': float('nan')}})
    r.evaluate(4, 'validation', {'a': {'f1': 75.0}})
  events = accumulator.EventAccumulator(str(tmp_path / 'eval' / 'a'))
  events.Reload()
  found = [(e.step, e.value) for e in events.Scalars('f1')]
  assert found == [(2, 50.0), (4, 75.0)]
  # JSON has no NaN; a resumed run restores it.
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert 'NaN' not in text
  scores = report.scores_at(report.read_records(tmp_path), 2)
  assert np.isnan(scores['a']['nan'])


def test_records_after_the_restored_step_are_dropped(tmp_path):
  with open_report(tmp_path) as r:
    for step in (2, 4, 6):
      r.train(step, SUMS)
      r.evaluate(step, 'validation', {'a': {'f1': float(step)}, 'b': {}})
  # A hard stop may cut off the last line.
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 7, "spl')
  with open_report(tmp_path, start=4) as r:
    assert report.evaluated_steps(r.records) == [2, 4]
    assert report.scores_at(r.records, 4) == {'a': {'f1': 4.0}, 'b': {}}
    assert report.scores_at(r.records, 6) == {}
    r.train(5, SUMS)
  steps = [r['step'] for r in tiny.records(tmp_path) if r['split'] == 'train']
  assert steps == [2, 4, 5]


def test_another_process_writes_nothing(tmp_path):
  with open_report(tmp_path, write=False) as r:
    r.train(4, SUMS)
    r.evaluate(4, 'validation', {'a': {'f1': 1.0}})
    assert len(r.records) == 2
  assert not list(tmp_path.iterdir())


def test_an_error_inside_is_not_hidden(tmp_path):
  with pytest.raises(KeyError), open_report(tmp_path) as r:
    r.train(4, SUMS)
    raise KeyError
  assert not (tmp_path / 'curves.png').exists()


def test_curves_are_drawn_if_anyone_wants_them(tmp_path):
  for curves in (False, True):
    with open_report(tmp_path, curves=curves) as r:
      r.train(4, SUMS)
    assert (tmp_path / 'curves.png').exists() == curves


def test_time_that_is_left_out_does_not_count(tmp_path, monkeypatch):
  now = 100.0
  monkeypatch.setattr(report.time, 'monotonic', lambda: now)
  with open_report(tmp_path) as r:
    with r.paused('evaluating'):
      now += 50
    now += 2
    r.train(4, SUMS)
    r.train(5, SUMS)  # Takes no time.
  first, _ = report.read_records(tmp_path)
  assert first['seconds_per_step'] == 0.5
  assert first['examples_per_second'] == 16


def test_a_file_is_whole_or_not_there(tmp_path):
  path = report.epath.Path(tmp_path / 'file')
  write_atomically(path, 'old')
  write_atomically(path, b'new')
  assert path.read_text() == 'new'
  assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_numbers_are_found_among_scores():
  scores = {
    'a': 1,
    'b': np.float32(2.5),
    'c': 'text',
    'd': np.ones(2),
    'e': None,
  }
  assert report.numbers(scores) == {'a': 1.0, 'b': 2.5}
  assert report.format_scores({'f1': 91.23456, 'n': 3.0}) == 'f1 91.23, n 3'


def test_curves_are_drawn_with_and_without_scores(tmp_path):
  train = [{'step': s, 'split': 'train', 'loss': 1 / s} for s in (1, 2)]
  held_out = {'step': 2, 'split': 'v', 'task': 't', 'loss': 0.5, 'f1': 3.0}
  for i, records in enumerate((train, [*train, held_out])):
    path = report.epath.Path(tmp_path / f'{i}.png')
    report.plot(records, path)
    assert path.read_bytes().startswith(b'\x89PNG')


# ------------------------------------------------------------------- a terminal


def on_a_terminal(*arguments, **macros):
  """Runs `ptune train` on a terminal; returns exit status and display."""
  controller, terminal = pty.openpty()
  shown = []

  def read():
    with contextlib.suppress(OSError):  # Raised at the end.
      while block := os.read(controller, 65536):
        shown.append(block)

  reader = threading.Thread(target=read)
  reader.start()
  process = tiny.Command(
    tiny.arguments('train', *arguments, **macros),
    log=os.ttyname(terminal),
    TERM='xterm',
    COLUMNS='100',
  )
  status = process.wait()
  os.close(terminal)
  reader.join()
  os.close(controller)
  return status, b''.join(shown).decode()


def test_on_a_terminal_a_bar_tells_loss_rate_and_time_left(tmp_path):
  status, shown = on_a_terminal(
    '--gin.settings.Saving.log_period=2',
    MODEL_DIR=str(tmp_path / 'run'),
    TRAIN_STEPS=6,
    EVAL_PERIOD=3,
  )
  assert status == 0
  plain = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', shown)
  assert re.search(
    r'━+ *6/6 loss \d\.\d{4}  accuracy \d\.\d{3}  [\d.]+ examples/s 0:00:00',
    plain,
  )
  assert 'compiling' in plain and 'evaluating' in plain
  # Whole lines of the log are above the bar, and the cursor is restored.
  assert re.search(r'tiny validation: accuracy \d', plain)
  assert 'step 2  loss' not in plain
  assert shown.rindex('\x1b[?25h') > shown.rindex('\x1b[?25l')


def test_elsewhere_plain_lines_are_written(tmp_path):
  status, shown = tiny.command(
    *tiny.arguments(
      'train',
      '--gin.settings.Saving.log_period=2',
      MODEL_DIR=str(tmp_path / 'run'),
      TRAIN_STEPS=4,
      EVAL_SPLIT=None,
    )
  )
  assert status == 0
  assert '\x1b' not in shown and '\r' not in shown
  assert re.search(
    r'step 2  loss \d\.\d+  accuracy \d\.\d+  [\d.]+ examples/s\n', shown
  )
