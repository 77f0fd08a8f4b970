"""Python looks for garbage rarely while ptune starts (host/collector.py)."""

import subprocess
import sys

import pytest

# Prints whether JAX is imported, and the thresholds.
PROGRAM = """
import gc, sys
{before}
{use}
print('jax' in sys.modules, *gc.get_threshold())
"""
PYTHON = 'import ptune; ptune.Base'
COMMAND = 'from ptune import cli; cli.main(["inspect", "ptune://tiny"])'


@pytest.mark.parametrize('use', [PYTHON, COMMAND], ids=['python', 'command'])
@pytest.mark.parametrize(
  ('before', 'young'),
  [
    ('', 50_000),
    ('gc.set_threshold(0)', 0),
    ('gc.set_threshold(10**6)', 10**6),
  ],
)
def test_the_threshold_is_raised_and_never_lowered(before, young, use):
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM.format(before=before, use=use)],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.splitlines()[-1].split()[:2] == ['True', str(young)]
