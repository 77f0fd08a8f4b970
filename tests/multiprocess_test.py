"""Runs of several processes give the same results, and never wait forever.

`launch/local.py` starts the program at the end of this file.
`tiny.processes` forks other processes from a server, which is fast.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import re
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

from ptune import train
from ptune.convert import open_checkpoint
from ptune.data import batches as data
from ptune.data import device_feed, seqio_task
from ptune.host import processes
from ptune.methods import full
from ptune.model import parameters, partitioning
from ptune.training import checkpoints
from tests import tiny

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 10


# --------------------------------------------------------- loss of one process


def wait_or_hang():
  """Joins the other processes; then one of them ends and the others wait."""
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
  while True:  # Like a collective, but without an error.
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
    assert 'the same command resumes' in process.output
  assert time.monotonic() - begin < 10


@pytest.mark.parametrize('leaver', [0, 2])
def test_who_ends_with_an_error_is_named_too(leaver):
  started = tiny.processes(
    3,
    [f'--leaves={leaver}', '--status=2'],
    call='tests.multiprocess_test:wait_or_hang',
  )
  statuses = [process.wait() for process in started]
  assert statuses[leaver] == 2 and set(statuses) <= {1, 2}
  for index, process in enumerate(started):
    # A process whose own connections break first ends with that error and
    # status 1.
    told = f'process {leaver} (host' in process.output
    assert told == (index != leaver) or statuses[index] == 1
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


SETTINGS = {'train_steps': STEPS, 'checkpoint_period': 3, 'eval_split': None}


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """Returns the MODEL_DIR of a run with one process and one device."""
  path = tmp_path_factory.mktemp('alone') / 'run'
  tiny.run(path, **SETTINGS)
  return path


def settings(model_dir, **changes):
  """Returns the settings of that run for all devices."""
  how = tiny.settings(model_dir, **{**SETTINGS, **changes})
  return tiny.grouped(train.train, **how)


def join():
  """Joins with the flags of a launcher; returns the other arguments."""
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
  """Runs on a mesh of eight devices; every process calls this."""
  index, count = jax.process_index(), jax.process_count()
  logging.set_verbosity(logging.WARNING)
  run = functools.partial(settings, initial_checkpoint_path=base)

  # All ways to split the mesh.
  for n in (1, 2, 8):
    train.train(**run(directory / f'model_parallel_{n}', model_parallel=n))

  # Restarts from a checkpoint on another mesh. The newest checkpoint is damaged
  # for all processes, the one before it only for one. All must resume from the
  # same step.
  if index == 0:
    restart = copy_of(directory / 'model_parallel_1', directory / 'restart')
    shutil.rmtree(restart / 'checkpoints' / '10' / 'state' / 'd')
  multihost_utils.sync_global_devices('damaged')
  read = checkpoints.ocp.CheckpointManager.restore

  def fails(self, step, *args, **kwargs):
    if step == 9 and index == count - 1:
      raise OSError('Input/output error')
    return read(self, step, *args, **kwargs)

  with mock.patch.object(checkpoints.ocp.CheckpointManager, 'restore', fails):
    train.train(**run(directory / 'restart', model_parallel=8))

  # One of the processes writes the arrays that are split over all.
  state = train.train(
    **run(
      directory / 'full', method=full.full(), model_parallel=8, train_steps=2
    )
  )
  trained = parameters.flatten(state.trainable)
  trained = {path: parameters.to_host(x) for path, x in trained.items()}
  if index == 0:
    np.savez(directory / 'full.npz', **trained)

  # The disk of process 0 fails twice and then works again; later it keeps
  # failing.
  with mock.patch.object(checkpoints, 'PAUSES', (0.1, 0.2, 0.3)):
    for name, times in (('mended', 2), ('broken', 99)):
      with failing_disk(directory / name, step=6, times=times):
        try:
          train.train(**run(directory / name))
        except OSError as error:
          (directory / f'{name}_{index}').write_text(str(error))


@contextlib.contextmanager
def failing_disk(model_dir, step, times):
  """Makes `times` writes of checkpoints fail, starting at a step.

  The failure is real: a file replaces the directory.
  """
  folder, aside = model_dir / 'checkpoints', model_dir / 'aside'
  save, failed = checkpoints._save, 0

  def fail(manager, state, sums):
    nonlocal failed
    if int(state.step) >= step and failed < times:
      failed += 1
      folder.rename(aside)
      folder.write_text('')
      try:
        return save(manager, state, sums)
      finally:
        folder.unlink()
        aside.rename(folder)
    return save(manager, state, sums)

  with mock.patch.object(checkpoints, '_save', fail):
    yield


def copy_of(run, target):
  """Copies a run without its prompts, which the next start must write again."""
  shutil.copytree(run, target)
  shutil.rmtree(target / 'prompts')
  return target


def batches_of_all(directory):
  """Each process makes the batches and keeps its rows; process 0 writes all."""
  task = seqio_task.load('tiny_mixture', 'tests.tiny')
  batches = data.Batches(task, tiny.LENGTHS, 8, seed=1, bucket_multiple=16)
  mesh = partitioning.make_mesh()
  found = {}
  for step in range(STEPS):
    for name, x in device_feed.device_put(batches(step), mesh).items():
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
    wait_for_all(started)
  one, *others = (np.load(tmp_path / f'batches_{n}.npz') for n in (1, 2, 4))
  for other in others:
    assert set(one) == set(other)
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Returns the output of two processes with four devices each."""
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
  assert_close(final(two / 'restart'), final(alone))
  names = {path.name for path in (two / 'restart' / 'checkpoints').iterdir()}
  assert names == {'3', '6', '9', '10', '9.damaged', '10.damaged'}
  output = (two / 'output').read_text()
  assert output.count('checkpoints/10 cannot be read and is skipped') == 2
  assert 'skipped: OSError: Input/output error' in output
  assert 'skipped: another process cannot read it' in output


