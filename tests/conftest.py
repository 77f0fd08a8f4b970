"""Every test runs on eight fake CPU devices, with silent surprises made loud.

Rank promotion raises, so a forgotten axis cannot broadcast; warnings are
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
# The library's tasks have T5's vocabulary, which is on gs://, unless told.
os.environ['PTUNE_VOCABULARY'] = 'ptune://tiny'
# Programs are compiled once for all processes: xdist's workers and the commands
# that tests start inherit the place.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  compiled = tempfile.mkdtemp(prefix='ptune-compiled-')
  atexit.register(shutil.rmtree, compiled, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = compiled
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import pytest
from absl import logging

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Most programs run a few times only: to compile them well would take longer.
jax.config.update('jax_disable_most_optimizations', True)
logging.set_verbosity(logging.INFO)  # As the command line does.

SHARED = pathlib.Path(__file__).parents[2] / 'shared'


@pytest.fixture(autouse=True, scope='module')
def forget():
  """Drops the compiled programs of a module: gigabytes in the end."""
  yield
  jax.clear_caches()
  gc.collect()
  gc.freeze()


@pytest.fixture
def optimized():
  """Programs are compiled as users have them."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session')
def numerics():
  """The values made by running the reference implementations."""
  path = SHARED / 'golden' / 'numerics'
  if not path.is_dir():
    pytest.skip(f'the reference values are not at {path}')
  return path
