"""Poisson sampling draws each row independently; no row is lost or added."""

import numpy as np
import pytest

from ptune.convert.pieces import Bytes
from ptune.data import poisson
from ptune.tasks import files
from tests import tiny

ROWS = 60
TASK = files.from_rows(
  {'train': [(f'{i:02}', f'{i:02}') for i in range(ROWS)]},
  name='numbers',
  vocabulary=Bytes(),
)


def batches(key=5, size=12, **settings):
  return poisson.PoissonBatches(TASK, tiny.LENGTHS, size, key=key, **settings)


def rows_of(batch):
  """Returns the numbers in the rows of a batch that count."""
  real = batch['decoder_loss_weights'].any(axis=1)
  texts = [TASK.vocabulary.decode(x.tolist()) for x in
           batch['decoder_target_tokens'][real]]  # fmt: skip
  return [int(text) for text in texts]


def test_each_row_is_drawn_by_itself_with_the_same_chance():
  read, steps = batches(), 2000
  drawn = np.zeros((steps, ROWS))
  for step in range(steps):
    drawn[step, read.drawn(step)] = 1
  p = 12 / ROWS
  deviation = np.sqrt(p * (1 - p) / steps)
  assert np.abs(drawn.mean(axis=0) - p).max() < 5 * deviation
  # Rows and steps are independent, so the counts are binomial.
  counts = drawn.sum(axis=1)
  np.testing.assert_allclose(counts.var(), ROWS * p * (1 - p), rtol=0.15)
  for x, y in ((drawn[:, 0], drawn[:, 1]), (drawn[1:, 0], drawn[:-1, 0])):
    assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(steps)


def test_a_batch_holds_the_rows_that_were_drawn_and_no_others():
  read = batches(multiple=8)
  # 12 + 4 * sqrt(12 * 0.8), rounded up to a multiple of 8.
  assert read.room == 32
  for step in range(20):
    batch = read(step)
    assert rows_of(batch) == read.drawn(step).tolist()
    assert {len(x) for x in batch.values()} == {32}
    rest = ~batch['decoder_loss_weights'].any(axis=1)
    for value in batch.values():
      assert not value[rest].any()  # Padding is 0 too.


def test_no_row_is_left_out_of_a_large_batch_and_a_batch_may_be_empty():
  read = batches()
  read.room = 4
  sizes = {len(read(step)['encoder_input_tokens']) for step in range(50)}
  assert len(sizes) > 2 and all(size % 4 == 0 for size in sizes)
  for step in range(50):
    assert rows_of(read(step)) == read.drawn(step).tolist()
  read.chance = 0.0
  assert rows_of(read(0)) == [] and len(read(0)['encoder_input_tokens']) == 4


def test_the_key_and_the_step_decide():
  np.testing.assert_array_equal(batches().drawn(3), batches().drawn(3))
  others = [batches().drawn(4), batches(key=6).drawn(3)]
  assert all(x.tolist() != batches().drawn(3).tolist() for x in others)
  with pytest.raises(ValueError, match='numbers:train has 60 rows; Poisson'):
    batches(size=61)
