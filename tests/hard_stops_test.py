"""The promises about stopped runs and damaged files.

docs/promises.md lists which test shows which promise.
"""

import errno
import itertools
import logging
import os
import pathlib
import random
import shutil
import signal
import time

import numpy as np
import pytest

from ptune.training import checkpoints
from tests import tiny

# Each start takes 3 CPU seconds.
KILLS = int(os.environ.get('PTUNE_KILLS', '20'))
MOMENTS = ('writing', 'written', 'training', 'setting up')
STEPS = 60
SAVE = checkpoints._save
# Orbax's threads raise if the files that they read or write are gone.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def arguments(model_dir, *more, **macros):
  return tiny.arguments(
    'train',
    '--gin.settings.Saving.log_period=7',
    *more,
    **{
      'MODEL_DIR': os.fspath(model_dir),
      'MIXTURE_OR_TASK_NAME': 'tiny_no_metrics',
      'TRAIN_STEPS': STEPS,
      'EVAL_SPLIT': None,  # Takes half of a start; see train_program_test.
      'CHECKPOINT_PERIOD': 5,
      'BUCKET_MULTIPLE': 16,
      **macros,
    },
  )


def final_prompt(model_dir, step):
  return np.load(pathlib.Path(model_dir, 'prompts', f'step_{step}.npy'))


@pytest.fixture(scope='module')
def calm(tmp_path_factory):
  """Returns the MODEL_DIR of an undisturbed run."""
  path = tmp_path_factory.mktemp('calm') / 'run'
  status, output = tiny.command(*arguments(path))
  assert status == 0, output
  return path


def assert_same_run(left, right):
  """Compares the records, and the prompts bit by bit."""
  assert tiny.records(left) == tiny.records(right)
  steps = checkpoints.finished_steps(right / 'checkpoints')
  assert set(steps) <= set(checkpoints.finished_steps(left / 'checkpoints'))
  for step in steps:
    assert np.array_equal(final_prompt(left, step), final_prompt(right, step))


# ------------------------------------------------------------ signals and kills


def is_running(process):
  try:
    stat = pathlib.Path(f'/proc/{process.pid}/stat').read_text()
  except FileNotFoundError:
    return False
  return stat.rpartition(')')[2].split()[0] != 'Z'


def wait_until(process, condition):
  """Waits until a condition holds or the process ends."""
  end = time.monotonic() + 60
  while is_running(process) and not condition():
    assert time.monotonic() < end, process.output


def names(folder):
  return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bits(calm, tmp_path):
  """Kills runs while they write a checkpoint, right after, and at any time."""
  run = tmp_path / 'run'
  folder = run / 'checkpoints'
  draw = random.Random(0)  # A seed, to reproduce failures.
  killed = dict.fromkeys(MOMENTS, 0)
  for moment in itertools.cycle(MOMENTS):
    before = names(folder)
    process = tiny.Command(arguments(run))
    if moment == 'setting up':
      time.sleep(draw.uniform(0, 2))
    elif moment == 'training':
      wait_until(process, lambda: 'restored' in process.output)  # noqa: B023
      time.sleep(draw.uniform(0, 1))
    else:
      sign = 'tmp' if moment == 'writing' else ''
      wait_until(
        process,
        lambda: any(  # Called immediately.
          sign in name and (sign or name.isdecimal())  # noqa: B023
          for name in names(folder) - before  # noqa: B023
        ),
      )
    process.send(signal.SIGKILL)
    killed[moment] += process.wait() == -signal.SIGKILL
    if sum(killed.values()) == KILLS:
      break
    # Without this, the run would finish too early.
    for name in names(folder):
      if name.isdecimal() and int(name) > STEPS // 2:
        shutil.rmtree(folder / name)
  assert min(killed.values()) >= KILLS // 5, killed
  status, output = tiny.command(*arguments(run))
  assert status == 0, output
  assert 'resuming from step' in output
  assert_same_run(run, calm)


def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(calm, tmp_path):
  process = tiny.Command(arguments(tmp_path))
  process.wait_for('step 7')
  begin = time.monotonic()
  process.send(signal.SIGTERM)
  assert process.wait() == 0
  assert time.monotonic() - begin < 30
  step = checkpoints.finished_steps(tmp_path / 'checkpoints')[-1]
  assert 'SIGTERM: saving' in process.output
  assert f'stopped at step {step}, which is saved in' in process.output
  assert 'the same command resumes from there' in process.output
  status, output = tiny.command(*arguments(tmp_path))
  assert status == 0, output
  assert f'resuming from step {step}' in output
  assert_same_run(tmp_path, calm)