def test_what_is_trained_in_parts_is_saved_whole(two):
  trained = np.load(two / 'full.npz')
  saved = open_checkpoint(os.fspath(two / 'full')).leaves
  assert set(saved) == set(trained) and len(saved) > 20
  for path, leaf in saved.items():
    np.testing.assert_array_equal(leaf.read(), trained[path], err_msg=path)


def test_a_save_that_fails_is_tried_again_by_all(alone, two):
  assert_close(final(two / 'mended'), final(alone))
  steps = checkpoints.finished_steps(two / 'mended' / 'checkpoints')
  assert steps == [3, 6, 9, 10]
  output = (two / 'output').read_text()
  failed = f'step 6 could not be saved in {two}/mended/checkpoints'
  for process in (0, 1):
    told = re.findall(rf'^\S*{process}\S* .*{failed}.*', output, re.MULTILINE)
    assert len(told) == 2
    assert 'trying again in 0.2 s' in told[1]


def test_a_save_that_fails_for_good_ends_all_and_keeps_the_last_one(two):
  assert checkpoints.finished_steps(two / 'broken' / 'checkpoints') == [3]
  for process in (0, 1):
    error = (two / f'broken_{process}').read_text()
    assert 'step 6 could not be saved' in error
    assert 'checkpoint of step 3 is good and was kept' in error


@pytest.mark.parametrize(('devices', 'model_parallel'), [(1, 1), (4, 4)])
def test_a_run_of_two_processes_goes_on_with_one(
  alone, two, tmp_path, devices, model_parallel
):
  path = copy_of(two / 'model_parallel_1', tmp_path / 'run')
  for step in (9, 10):
    shutil.rmtree(path / 'checkpoints' / str(step))
  make_mesh = functools.partial(
    partitioning.make_mesh, devices=jax.devices()[:devices]
  )
  with mock.patch.object(partitioning, 'make_mesh', make_mesh):
    train.train(**settings(path, model_parallel=model_parallel))
  assert_close(final(path), final(alone))


