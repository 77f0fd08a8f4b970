"""Quiet while TensorFlow is imported."""

import contextlib
import os
import sys


@contextlib.contextmanager
def quiet_stderr():
  """Drops what TensorFlow's C++ prints while it is imported.

  It says that there is no CUDA, before it reads any setting of its own.
  Exceptions are not affected.
  """
  if 'tensorflow' in sys.modules:
    yield
    return
  sys.stderr.flush()
  kept = os.dup(2)
  with open(os.devnull, 'w') as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
