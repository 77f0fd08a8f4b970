"""Requests that come one by one, answered in batches of any prompts.

Rows wait in a queue. While the devices compute one batch the next one gathers;
when they are free, they wait no longer for more rows than `max_wait` after the
oldest came. Nothing here knows of HTTP.
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

from ptune.data import batches as data
from ptune.serving.bank import PromptBank, UnknownPrompt, unknown

Answer = tuple[np.ndarray, float]  # Tokens [max_decode_length], their score.


class Full(Exception):
  """More rows wait than the queue may hold."""


class _Row(NamedTuple):
  name: str
  tokens: np.ndarray  # [length]
  since: float
  answer: asyncio.Future[Answer]


class Batcher:
  """A queue before a bank; to be used within one event loop."""

  def __init__(
    self,
    bank: PromptBank,
    input_length: int,
    batch_size: int = 32,
    max_wait: float = 0.005,
    max_queue: int = 512,
    observe: Callable[[int, float], None] = lambda rows, seconds: None,
  ):
    """Prepares the queue; `run` empties it.

    Args:
      bank: The prompts, and the model.
      input_length: Most tokens of a row.
      batch_size: Most rows of a batch.
      max_wait: Seconds that a row waits for others.
      max_queue: Most rows that wait.
      observe: Called with the rows of each batch, and the seconds it took.
    """
    data.check_batch_size(batch_size, bank.plan.mesh)
    self._bank, self.input_length = bank, input_length
    self.batch_size, self.max_queue = batch_size, max_queue
    self._max_wait, self._observe = max_wait, observe
    self._queue: collections.deque[_Row] = collections.deque()
    self._some, self._enough = asyncio.Event(), asyncio.Event()
    # The one that asks the devices.
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'ptune-batches')

  @property
  def waiting(self) -> int:
    """Rows in the queue."""
    return len(self._queue)

  def warm_up(self) -> None:
    """Compiles what batches of every shape need."""
    name = ' '  # As no user's is.
    self._bank.add(name, np.zeros((1, self._bank.embed), np.float32))
    step = data.BUCKET_MULTIPLE
    for length in (*range(step, self.input_length, step), self.input_length):
      for count in {1, self.batch_size}:
        self._predict([(name, np.ones(length, np.int32))] * count)
    self._bank.remove(name)

  async def ask(self, name: str, rows: Sequence[np.ndarray]) -> list[Answer]:
    """What the model says to each row, with one prompt.

    Args:
      name: The prompt.
      rows: Tokens [length], EOS included, of at most input_length.

    Raises:
      Full: At once, if not all of them may wait.
      UnknownPrompt: If there is no such prompt, or it is removed meanwhile.
    """
    if name not in self._bank.lengths:
      raise UnknownPrompt(unknown(name, self._bank.lengths))
    if len(self._queue) + len(rows) > self.max_queue:
      raise Full
    loop = asyncio.get_running_loop()
    asked = [_Row(name, r, loop.time(), loop.create_future()) for r in rows]
    self._queue.extend(asked)
    self._tell()
    try:
      return list(await asyncio.gather(*(row.answer for row in asked)))
    finally:  # Of one that gave up, no row is computed any more.
      for row in asked:
        row.answer.cancel()

  async def run(self) -> None:
    """Answers what is in the queue, until it is cancelled."""
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
      answers = await loop.run_in_executor(
        self._thread, self._answer, [(row.name, row.tokens) for row in batch]
      )
      for row, answer in zip(batch, answers, strict=True):
        if row.answer.done():
          continue
        if isinstance(answer, Exception):
          row.answer.set_exception(answer)
        else:
          row.answer.set_result(answer)

  def _tell(self) -> None:
    """Sets what `run` waits for."""
    for event, least in ((self._some, 1), (self._enough, self.batch_size)):
      (event.set if len(self._queue) >= least else event.clear)()

  def _answer(self, rows: list[tuple[str, np.ndarray]]) -> list[Any]:
    """An answer, or an exception, for each row: none harms the others."""
    start = time.monotonic()
    answers: list[Any] = [None] * len(rows)
    while True:
      known = self._bank.lengths
      for i, (name, _) in enumerate(rows):
        if name not in known:
          answers[i] = UnknownPrompt(unknown(name, known))
      left = [i for i, answer in enumerate(answers) if answer is None]
      try:
        said = self._predict([rows[i] for i in left]) if left else []
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

  def _predict(self, rows: list[tuple[str, np.ndarray]]) -> list[Answer]:
    """Asks for at most batch_size rows; few have a program of their own."""
    few = self._bank.plan.mesh.shape['data']
    size = few if len(rows) <= few else self.batch_size
    examples = [
      {
        'encoder_input_tokens': np.pad(
          tokens, (0, self.input_length - len(tokens))
        ),
        'decoder_loss_weights': np.zeros(1, np.int32),
      }
      for _, tokens in rows
    ]
    found: list[Any] = [None] * len(rows)
    for which, batch in data.padded_batches(examples, size):
      filled = np.pad(which, (0, size - len(which)), 'edge')
      names = [rows[i][0] for i in filled]
      tokens, scores = self._bank.predict(names, batch['encoder_input_tokens'])
      for i, ids, score in zip(which, tokens, scores, strict=False):
        found[i] = ids, float(score)
    return found
