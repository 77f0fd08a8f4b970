"""A run's profile is readable, and does not change the run."""

import gzip
import json
import logging

import jax
import numpy as np

from ptune.training import profiling
from tests import tiny


def traces_of(directory):
  """Returns the events of each Perfetto trace below a directory."""
  found = []
  for path in sorted(directory.rglob('perfetto_trace.json.gz')):
    with gzip.open(path) as f:
      found.append(json.load(f)['traceEvents'])
    # TensorBoard reads the file next to it.
    (planes,) = path.parent.glob('*.xplane.pb')
    assert planes.stat().st_size > 1000
    assert path.parent.parent == directory / 'plugins' / 'profile'
  return found


def steps_of(events):
  return [e['args']['step_num'] for e in events if e.get('name') == 'train']


def test_a_run_traces_the_steps_after_compilation(tmp_path, caplog):
  caplog.set_level(logging.INFO, 'absl')
  tiny.run(tmp_path, eval_split=None, train_steps=5, profile_steps=2)
  (events,) = traces_of(tmp_path / 'profile')
  assert sorted(map(int, steps_of(events))) == [1, 2]
  # The traced steps run programs and compile none.
  names = {str(e.get('name')) for e in events}
  assert any('PjitFunction' in name for name in names)
  assert not any('backend_compile' in name for name in names)
  assert f'--logdir={tmp_path}/profile' in caplog.text
  assert 'https://ui.perfetto.dev' in caplog.text


def test_a_trace_that_is_cut_short_is_written(tmp_path):
  state = jax.numpy.zeros(3)
  add = jax.jit(lambda x: x + 1)
  with profiling.Profile(tmp_path, 10) as profile:
    for step in range(2):
      with profile.step(step, state):
        state = add(state)
  (events,) = traces_of(tmp_path)
  assert sorted(map(int, steps_of(events))) == [0, 1]
  np.testing.assert_array_equal(state, 2)


def test_without_steps_nothing_is_traced(tmp_path):
  for steps in (None, 0):
    with profiling.Profile(tmp_path, steps) as profile, profile.step(0, None):
      pass
  assert not list(tmp_path.iterdir())
