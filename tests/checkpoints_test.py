"""Checkpoints (ptune/training/checkpoints.py) are small, whole, and checked."""

import gc
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptune.convert.fingerprint import of_params
from ptune.host.files import absolute
from ptune.methods import prompt
from ptune.model import parameters, partitioning, sizes
from ptune.training import checkpoints, optim, run_file
from ptune.training import state as state_lib
from tests import tiny

SUMS = {'loss': 1.1, 'tokens': 3.0}


def make_state(config=tiny.CONFIG, length=3, step=4, seed=0):
  """Returns a state with random values, and its shapes and shardings."""
  mesh = partitioning.make_mesh()
  plan = parameters.plan(config, prompt.prompt(length), mesh)
  tx = optim.adafactor()
  abstract = state_lib.abstract_state(tx, plan)
  rng = np.random.default_rng(seed)

  def draw(x):
    values = rng.normal(size=x.shape).astype(x.dtype)
    return jax.device_put(values, x.sharding)

  state = jax.tree.map(draw, abstract)
  return state.replace(step=jax.device_put(jnp.int32(step))), abstract


def assert_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def save(directory, *states, keep=None, start=0):
  with checkpoints.Checkpoints(directory, start, keep) as saved:
    for state in states:
      saved.save(state, SUMS)


def test_what_is_saved_is_restored_to_the_bit(tmp_path):
  state, abstract = make_state()
  save(tmp_path, state)
  restored, sums = checkpoints.restore(tmp_path, abstract)
  assert_equal(restored, state)
  assert sums == SUMS
  assert jax.tree.map(lambda x: x.sharding, restored.trainable) == (
    jax.tree.map(lambda x: x.sharding, abstract.trainable)
  )


def test_nothing_is_restored_from_nothing(tmp_path):
  _, abstract = make_state()
  assert checkpoints.restore(tmp_path / 'none', abstract) is None
  assert checkpoints.restore(tmp_path, abstract) is None
  assert checkpoints.finished_steps(tmp_path / 'none') == []


def test_a_checkpoint_for_t5_small_stays_under_2_mb(tmp_path):
  # The prompt has 100 tokens (205 kB), and Adafactor's moment is as large.
  state, _ = make_state(sizes.t5('t5_1_1_small'), length=100)
  save(tmp_path, state)
  size = sum(map(len, tiny.files(tmp_path / '4').values()))
  assert 200_000 < size < 2_000_000  # The moment is zero, so it compresses.


def test_only_the_newest_are_kept_if_so_wished(tmp_path):
  states = [make_state(step=step)[0] for step in (1, 2, 3, 4)]
  save(tmp_path, *states, keep=2)
  assert checkpoints.finished_steps(tmp_path) == [3, 4]


def test_a_checkpoint_is_not_written_twice(tmp_path):
  first, abstract = make_state(seed=0)
  second, _ = make_state(seed=1)
  save(tmp_path, first, second)
  restored, _ = checkpoints.restore(tmp_path, abstract)
  assert_equal(restored, first)


def test_what_is_newer_than_the_start_is_set_aside(tmp_path):
  for step in (1, 2, 3):
    save(tmp_path, make_state(step=step)[0], start=step)
  (tmp_path / '2.damaged').mkdir()
  save(tmp_path, make_state(step=2, seed=1)[0], start=1)
  assert checkpoints.finished_steps(tmp_path) == [1, 2]
  names = {path.name for path in tmp_path.iterdir()}
  assert {'2.damaged', '2.damaged2', '3.damaged'} < names
  assert tiny.files(tmp_path / '2.damaged2')


def test_what_was_cut_short_is_no_checkpoint(tmp_path):
  state, abstract = make_state(step=2)
  save(tmp_path, state)
  # Orbax leaves this directory if it is killed.
  (tmp_path / '3.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  assert checkpoints.finished_steps(tmp_path) == [2]
  assert int(checkpoints.restore(tmp_path, abstract)[0].step) == 2
  save(tmp_path, make_state(step=3)[0], start=2)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '3']


def test_the_state_of_another_optimizer_is_told_from_damage(tmp_path):
  state, abstract = make_state()
  save(tmp_path, state.replace(opt_state={'m': jnp.zeros(3)}))
  with pytest.raises(
    ValueError, match='4 holds the state of another optimizer'
  ):
    checkpoints.restore(tmp_path, abstract)


def spoiled(contents):
  """Yields contents of a damaged file: cut, empty, garbled; None for lost."""
  half = len(contents) // 2
  noise = bytes(b ^ 0x55 for b in contents[half : half + 8])
  yield contents[:half]
  yield b''
  yield contents[:half] + noise + contents[half + 8 :]
  yield None


@pytest.fixture
def collected():
  """Collects garbage, so Orbax's threads warn here, not in a later test."""
  yield
  gc.collect()


