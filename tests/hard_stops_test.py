"""What a run is promised when it is stopped, and what is on disk is spoiled.

docs/promises.md says which test shows what.
"""

import itertools
import os
import pathlib
import random
import shutil
import signal
import time

import numpy as np
import pytest

from ptune import checkpoints
from tests import tiny

KILLS = 20
STEPS = 60


def arguments(model_dir, *more, **macros):
  return tiny.arguments(
    'train',
    '--gin.train.log_period=7',
    *more,
    **{
      'MODEL_DIR': os.fspath(model_dir),
      'MIXTURE_OR_TASK_NAME': 'tiny_no_metrics',
      'TRAIN_STEPS': STEPS,
      'EVAL_PERIOD': 30,
      'CHECKPOINT_PERIOD': 5,
      'BUCKET_MULTIPLE': 16,
      **macros,
    },
  )


def final_prompt(model_dir, step):
  return np.load(pathlib.Path(model_dir, 'prompts', f'step_{step}.npy'))


@pytest.fixture(scope='module')
def calm(tmp_path_factory):
  """The MODEL_DIR of a run that nothing happened to."""
  path = tmp_path_factory.mktemp('calm') / 'run'
  status, output = tiny.command(*arguments(path))
  assert status == 0, output
  return path


def assert_same_run(left, right):
  """The same prompts to the bit, the same records and best."""
  assert tiny.records(left) == tiny.records(right)
  steps = checkpoints.finished_steps(right / 'checkpoints')
  assert set(steps) <= set(checkpoints.finished_steps(left / 'checkpoints'))
  for step in steps:
    assert np.array_equal(final_prompt(left, step), final_prompt(right, step))
  assert (left / 'prompts/best.npy').read_bytes() == (
    (right / 'prompts/best.npy').read_bytes()
  )


# ------------------------------------------------------------ signals and kills


def wait_until(process, condition, seconds=60):
  """Waits, closely, for a condition; False if the process ends before it."""
  end = time.monotonic() + seconds
  while not condition():
    if not pathlib.Path(f'/proc/{process.pid}/stat').exists():
      return False
    if pathlib.Path(f'/proc/{process.pid}/stat').read_text().split()[2] == 'Z':
      return False
    assert time.monotonic() < end, process.output
  return True


def test_killed_at_20_moments_it_ends_with_the_same_bits(calm, tmp_path):
  """Kills in a checkpoint's writing, right after it, and at any moment."""
  run = tmp_path / 'run'
  draw = random.Random(0)  # With a seed: a bad moment should be seen again.

  def names():
    folder = run / 'checkpoints'
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()

  def writing():
    return any('tmp' in name for name in names() - before)

  def written():
    return any(name.isdecimal() for name in names() - before)

  killed = {'setting up': 0, 'writing': 0, 'written': 0, 'training': 0}
  moments = itertools.cycle(['writing', 'written', 'training', 'setting up'])
  while sum(killed.values()) < KILLS:
    moment, before = next(moments), names()
    process = tiny.Command(arguments(run))
    if moment == 'setting up':
      time.sleep(draw.uniform(0, 1.5))
    elif moment == 'training':
      wait_until(process, lambda: 'restored' in process.output)  # noqa: B023
      time.sleep(draw.uniform(0, 0.6))
    else:
      wait_until(process, writing if moment == 'writing' else written)
    process.send(signal.SIGKILL)
    if process.wait() == -signal.SIGKILL:
      killed[moment] += 1
    else:  # It had finished. Once more, from an earlier step.
      for path in (run / 'checkpoints').iterdir():
        if not path.name.isdecimal() or int(path.name) > STEPS // 4:
          shutil.rmtree(path)
  assert min(killed.values()) >= 3
  status, output = tiny.command(*arguments(run))
  assert status == 0, output
  assert_same_run(run, calm)
