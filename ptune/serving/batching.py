"""A queue that turns single requests into batches, which may mix prompts.

Rows wait in a queue. While the devices compute one batch, the next one fills.
When the devices are free, a batch starts once it is full, or `max_wait` after
its oldest row arrived. Nothing here knows about HTTP.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from ptune.data import bucketing, device_feed, padding, seqio_task
from ptune.serving.bank import PromptBank, UnknownPrompt, unknown

# The answer's tokens [max_decode_length] and their log probability; or the
# given targets and theirs.
Answer = tuple[np.ndarray, float]


class Full(Exception):
  """The queue has no room for these rows."""


class _Row(NamedTuple):
  name: str
  tokens: np.ndarray  # [length]
  targets: np.ndarray | None  # [target length]; None to be answered.
  since: float
  answer: asyncio.Future[Answer]


class Batcher:
  """A queue in front of a bank; use it within one event loop."""

  def __init__(
    self,
    bank: PromptBank,
    input_length: int,
    output_length: int,
    batch_size: int = 32,
    max_wait: float = 0.005,
    max_queue: int = 512,
    observe: Callable[[int, float], None] = lambda rows, seconds: None,
  ):
    """Makes an empty queue; `run` processes it.

    Args:
      bank: The prompts and the model.
      input_length: The most tokens of a row.
      output_length: The most tokens of a target.
      batch_size: The most rows of a batch.
      max_wait: The seconds that a row waits for others.
      max_queue: The most rows that may wait.
      observe: Called with the number of rows of each batch and its seconds.
    """
    device_feed.check_batch_size(batch_size, bank.plan.mesh)
    self._bank = bank
    self.input_length, self.output_length = input_length, output_length
    self.batch_size, self.max_queue = batch_size, max_queue
    self._max_wait, self._observe = max_wait, observe
    self._queue: collections.deque[_Row] = collections.deque()
    self._some, self._enough = asyncio.Event(), asyncio.Event()
    # The only thread that uses the devices.
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'ptune-batches')

  @property
  def waiting(self) -> int:
    """Rows in the queue."""
    return len(self._queue)

  def warm_up(self) -> None:
    """Compiles the programs for batches of every shape."""
    name = '(warm-up)'  # No user's prompt can have this name: see NAME.
    never: Any = (None, 0.0, None)
    self._bank.add(name, np.zeros((1, self._bank.embed), np.float32))
    step, eos = (
      bucketing.BUCKET_MULTIPLE,
      self._bank.plan.network.config.ids.eos,
    )
    for length in (*range(step, self.input_length, step), self.input_length):
      for count in {1, self.batch_size}:
        tokens = np.full(length, eos, np.int32)
        self._ask_bank([_Row(name, tokens, *never)] * count)
    self._bank.remove(name)

  async def ask(
    self,
    name: str,
    rows: Sequence[np.ndarray],
    targets: Sequence[np.ndarray] | None = None,
  ) -> list[Answer]:
    """Returns the model's answer to each row, or the score of its target.

    Args:
      name: The prompt.
      rows: Tokens [length] of each row, EOS included; at most input_length.
      targets: Tokens [target length] of each row's target, EOS included; at
        most output_length. None to generate answers.

    Raises:
      Full: At once, if the queue has no room for all rows.
      UnknownPrompt: If no prompt has this name, or it is removed meanwhile.
    """
    if name not in self._bank.lengths:
      raise UnknownPrompt(unknown(name, self._bank.lengths))
    if len(self._queue) + len(rows) > self.max_queue:
      raise Full
    loop = asyncio.get_running_loop()
    asked = [
      _Row(name, tokens, target, loop.time(), loop.create_future())
      for tokens, target in zip(
        rows, targets or [None] * len(rows), strict=True
      )
    ]
    self._queue.extend(asked)
    self._tell()
    try:
      return list(await asyncio.gather(*(row.answer for row in asked)))
    finally:  # If the caller gave up, do not compute its rows.
      for row in asked:
        row.answer.cancel()

  async def run(self) -> None:
    """Processes the queue until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
      await self._some.wait()
      left = self._queue[0].since + self._max_wait - loop.time()
      if left > 0:
        with contextlib.suppress(TimeoutError):
          await asyncio.wait_for(self._enough.wait(), left)
      count = min(len(self._queue), self.batch_size)
      batch = [self._queue.popleft() for _ in range(count)]
      self._tell()
      batch = [row for row in batch if not row.answer.done()]
      if not batch:
        continue
      answers = await loop.run_in_executor(self._thread, self._answer, batch)
      for row, answer in zip(batch, answers, strict=True):
        if row.answer.done():
          continue
        if isinstance(answer, Exception):
          row.answer.set_exception(answer)
        else:
          row.answer.set_result(answer)

  def _tell(self) -> None:
    """Sets or clears the events that `run` waits for."""
    for event, least in ((self._some, 1), (self._enough, self.batch_size)):
      (event.set if len(self._queue) >= least else event.clear)()

  def _answer(self, rows: list[_Row]) -> list[Any]:
    """An answer or an exception for each row, so a bad row affects no other."""
    start = time.monotonic()
    answers: list[Any] = [None] * len(rows)
    while True:
      known = self._bank.lengths
      for i, row in enumerate(rows):
        if row.name not in known:
          answers[i] = UnknownPrompt(unknown(row.name, known))
      left = [i for i, answer in enumerate(answers) if answer is None]
      try:
        said = self._ask_bank([rows[i] for i in left]) if left else []
      except UnknownPrompt:
        continue  # Removed just now.
      except Exception as error:
        logging.exception('a batch of %d rows failed', len(left))
        said = [error] * len(left)
      break
    for i, answer in zip(left, said, strict=True):
      answers[i] = answer
    self._observe(len(rows), time.monotonic() - start)
    return answers

  def _ask_bank(self, rows: list[_Row]) -> list[Answer]:
    """Computes at most batch_size rows; rows with targets in a second batch."""
    found: list[Any] = [None] * len(rows)
    for scored in (False, True):
      which = [i for i, r in enumerate(rows) if (r.targets is None) != scored]
      if which:
        ask = self._score if scored else self._predict
        answers = ask([rows[i] for i in which])
        for i, answer in zip(which, answers, strict=True):
          found[i] = answer
    return found

  def _predict(self, rows: list[_Row]) -> list[Answer]:
    found: list[Any] = [None] * len(rows)
    for which, names, batch in self._batches(rows, np.zeros(1, np.int32)):
      tokens, scores = self._bank.predict(names, batch['encoder_input_tokens'])
      for i, ids, score in zip(which, tokens, scores, strict=False):
        found[i] = ids, float(score)
    return found

  def _score(self, rows: list[_Row]) -> list[Answer]:
    found: list[Any] = [None] * len(rows)
    # Round the length up to a power of two, so that few programs compile.
    longest = max(len(row.targets) for row in rows if row.targets is not None)
    length = min(1 << (longest - 1).bit_length(), self.output_length)
    for which, names, batch in self._batches(rows, np.zeros(length, np.int32)):
      scores = self._bank.score(names, batch)
      for i, score in zip(which, scores, strict=False):
        found[i] = rows[i].targets, float(score)
    return found

  def _batches(self, rows: list[_Row], no_target: np.ndarray):
    """Yields the numbers of a batch's rows, their prompts, and the features."""
    # A few rows use a smaller program.
    few = self._bank.plan.mesh.shape['data']
    size = few if len(rows) <= few else self.batch_size
    examples = []
    special = self._bank.plan.network.config.ids
    padded = lambda tokens, length: padding.filled_up(
      [tokens], length, 'encoder_input_tokens', special.pad
    )[0]
    for row in rows:
      target = no_target
      if row.targets is not None:
        target = padded(row.targets, len(no_target))
      inputs = padded(row.tokens, self.input_length)
      example = seqio_task.model_features(inputs, target, special)
      weights = np.arange(len(target)) < len(
        no_target if row.targets is None else row.targets
      )
      example['decoder_loss_weights'] = weights.astype(np.int32)
      examples.append(example)
    for which, batch in padding.padded_batches(examples, size, pad=special.pad):
      numbers = padding.repeat_last(which, size)
      yield which, [rows[i].name for i in numbers], batch
