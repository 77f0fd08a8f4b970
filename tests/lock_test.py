"""The lock of a run (ptune/training/lock.py) never blocks a restart."""

import json
import os
import signal
import socket
import threading
import time

import pytest

from ptune.training import lock
from tests import tiny


def train(model_dir, **macros):
  return tiny.arguments(
    'train',
    MODEL_DIR=os.fspath(model_dir),
    MIXTURE_OR_TASK_NAME='tiny_no_metrics',
    EVAL_SPLIT=None,
    **macros,
  )


def test_a_second_run_is_refused_and_a_killed_one_is_not_in_its_own_way(
  tmp_path,
):
  first = tiny.Command(train(tmp_path, TRAIN_STEPS=1_000_000))
  first.wait_for('step 50')
  before = set(tiny.files(tmp_path / 'checkpoints'))
  status, output = tiny.command(*train(tmp_path, TRAIN_STEPS=60))
  assert status == 2
  assert f'MODEL_DIR {tmp_path} is in use by process {first.pid} on host' in (
    output
  )
  assert f'{socket.gethostname()}, since 20' in output
  assert 'stop it with SIGTERM' in output and 'kill -9' in output
  first.send(signal.SIGKILL)
  assert first.wait() == -signal.SIGKILL
  assert (tmp_path / lock.FILE).exists()
  assert before <= set(tiny.files(tmp_path / 'checkpoints'))
  status, output = tiny.command(*train(tmp_path, TRAIN_STEPS=1))
  assert status == 0, output
  assert not (tmp_path / lock.FILE).exists()


def test_many_that_come_at_once_hold_it_one_after_the_other(tmp_path):
  inside, most, refused = [0], [0], [0]

  def hold():
    for _ in range(50):
      try:
        with lock.acquire(tmp_path):
          inside[0] += 1
          most[0] = max(most[0], inside[0])
          inside[0] -= 1
      except ValueError:
        refused[0] += 1

  threads = [threading.Thread(target=hold) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert most[0] == 1 and refused[0] < 200
  assert not list(tmp_path.iterdir())


# -------------------------------------------------- file systems without locks


@pytest.fixture
def quick(monkeypatch):
  """Simulates a file system without locks, and shortens all intervals."""

  def flock(file, operation):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(lock.fcntl, 'flock', flock)
  for name, seconds in {'BEAT': 0.1, 'LEASE': 2.0, 'SETTLE': 0.3}.items():
    monkeypatch.setattr(lock, name, seconds)
  left = threading.Event()  # Set instead of ending this process.
  monkeypatch.setattr(lock.os, '_exit', lambda status: left.set())
  return left


def test_signs_of_life_keep_others_out(tmp_path, quick):
  with lock.acquire(tmp_path):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=f'in use by process {os.getpid()} on'):
      with lock.acquire(tmp_path):
        pass
    assert time.monotonic() - begin < lock.LEASE  # Without waiting.
  with lock.acquire(tmp_path):
    pass
  assert not list(tmp_path.iterdir())


def test_a_file_that_is_being_written_does_not_say_whose_it_is(
  tmp_path, quick, monkeypatch
):
  write = lock._write

  def slowly(path, owner, beat):
    path.write_text('')
    time.sleep(0.1)
    write(path, owner, beat)

  monkeypatch.setattr(lock, '_write', slowly)
  with lock.acquire(tmp_path):
    for _ in range(5):
      with pytest.raises(ValueError, match=f'by process {os.getpid()} on'):
        with lock.acquire(tmp_path):
          pass


def test_what_shows_no_sign_of_life_is_taken_over(tmp_path, quick, caplog):
  file = tmp_path / lock.FILE
  file.write_text(json.dumps({'pid': 1, 'host': 'gone', 'since': 'long ago'}))
  begin = time.monotonic()
  with lock.acquire(tmp_path):
    assert time.monotonic() - begin >= lock.LEASE
    assert json.loads(file.read_text())['pid'] == os.getpid()
  assert 'is dead: taking over' in caplog.text


def test_of_two_at_the_same_time_one_is_refused(tmp_path, quick):
  held = []
  barrier = threading.Barrier(2)

  def start():
    barrier.wait()
    try:
      with lock.acquire(tmp_path):
        held.append(True)
        time.sleep(0.5)
    except ValueError:
      held.append(False)

  threads = [threading.Thread(target=start) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(held) == [False, True]


def test_who_was_taken_over_from_leaves(tmp_path, quick, capfd):
  with lock.acquire(tmp_path):
    other = {'pid': 7, 'host': 'other', 'since': 'now', 'token': 'x'}
    (tmp_path / lock.FILE).write_text(json.dumps(other))
    assert quick.wait(5)
  assert 'is in use by process 7 on host other' in capfd.readouterr().err
