"""Silences TensorFlow's messages while it is imported."""

import contextlib
import os
import sys


@contextlib.contextmanager
def quiet_stderr():
  """Drops the messages of TensorFlow's C++ code during its import.

  TensorFlow reports missing CUDA libraries before it reads its own settings.
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
