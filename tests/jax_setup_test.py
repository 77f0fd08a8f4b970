"""What the `ptune` command sets up for XLA on a CPU (jax_setup.py)."""

import os
import subprocess
import sys
import types

import jax
import pytest

from ptune.host import jax_setup
from tests import tiny

# Prints whether malloc keeps memory, and the fewest page faults of a step after
# the first. A step has 64 MB of temporaries (16,384 pages). We take the fewest
# because the heap may grow again.
STEP = """
import resource
import jax, jax.numpy as jnp
from ptune.host import jax_setup

kept = jax_setup.configure_cpu()
step = jax.jit(lambda x: jax.lax.optimization_barrier(jnp.outer(x, x)) @ x)
x = jnp.ones(4096)
faults = []
for _ in range(8):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults[1:]))
"""


def faults(**environment):
  ours = {
    k: v
    for k, v in tiny.environment().items()
    if not k.startswith(jax_setup._MALLOC_VARIABLES)
  }
  result = subprocess.run(
    [sys.executable, '-c', STEP],
    env={**ours, 'JAX_PLATFORMS': 'cpu', **environment},
    capture_output=True,
    text=True,
    check=True,
  )
  kept, count = result.stdout.split()
  return kept == 'True', int(count)


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc is asked')
def test_a_step_has_no_page_faults():
  kept, count = faults()
  assert kept and count < 100
  # With these settings, ptune does not change malloc.
  for name, value in (
    ('MALLOC_MMAP_MAX_', '65536'),
    ('GLIBC_TUNABLES', ''),
  ):
    kept, count = faults(**{name: value})
    assert not kept and count > 10_000


@pytest.fixture
def asked(monkeypatch):
  """Records what configure() sets, because JAX has its devices already."""
  found = {}
  monkeypatch.setattr(
    jax.config, 'update', lambda name, value: found.update({name: value})
  )

  def mallopt(option, value):
    found[option] = value
    return 1

  library = types.SimpleNamespace(mallopt=mallopt)
  monkeypatch.setattr(jax_setup.ctypes, 'CDLL', lambda name: library)
  monkeypatch.setattr(jax_setup.importlib.util, 'find_spec', lambda name: None)
  for name in list(os.environ):
    if name.startswith((*jax_setup._MALLOC_VARIABLES, 'JAX_PLATFORMS')):
      monkeypatch.delenv(name)
  return found


@pytest.mark.parametrize('plugin', ['jax_plugins', 'libtpu'])
def test_a_host_of_accelerators_keeps_its_own(asked, monkeypatch, plugin):
  monkeypatch.setattr(
    jax_setup.importlib.util, 'find_spec', lambda name: name == plugin or None
  )
  assert not jax_setup.configure_cpu() and asked == {}
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert jax_setup.configure_cpu()
  assert asked == {'jax_cpu_enable_async_dispatch': False, -4: 0, -1: -1}


def test_another_c_library_has_no_such_options(asked, monkeypatch):
  monkeypatch.setattr(jax_setup.ctypes, 'CDLL', lambda name: object())
  assert not jax_setup.configure_cpu()
  assert asked == {'jax_cpu_enable_async_dispatch': False}
