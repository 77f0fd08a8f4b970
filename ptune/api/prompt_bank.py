"""One base and many prompts: mixed batches, and majority votes."""

import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from ptune.api import rows as rows_lib
from ptune.api.base import Base, as_base
from ptune.api.recorded import BATCH_SIZE, LENGTHS
from ptune.api.tuned import Tuned, batch_size
from ptune.config import words
from ptune.data import bucketing, device_feed, padding, seqio_task
from ptune.errors import UserError, check_counts
from ptune.serving import ensemble, predictor
from ptune.serving.bank import PromptBank
from ptune.tasks.rows import nul

# A prompt: [prompt, embed], a file, a run, an adapter, or what `tune` returns.
Prompt = np.ndarray | str | os.PathLike[str] | Tuned


@words.in_python()
def bank(
  base: Base | str,
  *,
  lengths: Mapping[str, int] = LENGTHS,
  **prompts: Prompt,
) -> 'Bank':
  """Loads several prompts for one base, which then answers with any of them.

  Args:
    base: The frozen model from `ptune.load`, or its path.
    lengths: The most tokens of an input and of an answer.
    **prompts: The prompts by name.

  Raises:
    UserError: If a prompt is not for this base.

  Example:
    >>> bank = ptune.bank('ptune://tiny', sst2='sst2.npy', rte='runs/rte')
    >>> answers = bank.predict(['so dull', 'it rains'], ['sst2', 'rte'])
    >>> len(answers), bank.names
    (2, ['rte', 'sst2'])
  """
  return Bank(as_base(base), lengths, prompts)


class Bank:
  """Prompts by name, and the one model that answers with any of them.

  Attributes:
    base: The base model.
  """

  def __init__(
    self,
    base: Base,
    lengths: Mapping[str, int],
    prompts: Mapping[str, Prompt],
  ):
    """Copies the prompts to the devices; see `ptune.bank`."""
    self.base, self._lengths = base, _checked(lengths)
    self._bank = PromptBank(
      base.config,
      base.weights,
      self._lengths['targets'],
      fingerprint=base.fingerprint,
    )
    for name, prompt in prompts.items():
      self.add(name, prompt)

  def __repr__(self) -> str:
    return f'<{len(self.names)} prompts on {self.base.path}: {self.names}>'

  @property
  def names(self) -> list[str]:
    """The names of all prompts, sorted."""
    return self._bank.names

  @words.in_python()
  def add(self, name: str, prompt: Prompt) -> None:
    """Adds a prompt, or replaces the one with this name.

    Raises:
      UserError: If it is not a prompt, or not for this base.
    """
    if isinstance(prompt, Tuned):
      prompt = prompt.source
    elif not isinstance(prompt, str | os.PathLike | np.ndarray | jax.Array):
      raise UserError(
        f'prompt {name!r} is {type(prompt).__name__} {prompt!r:.60}; expected'
        ' the path of a run or a prompt, what ptune.tune returns, or an array'
        ' [prompt, embed]'
      )
    self._bank.add(name, prompt)

  def remove(self, name: str) -> None:
    """Removes a prompt; raises UserError if no prompt has this name."""
    self._bank.remove(name)

  @words.in_python()
  def predict(
    self, inputs: Sequence[str], prompts: str | Sequence[str]
  ) -> list[str]:
    """Answers texts in shared batches, each text with its own prompt.

    Args:
      inputs: The texts, as the model reads them.
      prompts: The name of each text's prompt, or one name for all texts.

    Returns:
      A text for each input.

    Raises:
      UserError: If a name is unknown, or there are not as many names as texts.
    """
    texts = _texts(inputs)
    if isinstance(prompts, str):
      names = [prompts] * len(texts)
    else:
      names = rows_lib.texts('prompts', prompts, 'a name, or a list of names')
    if len(names) != len(texts):
      raise UserError(
        f'prompts has {len(names)} names for {len(texts)} inputs; expected one'
        ' for each, or one name for all'
      )
    return [self._decode(tokens) for tokens, _ in self._asked(texts, names)]

  @words.in_python()
  def vote(
    self, inputs: Sequence[str], prompts: Sequence[str] | None = None
  ) -> list[str]:
    """The answer that most prompts of one task give to each text.

    Args:
      inputs: The texts, as the model reads them.
      prompts: The names of the prompts; all of them if not given.

    Returns:
      A text for each input. If answers have equally many votes, the one with
      the highest score wins (Lester et al. 2021, section 6).
    """
    texts, names = _texts(inputs), self.names
    if prompts is not None:
      names = rows_lib.texts('prompts', prompts, 'a list of names')
    if not names:
      raise UserError('the bank has no prompts; add some')
    repeated = [name for name in names for _ in texts]
    asked = self._asked(texts * len(names), repeated)
    tokens, scores = zip(*asked, strict=True)
    shape = (len(names), len(texts))
    won = ensemble.vote(
      np.reshape(tokens, (*shape, -1)), np.reshape(scores, shape)
    )
    return [self._decode(tokens) for tokens in won.tokens]

  def _decode(self, tokens: np.ndarray) -> str:
    return self.base.vocabulary.decode(tokens.tolist())

  def _asked(
    self, texts: Sequence[str], names: Sequence[str]
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens and the score of the answer to each text."""
    ids, mesh = self.base.config.ids, self._bank.plan.mesh
    examples = [
      seqio_task.tokenised(self.base.vocabulary, self._lengths, text, ids)
      for text in texts
    ]
    found = predictor.by_row(
      padding.padded_batches(
        examples,
        batch_size(len(examples), BATCH_SIZE, mesh),
        bucketing.BUCKET_MULTIPLE,
        ids.pad,
      ),
      lambda batch: device_feed.device_put(batch, mesh),
      lambda batch, rows: self._bank.predictor.predict(
        self._bank.trees([names[row] for row in rows]), batch, rows
      ),
    )
    by_row = dict(found)
    return [by_row[row] for row in range(len(examples))]


def _texts(inputs: Sequence[str]) -> list[str]:
  """The inputs as a list; refuses or warns of what is seldom meant."""
  texts = rows_lib.texts('inputs', inputs)
  for i, text in enumerate(texts):
    if '\0' in text:
      raise UserError(f'inputs[{i}]: {nul(text)}')
  rows_lib.warn_of_odd(texts, '{inputs}')
  return texts


def _checked(lengths: Mapping[str, int]) -> dict[str, int]:
  """The lengths of both features; raises UserError if there are others."""
  if not isinstance(lengths, Mapping) or set(lengths) - set(LENGTHS):
    raise UserError(
      f'lengths is {lengths!r:.80}; expected tokens by feature, such as'
      f' {LENGTHS}'
    )
  found = {**LENGTHS, **lengths}
  check_counts(**{f'lengths[{name!r}]': found[name] for name in found})
  return found
