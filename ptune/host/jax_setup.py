"""Sets up JAX for a ptune process: memory on the CPU, the compilation cache.

XLA's CPU backend allocates the temporaries of a step again in every step. glibc
returns such large blocks to the system when they are freed. At the next
allocation, the system hands out zeroed pages with one page fault each, which
took a sixth of a step (benchmarks/README.md). We make glibc keep freed memory
for the next step.
"""

import ctypes
import importlib.util
import os

import jax

# From <malloc.h>: never use mmap for a block, and never shrink the heap.
_MALLOC_OPTIONS = {'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, -1)}
# If the user has set one of these, we do not change malloc.
_MALLOC_VARIABLES = ('GLIBC_TUNABLES', 'MALLOC_')
# The packages of JAX's accelerators.
_PLUGINS = ('jax_plugins', 'libtpu')


def has_cpu_only() -> bool:
  """Whether JAX has no accelerator; works before JAX looks for devices."""
  return os.environ.get('JAX_PLATFORMS') == 'cpu' or not any(
    map(importlib.util.find_spec, _PLUGINS)
  )


def configure_cpu() -> bool:
  """Computes on the main thread, and keeps freed memory.

  We compute on the main thread, because glibc's heaps of other threads cannot
  hold large blocks, and because each step that runs ahead would have its own
  temporaries. Call this in a process that belongs to ptune, before JAX looks
  for devices.

  If JAX has a plugin for an accelerator, this does nothing unless JAX_PLATFORMS
  is `cpu`. It does not change malloc if one of malloc's variables is set, even
  to an empty value (`GLIBC_TUNABLES=`), or if the C library is not glibc.

  Returns:
    Whether freed memory is kept.
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
  """Makes JAX cache compiled programs on disk, so a second start is faster.

  The cache is in JAX_COMPILATION_CACHE_DIR, or in ~/.cache/ptune by default.
  """
  if jax.config.jax_compilation_cache_dir is None:
    cache = os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))
    jax.config.update('jax_compilation_cache_dir', os.path.join(cache, 'ptune'))
  # JAX caches programs that compile for a second or more; ours are smaller.
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