# Orbax's threads raise when a file is damaged.
careless = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@careless
def test_whatever_file_is_damaged_no_other_values_are_restored(
  tmp_path, collected
):
  old, abstract = make_state(step=4, seed=0)
  new, _ = make_state(step=8, seed=1)
  save(tmp_path, old, new)
  noticed = 0
  for path in sorted((tmp_path / '8').rglob('*')):
    if not path.is_file():
      continue
    contents = path.read_bytes()
    for damaged in spoiled(contents):
      path.unlink() if damaged is None else path.write_bytes(damaged)
      restored, _ = checkpoints.restore(tmp_path, abstract)
      assert_equal(restored, {4: old, 8: new}[int(restored.step)])
      noticed += int(restored.step) == 4
      path.write_bytes(contents)
  assert noticed > 10
  restored, _ = checkpoints.restore(tmp_path, abstract)
  assert_equal(restored, new)


@careless
def test_damage_is_told_in_one_line(tmp_path, caplog, collected):
  state, abstract = make_state()
  save(tmp_path, state)
  for path in (tmp_path / '4' / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  with pytest.raises(ValueError, match=r'none of the checkpoints \[4\] in'):
    checkpoints.restore(tmp_path, abstract)
  text = f'checkpoint {tmp_path}/4 cannot be read and is skipped: '
  (message,) = (m for m in caplog.messages if m.startswith(text))
  assert '\n' not in message


def test_the_best_state_replaces_the_one_before(tmp_path):
  for step in (2, 4, 3):  # An earlier start, since stopped, saved 4.
    checkpoints.save_best(tmp_path, make_state(step=step)[0])
    assert checkpoints.finished_steps(tmp_path) == [step]


# ------------------------------------------------------------ facts of a run


def test_a_run_is_known_by_its_facts(tmp_path):
  assert run_file.read(tmp_path) == {}
  run = {'method': 'prompt', 'seed': 1}
  run_file.claim(tmp_path, run, {'initial_checkpoint_path': '/base'})
  run_file.claim(tmp_path, {'method': 'full'}, {})  # Already claimed.
  present = run_file.read(tmp_path)
  assert present == {**run, 'initial_checkpoint_path': '/base'}
  run_file.compare(tmp_path, present, run)
  with pytest.raises(
    ValueError, match=r"'prompt' there, 'full' here\n.*2 here"
  ):
    run_file.compare(tmp_path, present, {'method': 'full', 'seed': 2})


def test_a_damaged_run_file_is_named(tmp_path):
  (tmp_path / 'run.json').write_text('{"method": ')
  with pytest.raises(ValueError, match=r'run\.json is damaged'):
    run_file.read(tmp_path)


def test_directories_mean_the_same_everywhere(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', '/home/me')
  assert absolute('runs/a') == tmp_path / 'runs' / 'a'
  assert absolute('~/a') == pathlib.Path('/home/me/a')
  assert str(absolute('gs://bucket/a')) == 'gs://bucket/a'
  for wrong in ('', None, 3):
    with pytest.raises(ValueError, match='it must be a directory'):
      run_file.run_directory(wrong)


def base_params(mesh, dtype=jnp.float32):
  plan = parameters.plan(tiny.CONFIG, prompt.prompt(3), mesh)
  rng = np.random.default_rng(0)
  values = {
    path: rng.normal(size=x.shape).astype(
      dtype if len(x.shape) > 1 else x.dtype
    )
    for path, x in plan.select(plan.base).items()
  }
  return {
    path: jax.device_put(value, plan.params[path].sharding)
    for path, value in values.items()
  }


def test_the_fingerprint_is_of_the_weights_alone():
  devices = jax.devices()
  one = base_params(partitioning.make_mesh(devices=devices[:1]))
  expected = of_params(one)
  split = base_params(partitioning.make_mesh(2, devices))
  assert of_params(split) == expected
  rounded = base_params(
    partitioning.make_mesh(devices=devices[:1]), jnp.bfloat16
  )
  assert of_params(rounded) == expected
  assert of_params(dict(reversed(one.items()))) == expected
  path = 'encoder/layers_0/mlp/wo/kernel'
  for changed in (one[path].at[7, 3].mul(1.01), one[path][::-1]):
    assert of_params({**one, path: changed}) != expected
  assert of_params({f'{k}x': v for k, v in one.items()}) != expected


def test_a_checkpoint_is_read_by_the_reader_of_base_models(tmp_path):
  from ptune.convert import open_checkpoint

  state, _ = make_state()
  save(tmp_path / 'checkpoints', state)
  source = open_checkpoint(tmp_path)
  assert source.step == 4 and list(source.leaves) == [prompt.PATH]
  np.testing.assert_array_equal(
    source.leaves[prompt.PATH].read(),
    parameters.flatten(state.trainable)[prompt.PATH],
  )
  metadata = (tmp_path / 'checkpoints/4/state/_METADATA').read_text()
  assert json.loads(metadata)
