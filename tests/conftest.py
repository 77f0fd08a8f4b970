"""Runs every test on eight fake CPU devices and makes silent errors loud.

Rank promotion raises, so a forgotten axis cannot broadcast. Warnings are
errors (pyproject.toml).
"""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile

from tests import QUICK_FLAGS

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    QUICK_FLAGS,
  ]
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# T5's vocabulary, the default of the library's tasks, is on gs://.
os.environ['PTUNE_VOCABULARY'] = 'ptune://tiny'
# xdist's workers and the commands that tests start share one compilation cache,
# so each program is compiled only once.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  compiled = tempfile.mkdtemp(prefix='ptune-compiled-')
  atexit.register(shutil.rmtree, compiled, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = compiled
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import pytest
from absl import logging

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tests run most programs only a few times, so optimizing them would cost more
# time than it saves.
jax.config.update('jax_disable_most_optimizations', True)
logging.set_verbosity(logging.INFO)  # Like the command line.

SHARED = pathlib.Path(__file__).parents[2] / 'shared'


@pytest.fixture(autouse=True, scope='module')
def forget():
  """Drops a module's compiled programs, which would grow to gigabytes."""
  yield
  jax.clear_caches()
  gc.collect()
  gc.freeze()


@pytest.fixture
def optimized():
  """Compiles programs with the optimizations that users get."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session')
def numerics():
  """Returns the directory of values from running the reference."""
  path = SHARED / 'golden' / 'numerics'
  if not path.is_dir():
    pytest.skip(f'the reference values are not at {path}')
  return path
