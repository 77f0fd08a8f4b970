"""How a program of its own sets up JAX, where that computes on the CPU.

XLA's CPU backend asks the C library for a step's temporaries anew in each
step. glibc gives so large a piece back to the system when it is freed, and the
system hands out zeroed pages, one fault each, when it is asked again, which
took a sixth of a step (benchmarks/README.md). Here what is freed is kept for
the next step.
"""

import ctypes
import importlib.util
import os

import jax

# From <malloc.h>: no piece is mapped on its own, and the heap never shrinks.
_MALLOC_OPTIONS = {'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, -1)}
# Who has set one of these knows better.
_MALLOC_VARIABLES = ('GLIBC_TUNABLES', 'MALLOC_')
# What JAX's accelerators come with.
_PLUGINS = ('jax_plugins', 'libtpu')


def has_cpu_only() -> bool:
  """Whether JAX has no accelerator; asked before it looks for devices."""
  return os.environ.get('JAX_PLATFORMS') == 'cpu' or not any(
    map(importlib.util.find_spec, _PLUGINS)
  )


def configure_cpu() -> bool:
  """Lets the main thread compute, with memory that it keeps.

  The main thread, because the heaps that glibc gives to others cannot hold
  what is large; and the steps that a loop is ahead of the device would each
  have temporaries of their own. For a process of ptune's own, before JAX looks
  for devices.

  Does nothing where JAX has a plugin for an accelerator, unless JAX_PLATFORMS
  is `cpu`; memory is left to malloc where one of its variables is set, if only
  to nothing (`GLIBC_TUNABLES=`), and where it is not glibc's.

  Returns:
    Whether memory is kept.
  """
  if not has_cpu_only():
    return False
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  if any(name.startswith(_MALLOC_VARIABLES) for name in os.environ):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # Another C library.
    return False
  return all(mallopt(*option) for option in _MALLOC_OPTIONS.values())


def cache_compiled_programs() -> None:
  """Lets JAX keep compiled programs on disk: a second start need not compile.

  In JAX_COMPILATION_CACHE_DIR, or in ~/.cache/ptune if nobody chose a place.
  """
  if jax.config.jax_compilation_cache_dir is None:
    cache = os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))
    jax.config.update('jax_compilation_cache_dir', os.path.join(cache, 'ptune'))
  # Small models have many programs that compile in less than JAX's second.
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