# ----------------------------------------------------------------- the programs


def wait_for_all(started):
  for process in started:
    assert process.wait() == 0, process.output


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_records(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key, value in a.items():
      if isinstance(value, float):
        assert value == pytest.approx(b[key], abs=1e-5), key
      else:
        assert value == b[key], key


@pytest.mark.parametrize('program', ['eval', 'infer'])
def test_two_processes_answer_as_one_does(tmp_path, program):
  """Evaluates 21 rows in batches of 8, on a mesh of 4 x 2."""
  output = 'EVAL_OUTPUT_DIR' if program == 'eval' else 'INFER_OUTPUT_DIR'
  split = {} if program == 'eval' else {'INFER_SPLIT': 'validation'}

  def arguments(name, **more):
    return tiny.arguments(
      program,
      MODEL_DIR=os.fspath(tiny.trained()),
      **{output: os.fspath(tmp_path / name)},
      **split,
      **more,
    )

  one = tiny.Command(arguments('one'))
  two = tiny.processes(2, arguments('two', MODEL_PARALLEL=2), devices=4)
  wait_for_all([one, *two])
  files = sorted(
    str(path.relative_to(tmp_path / 'one'))
    for path in (tmp_path / 'one').rglob('*.jsonl')
  )
  found = tiny.files(tmp_path / 'two')
  assert {f for f in found if f.endswith('.jsonl')} == set(files)
  assert set(found) == set(tiny.files(tmp_path / 'one'))
  for file in files:
    records = lines_of(tmp_path / 'one' / file)
    assert_same_records(records, lines_of(tmp_path / 'two' / file))
    if 'metrics' not in file:
      assert len(records) == tiny.SIZES['validation']  # Every row once.
  assert len(files) == (2 if program == 'eval' else 1)
  # Only process 0 logs.
  assert 'validation' in two[0].output
  # Gloo's lines, which may be broken, do not begin with a time.
  assert not re.findall(r'^\d\d:\d\d:\d\d .*', two[1].output, re.MULTILINE)


def test_processes_stop_together_end_together_and_go_on(tmp_path):
  """One process gets SIGTERM; then one is killed; then all run to the end."""

  def start(**macros):
    return tiny.processes(
      2,
      tiny.arguments(
        'train',
        MODEL_DIR=os.fspath(tmp_path / 'run'),
        MIXTURE_OR_TASK_NAME='tiny_no_metrics',
        CHECKPOINT_PERIOD=10,
        EVAL_SPLIT=None,
        **macros,
      ),
    )

  def newest():
    return checkpoints.finished_steps(tmp_path / 'run' / 'checkpoints')[-1]

  first, second = start(TRAIN_STEPS=1_000_000)
  first.wait_for('step 50 ')
  second.send(signal.SIGTERM)  # Only one gets the signal.
  begin = time.monotonic()
  assert [first.wait(), second.wait()] == [0, 0]
  assert time.monotonic() - begin < 30
  step = newest()
  assert f'stopped at step {step}, which is saved' in first.output
  assert 'stopped' not in second.output

  first, second = start(TRAIN_STEPS=1_000_000)
  first.wait_for(f'step {step - step % 50 + 50} ')
  first.send(signal.SIGKILL)
  begin = time.monotonic()
  assert first.wait() == -signal.SIGKILL
  assert second.wait() not in (0, -signal.SIGKILL)
  assert time.monotonic() - begin < 60
  assert f'process 0 (host {os.uname().nodename}, pid {first.pid}) is gone' in (
    second.output
  )

  step = newest()
  first, second = start(TRAIN_STEPS=step + 7)
  wait_for_all([first, second])
  assert f'resuming from step {step}' in first.output
  assert np.isfinite(final(tmp_path / 'run', step + 7)).all()
  assert not (tmp_path / 'run' / 'run.lock').exists()


def main():
  args = join()
  together(args.directory, args.base)
  return processes.leave(0)


if __name__ == '__main__':
  sys.exit(main())
