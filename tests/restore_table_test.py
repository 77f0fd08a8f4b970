"""The table that a restore prints."""

import jax
import numpy as np

from ptune.convert import open_checkpoint, restore_table
from ptune.methods.prompt import PATH
from tests import layouts


def _struct(*shape, dtype='float32'):
  return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def test_everything_is_accounted_for(numerics):
  path = numerics / layouts.T5_1_1['t5x']
  source = open_checkpoint(path)
  restored = {k: _struct(*x.shape) for k, x in source.leaves.items()}
  lines = restore_table(source, restored, {PATH: _struct(5, 32)}).splitlines()
  assert lines[0] == f'from the t5x checkpoint {path} of step 1100000'
  fields = [line.split() for line in lines[1:]]
  assert fields[0] == ['arrays', 'values', 'bytes']
  assert fields[1] == ['restored', '66', '72,416', '289.7', 'kB', 'float32']
  assert fields[2] == ['initialised', '1', '160', '640', 'bytes', PATH]
  # Each parameter has v and three single values that T5X does not use.
  assert fields[3][:2] == ['ignored', '264']
  assert fields[3][-1] == 'state/param_states/...'
  assert fields[3][2:4] == ['290.5', 'kB']


def test_a_prompt_that_is_not_wanted_is_ignored(numerics):
  source = open_checkpoint(numerics / layouts.T5_1_1['t5x_orbax'])
  restored = {
    k: _struct(*x.shape, dtype='float16')
    for k, x in source.leaves.items()
    if k != PATH
  }
  text = restore_table(source, restored)
  row = next(line for line in text.splitlines() if line.startswith('ignored'))
  # Orbax does not give the sizes of arrays that are not opened.
  assert row.split()[1:3] == ['5', '?'] and 'encoder/prompt/...' in row
  assert '144.8 kB  float16' in text
  assert len({len(line.split('  ')[0]) for line in text.splitlines()[2:]}) > 1


def test_nothing_to_tell_is_told(numerics):
  source = open_checkpoint(numerics / 'hf' / 't5_1_1')
  rows = restore_table(source, {}).splitlines()
  assert rows[-2].split() == ['initialised', '0', '0', '0', 'bytes']
