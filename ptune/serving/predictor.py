"""The compiled programs that predict or score a batch."""

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
  """Fetches results to the host while the devices compute the next ones.

  Args:
    asked: Pairs of anything and a result on the devices. Drawing a pair starts
      its computation; we draw one more pair before we wait for a result.

  Yields:
    The same pairs, with the results on the host.
  """
  end = (None, None)
  for (which, answer), _ in itertools.pairwise(itertools.chain(asked, [end])):
    yield which, jax.device_get(answer)


def by_row(
  padded: Iterable[tuple[np.ndarray, Mapping[str, np.ndarray]]],
  put: Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]],
  ask: Callable[[Mapping[str, jax.Array], np.ndarray], Any],
) -> Iterator[tuple[int, Any]]:
  """Yields the result for each row of some batches.

  Args:
    padded: The result of `padding.padded_batches`: the numbers of the examples
      in a batch's first rows, and the batch.
    put: Puts a batch on the devices.
    ask: Takes a batch on the devices and the example's number of each row,
      [batch]. Returns a tuple of arrays [batch, ...], or empty ones.

  Yields:
    The number of an example, and its row of the arrays.
  """

  def asked():
    for rows, batch in padded:
      size = len(next(iter(batch.values())))
      yield rows, ask(put(batch), repeat_last(rows, size))

  for rows, found in fetched(asked()):
    for i, row in enumerate(rows.tolist()):
      yield row, tuple(part[i] if len(part) else () for part in found)


def probabilities(scores: np.ndarray) -> np.ndarray:
  """Returns how likely each label is among all labels of a row.

  Args:
    scores: [rows, labels] log probabilities of the labels as targets.

  Returns:
    [rows, labels], which sum to 1 over the labels.
  """
  likely = np.exp(scores - scores.max(axis=1, keepdims=True))
  return likely / likely.sum(axis=1, keepdims=True)


@functools.lru_cache(maxsize=8)  # Tracing them takes seconds.
def _programs(
  model: EncoderDecoderModel,
  mesh: jax.sharding.Mesh,
  rules: partitioning.Rules,
  max_decode_length: int,
  decoding: Decoding,
  seed: int,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
  """Returns the programs of equal predictors; see `Predictor`."""
  del rules  # The programs are traced under them.
  merge = parameters.merge

  def predict(trees, tokens, rows):
    base = jax.random.key(seed)
    # A row's sample depends on its number, not on its batch.
    keys = jax.vmap(lambda row: jax.random.fold_in(base, row))(rows)
    params = merge(*trees)
    return model.predict(params, tokens, max_decode_length, decoding, keys)

  jit = functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
  return (
    jit(predict),
    jit(lambda trees, batch: model.score(merge(*trees), batch)),
    jit(lambda trees, batch: model.loss(merge(*trees), batch)[1]),
  )


class Predictor:
  """Computes predictions, scores and losses of a batch.

  Each method takes the parameters as one or several trees, which it merges. The
  rows of a batch are split over the devices, and every device gets the whole
  result. A program compiles at its first use;
  equal predictors share it. The methods return before the
  result is computed; `fetched` and jax.device_get wait for it.
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
      max_decode_length: The most tokens of a prediction, its EOS included.
      decoding: How to decode predictions.
      seed: For sampling.
    """
    self._plan = plan
    self._predict, self._score, self._sums = _programs(
      model, plan.mesh, plan.rules, max_decode_length, decoding, seed
    )

  def predict(
    self, trees: Trees, batch: Mapping[str, jax.Array], rows: np.ndarray
  ) -> tuple[jax.Array, jax.Array]:
    """Predictions [batch, max_decode_length], and their scores [batch].

    Args:
      trees: The parameters.
      batch: The features; only `encoder_input_tokens` is read.
      rows: [batch] the number of each row, which seeds its samples.
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
