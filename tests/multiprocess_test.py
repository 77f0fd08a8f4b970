"""Several processes of one run: the same results, and no one waits for ever.

Two kinds of processes: `launch/local.py` starts the program at the end of this
file, and `tiny.processes` forks others from a server, which is quick.
"""

import argparse
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
from absl import logging
from jax.experimental import multihost_utils

from ptune import (
  checkpoints,
  data,
  partitioning,
  processes,
  seqio_task,
  train,
)
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 10


# ---------------------------------------------------- one process that is lost


def wait_or_hang():
  """A process that joins the others; then one ends and the rest wait."""
  flags = dict(a.removeprefix('--').split('=') for a in sys.argv[1:])
  processes.join(
    flags['coordinator_address'],
    int(flags['process_count']),
    int(flags['process_index']),
  )
  print('joined', flush=True)
  if flags.get('leaves') == flags['process_index']:
    return processes.leave(int(flags['status']))
  if 'status' in flags and flags['status'] == '0':
    return processes.leave(0)
  while True:  # As in a collective, but not even an error comes.
    time.sleep(60)


@pytest.mark.parametrize('victim', [0, 1])
def test_the_others_end_and_name_the_one_that_was_killed(victim):
  started = tiny.processes(3, [], call='tests.multiprocess_test:wait_or_hang')
  for process in started:
    process.wait_for('joined')
  begin = time.monotonic()
  started[victim].send(signal.SIGKILL)
  for index, process in enumerate(started):
    status = process.wait()
    if index == victim:
      assert status == -signal.SIGKILL
      continue
    assert status not in (0, -signal.SIGKILL)
    host = os.uname().nodename
    text = f'process {victim} (host {host}, pid {started[victim].pid}) is gone'
    assert text in process.output
    assert 'the same command goes on' in process.output
  assert time.monotonic() - begin < 10


@pytest.mark.parametrize('leaver', [0, 2])
def test_who_ends_with_an_error_is_named_too(leaver):
  started = tiny.processes(
    3,
    [f'--leaves={leaver}', '--status=2'],
    call='tests.multiprocess_test:wait_or_hang',
  )
  assert [process.wait() for process in started] == [2, 2, 2]
  for index, process in enumerate(started):
    told = f'process {leaver} (host' in process.output
    assert told == (index != leaver)
    assert 'absl::' not in process.output  # No C++ trace.


def test_processes_that_finish_at_different_times_end_well():
  started = tiny.processes(
    3, ['--status=0'], call='tests.multiprocess_test:wait_or_hang'
  )
  assert [process.wait() for process in started] == [0, 0, 0]
  assert not any('ptune:' in process.output for process in started)


# ---------------------------------------------------------- the same results


def final(model_dir, step=STEPS):
  return np.load(pathlib.Path(model_dir, 'prompts', f'step_{step}.npy'))


def assert_close(left, right):
  np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)


SETTINGS = {'train_steps': STEPS, 'checkpoint_period': 5, 'eval_split': None}


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The MODEL_DIR of a run of one process with one device."""
  path = tmp_path_factory.mktemp('alone') / 'run'
  tiny.run(path, **SETTINGS)
  return path


def settings(model_dir, **changes):
  """Of that run on all devices."""
  return tiny.settings(model_dir, **{**SETTINGS, **changes})


def join():
  """Joins by the flags of a launcher; returns the other arguments."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--coordinator_address')
  parser.add_argument('--process_count', type=int)
  parser.add_argument('--process_index', type=int)
  parser.add_argument('directory', type=pathlib.Path)
  parser.add_argument('base')
  args = parser.parse_args()
  processes.join(
    args.coordinator_address, args.process_count, args.process_index
  )
  return args