# ---------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """Returns the MODEL_DIR of a run in this process."""
  path = tmp_path_factory.mktemp('undisturbed') / 'run'
  tiny.run(path, eval_split=None)
  return path


@pytest.fixture
def started(undisturbed, tmp_path):
  """Returns a copy of that run, which the test may damage."""
  return shutil.copytree(undisturbed, tmp_path / 'run')


def truncate(checkpoint):
  for path in checkpoint.rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_file(checkpoint):
  (checkpoint / 'state' / 'manifest.ocdbt').unlink()


def garble(checkpoint):
  (checkpoint / 'state' / '_METADATA').write_text('{"tree_metadata": 5')


def empty(checkpoint):
  shutil.rmtree(checkpoint)
  checkpoint.mkdir()


@pytest.mark.parametrize('damage', [truncate, lose_a_file, garble, empty])
def test_a_damaged_checkpoint_is_passed_over(
  undisturbed, started, caplog, damage
):
  damage(started / 'checkpoints' / '12')
  caplog.set_level(logging.INFO)
  tiny.run(started, eval_split=None)
  assert (
    f'{started}/checkpoints/12 cannot be read and is skipped' in caplog.text
  )
  assert 'resuming from step 8' in caplog.text
  assert (started / 'checkpoints' / '12.damaged').is_dir()
  assert_same_run(started, undisturbed)


def test_without_a_readable_checkpoint_nothing_is_overwritten(started):
  for step, damage in ((4, truncate), (8, garble), (12, lose_a_file)):
    damage(started / 'checkpoints' / str(step))
  before = tiny.files(started)
  with pytest.raises(ValueError, match=r'none of the checkpoints \[12, 8, 4\]'):
    tiny.run(started, eval_split=None)
  assert tiny.files(started) == before


# ------------------------------------------------------- a disk that is full


@pytest.fixture
def broken_disk(tmp_path, monkeypatch):
  """Makes checkpoints fail from step 8 on; returns a function that repairs it.

  The failure is real: a file replaces the directory.
  """
  folder, aside = tmp_path / 'checkpoints', tmp_path / 'aside'
  original = checkpoints._save

  def mend():
    folder.unlink()
    aside.rename(folder)

  def save(manager, state, sums):
    if int(state.step) == 8 and not aside.exists():
      folder.rename(aside)
      folder.write_text('')
    original(manager, state, sums)

  monkeypatch.setattr(checkpoints, '_save', save)
  return mend


def test_a_save_that_fails_is_tried_again(
  undisturbed, tmp_path, monkeypatch, caplog, broken_disk
):
  pauses = []

  def pause(seconds):
    pauses.append(seconds)
    if len(pauses) == 2:
      broken_disk()
      monkeypatch.setattr(checkpoints, '_save', SAVE)

  monkeypatch.setattr(checkpoints.time, 'sleep', pause)
  tiny.run(tmp_path, eval_split=None)
  assert pauses == [1, 5]
  assert caplog.text.count('step 8 could not be saved in') == 2
  assert 'trying again in 5 s' in caplog.text
  assert_same_run(tmp_path, undisturbed)


def test_a_save_that_fails_again_and_again_ends_the_run(
  undisturbed, tmp_path, monkeypatch, broken_disk
):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.time, 'sleep', lambda seconds: None)
    with pytest.raises(OSError, match=r'step \d+ could not be saved in'):
      tiny.run(tmp_path, eval_split=None)
  broken_disk()
  assert checkpoints.finished_steps(tmp_path / 'checkpoints') == [4]
  monkeypatch.undo()
  tiny.run(tmp_path, eval_split=None)
  assert_same_run(tmp_path, undisturbed)


def test_a_full_disk_keeps_the_last_checkpoint_and_says_what_to_do(
  undisturbed, tmp_path, monkeypatch
):
  def full_disk(manager, state, sums):
    if int(state.step) >= 8:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    SAVE(manager, state, sums)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, '_save', full_disk)
    patch.setattr(checkpoints, 'PAUSES', (0.0,))
    with pytest.raises(OSError, match='no space is left for') as error:
      tiny.run(tmp_path, eval_split=None)
  assert 'checkpoint of step 4 is complete: free space and start the same' in (
    str(error.value)
  )
  tiny.run(tmp_path, eval_split=None)
  assert_same_run(tmp_path, undisturbed)
