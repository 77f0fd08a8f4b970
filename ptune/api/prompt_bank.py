"""One base and many prompts: mixed batches, and their vote."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from ptune.api import rows as rows_lib
from ptune.api.base import Base, as_base
from ptune.api.recorded import BATCH_SIZE, LENGTHS
from ptune.api.tuned import Tuned, batch_size
from ptune.data import bucketing, device_feed, padding, seqio_task
from ptune.errors import UserError
from ptune.serving import ensemble, predictor
from ptune.serving.bank import PromptBank

# A prompt: [prompt, embed], a file, a run, an adapter, or what `tune` returns.
Prompt = np.ndarray | str | os.PathLike[str] | Tuned


def bank(
  base: Base | str,
  *,
  lengths: Mapping[str, int] = LENGTHS,
  **prompts: Prompt,
) -> 'Bank':
  """Puts prompts beside one base, which answers with all of them.

  Args:
    base: The frozen model, of `ptune.load`, or its path.
    lengths: Most tokens of inputs and of answers.
    **prompts: The prompts, by the names that they are asked by.

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
  """Prompts by name, and the one model that answers with all of them.

  Attributes:
    base: The base model.
  """

  def __init__(
    self,
    base: Base,
    lengths: Mapping[str, int],
    prompts: Mapping[str, Prompt],
  ):
    """Puts the prompts on the devices; see `ptune.bank`."""
    self.base, self._lengths = base, dict(lengths)
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

  def add(self, name: str, prompt: Prompt) -> None:
    """Adds a prompt, or replaces the one of this name."""
    if isinstance(prompt, Tuned):
      prompt = prompt.prompt
    self._bank.add(name, prompt)

  def remove(self, name: str) -> None:
    """Removes a prompt."""
    self._bank.remove(name)

  def predict(
    self, inputs: Sequence[str], prompts: str | Sequence[str]
  ) -> list[str]:
    """Answers to texts, each with a prompt of its own, in shared batches.

    Args:
      inputs: The texts, as the model reads them.
      prompts: The name of the prompt of each text, or of all.

    Returns:
      A text for each input.

    Raises:
      UserError: If there is no prompt of a name, or not one for each text.
    """
    texts = rows_lib.listed('inputs', inputs)
    names = [prompts] * len(texts) if isinstance(prompts, str) else [*prompts]
    if len(names) != len(texts):
      raise UserError(
        f'prompts has {len(names)} names for {len(texts)} inputs; expected one'
        ' for each, or one name for all'
      )
    return [self._decode(tokens) for tokens, _ in self._asked(texts, names)]

  def vote(
    self, inputs: Sequence[str], prompts: Sequence[str] | None = None
  ) -> list[str]:
    """The answer that most prompts of one task give to each text.

    Args:
      inputs: The texts, as the model reads them.
      prompts: The names of the prompts; all of them if not given.

    Returns:
      A text for each input. Of answers with equally many votes, the one with
      the highest score wins (Lester et al. 2021, section 6).
    """
    texts = rows_lib.listed('inputs', inputs)
    names = self.names if prompts is None else [*prompts]
    if not names:
      raise UserError('prompts has no names; expected at least one')
    asked = self._asked([*texts] * len(names), np.repeat(names, len(texts)))
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
    """Tokens and score of the answer to each text, with its prompt."""
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