def together(directory, base):
  """What the processes of a mesh of eight devices do, all of them."""
  index, count = jax.process_index(), jax.process_count()
  logging.set_verbosity(logging.WARNING)
  run = functools.partial(settings, initial_checkpoint_path=base)

  # Each way to split the mesh.
  for n in (1, 2, 8):
    train.train(**run(directory / f'model_parallel_{n}', model_parallel=n))

  # The newest checkpoint is damaged for all; then one process alone cannot
  # read it. Whatever one sees, all go on from the same step.
  damaged = directory / 'damaged'
  train.train(**run(damaged))
  multihost_utils.sync_global_devices('trained')
  if index == 0:
    shutil.rmtree(damaged / 'checkpoints' / '10' / 'state' / 'd')
  multihost_utils.sync_global_devices('damaged')
  train.train(**run(damaged))
  read = checkpoints.ocp.CheckpointManager.restore

  def fails(self, step, *args, **kwargs):
    if step == STEPS and index == count - 1:
      raise OSError('Input/output error')
    return read(self, step, *args, **kwargs)

  with mock.patch.object(checkpoints.ocp.CheckpointManager, 'restore', fails):
    train.train(**run(damaged))

  # To be gone on with elsewhere; and here, with another mesh.
  train.train(**run(directory / 'half', train_steps=STEPS // 2))
  train.train(**run(directory / 'other_mesh', train_steps=STEPS // 2))
  train.train(**run(directory / 'other_mesh', model_parallel=8))


def batches_of_all(directory):
  """Each process makes the batches, and keeps its rows; 0 writes them all."""
  task = seqio_task.load('tiny_mixture', 'tests.tiny')
  batches = data.Batches(task, tiny.LENGTHS, 8, seed=1, bucket_multiple=16)
  mesh = partitioning.make_mesh()
  found = {}
  for step in range(STEPS):
    for name, x in data.device_put(batches(step), mesh).items():
      own = sum(shard.data.shape[0] for shard in x.addressable_shards)
      assert own == 8 // jax.process_count()
      found[f'{step} {name}'] = multihost_utils.process_allgather(x, tiled=True)
  if jax.process_index() == 0:
    np.savez(directory / f'batches_{jax.process_count()}.npz', **found)


def make_batches():
  args = join()
  batches_of_all(args.directory)
  return processes.leave(0)


def test_batches_are_the_same_whatever_the_number_of_processes(tmp_path):
  for count in (1, 2, 4):
    started = tiny.processes(
      count,
      [os.fspath(tmp_path), '-'],
      devices=8 // count,
      call='tests.multiprocess_test:make_batches',
    )
    for process in started:
      assert process.wait() == 0, process.output
  one, *others = (np.load(tmp_path / f'batches_{n}.npz') for n in (1, 2, 4))
  for other in others:
    assert set(one) == set(other)
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """What two processes left, with four devices each."""
  path = tmp_path_factory.mktemp('two')
  done = subprocess.run(
    [
      *(sys.executable, str(ROOT / 'launch' / 'local.py')),
      *('--processes=2', '--devices_per_process=4', '--'),
      *(sys.executable, '-m', 'tests.multiprocess_test', path, tiny.base()),
    ],
    cwd=ROOT,
    env=tiny.environment(),
    text=True,
    capture_output=True,
    timeout=400,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  (path / 'output').write_text(done.stdout)
  return path


@pytest.mark.parametrize('n', [1, 2, 8])
def test_the_prompt_is_the_same_however_the_mesh_is_split(alone, two, n):
  assert_close(final(two / f'model_parallel_{n}'), final(alone))


def test_processes_agree_on_the_checkpoint_that_they_go_on_from(alone, two):
  assert_close(final(two / 'damaged'), final(alone))
  assert {p.name for p in (two / 'damaged' / 'checkpoints').iterdir()} == {
    *('5', '10', '10.damaged', '10.damaged2')
  }
  output = (two / 'output').read_text()
  assert output.count('checkpoints/10 cannot be read and is passed over') == 4
  assert 'Error: Input/output error' in output
  assert 'passed over: another process cannot read it' in output


def test_a_run_goes_on_with_other_devices_and_processes(alone, two, tmp_path):
  assert_close(final(two / 'other_mesh'), final(alone))
  # Of two processes to one; of eight devices to four.
  for n, split in ((1, 1), (4, 4)):
    path = shutil.copytree(two / 'half', tmp_path / f'{n}_{split}')
    make_mesh = functools.partial(
      partitioning.make_mesh, devices=jax.devices()[:n]
    )
    with mock.patch.object(partitioning, 'make_mesh', make_mesh):
      train.train(**settings(path, model_parallel=split))
    assert_close(final(path), final(alone))


def main():
  args = join()
  together(args.directory, args.base)
  return processes.leave(0)


if __name__ == '__main__':
  sys.exit(main())
