"""The programs that answer a batch, each compiled at its first use."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ptune.data.padding import repeat_last
from ptune.model import parameters, partitioning
from ptune.model.models import Decoding, EncoderDecoderModel

Trees = tuple[Mapping[str, Any], ...]


def fetched(asked: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
  """Brings answers to the host, while the devices compute the next.

  Args:
    asked: Pairs of anything and an answer on the devices, made as they are
      drawn: each is drawn before the answer of the one before is waited for.
  """
  end = (None, None)
  for (which, answer), _ in itertools.pairwise(itertools.chain(asked, [end])):
    yield which, jax.device_get(answer)


def by_row(
  padded: Iterable[tuple[np.ndarray, Mapping[str, np.ndarray]]],
  put: Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]],
  ask: Callable[[Mapping[str, jax.Array], np.ndarray], Any],
) -> Iterator[tuple[int, Any]]:
  """Yields the answer to each row of some batches.

  Args:
    padded: Batches, and which examples their first rows hold, of
      `padding.padded_batches`.
    put: Puts a batch on the devices.
    ask: Of a batch on the devices, and [batch] which example is in each row.
      What it returns is a tuple of [batch, ...] arrays, or empty ones.

  Yields:
    The number of an example, and its part of what `ask` returned.
  """

  def asked():
    for rows, batch in padded:
      size = len(next(iter(batch.values())))
      yield rows, ask(put(batch), repeat_last(rows, size))

  for rows, found in fetched(asked()):
    for i, row in enumerate(rows.tolist()):
      yield row, tuple(part[i] if len(part) else () for part in found)


class Predictor:
  """Predictions, scores and losses of a batch.

  What is asked of it takes the parameters as one or several trees, which are
  merged; rows are split over the devices, each has the whole answer. Nothing
  waits for it: `fetched` and jax.device_get do.
  """

  def __init__(
    self,
    plan: parameters.Plan,
    model: EncoderDecoderModel,
    max_decode_length: int,
    decoding: Decoding = Decoding(),
    seed: int = 0,
  ):
    """Prepares the programs.

    Args:
      plan: The parameters.
      model: The model.
      max_decode_length: Most tokens of an answer, its EOS included.
      decoding: How predictions are decoded.
      seed: For sampling.
    """
    self._plan = plan
    merge = parameters.merge

    def predict(trees, tokens, rows):
      base = jax.random.key(seed)
      # A row's sample depends on the row, not on the batch it is put in.
      keys = jax.vmap(lambda row: jax.random.fold_in(base, row))(rows)
      params = merge(*trees)
      return model.predict(params, tokens, max_decode_length, decoding, keys)

    jit = functools.partial(
      jax.jit, out_shardings=partitioning.replicated(plan.mesh)
    )
    self._predict = jit(predict)
    self._score = jit(lambda trees, batch: model.score(merge(*trees), batch))
    self._sums = jit(lambda trees, batch: model.loss(merge(*trees), batch)[1])

  def predict(
    self, trees: Trees, batch: Mapping[str, jax.Array], rows: np.ndarray
  ) -> tuple[jax.Array, jax.Array]:
    """Answers [batch, max_decode_length], and their scores [batch].

    Args:
      trees: The parameters.
      batch: With `encoder_input_tokens`.
      rows: [batch] a number of each row, from which its samples are drawn.
    """
    with self._plan.scope():
      return self._predict(
        trees, batch['encoder_input_tokens'], rows.astype(np.uint32)
      )

  def score(self, trees: Trees, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Log probabilities of the targets: [batch]."""
    with self._plan.scope():
      return self._score(trees, batch)

  def sums(
    self, trees: Trees, batch: Mapping[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """The sums of `EncoderDecoderModel.loss`."""
    with self._plan.scope():
      return self._sums(trees, batch)
