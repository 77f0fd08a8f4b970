"""The predictor starts the next batch before it waits for the last result."""

import jax
import numpy as np

from ptune.serving import predictor


def test_the_next_is_asked_before_an_answer_is_waited_for(monkeypatch):
  order = []
  wait = jax.device_get

  def waited(answer):
    order.append(f'wait {answer[0]}')
    return wait(answer)

  monkeypatch.setattr(jax, 'device_get', waited)

  def asked():
    for i in range(3):
      order.append(f'ask {i}')
      yield f'batch {i}', (i, jax.numpy.full(2, i))

  found = list(predictor.fetched(asked()))
  assert order == ['ask 0', 'ask 1', 'wait 0', 'ask 2', 'wait 1', 'wait 2']
  assert [name for name, _ in found] == ['batch 0', 'batch 1', 'batch 2']
  for i, (_, (number, array)) in enumerate(found):
    assert (number, type(array)) == (i, np.ndarray)
    np.testing.assert_array_equal(array, [i, i])
  assert not list(predictor.fetched([]))
