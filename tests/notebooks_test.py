"""The notebooks of examples/ run as they are, one cell after the other."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob('examples/*.ipynb'))


def cells(notebook):
  """Returns the code cells."""
  found = json.loads(notebook.read_text())['cells']
  return [''.join(c['source']) for c in found if c['cell_type'] == 'code']


def program(notebook):
  """Returns the code without IPython's commands, with few steps and rows."""
  code = '\n'.join(cell for cell in cells(notebook) if cell[0] != '%')
  for long, short in (('steps=300', 'steps=3'), ('2000', '40'), ('200', '8')):
    code = code.replace(long, short)
  return code


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean_and_is_installed_by_its_first_cell(notebook):
  first, *others = cells(notebook)
  assert first.startswith('%pip install -q "ptune')
  assert not any('%' in cell.split('\n')[0][:1] for cell in others)
  for cell in json.loads(notebook.read_text())['cells']:
    assert not cell.get('outputs') and cell.get('execution_count') is None
  compile(program(notebook), notebook.name, 'exec')


@pytest.mark.slow
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', program(notebook)],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg'},
  )
  assert done.returncode == 0, done.stderr
