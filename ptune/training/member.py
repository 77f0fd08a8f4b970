"""The members of a run: the prompts that the loop trains and evaluates."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from ptune.model import parameters
from ptune.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Member:
  """One of the prompts that a run trains.

  Attributes:
    name: Its directory below MODEL_DIR; '' if the run trains only this one.
    plan: The parameters.
    facts: Its entry in run.json.
    trainable: Takes its trained parameters from the state of the run.
  """

  name: str
  plan: parameters.Plan
  facts: Mapping[str, Any]
  trainable: Callable[[TrainState], Any]

  def trained(self, state: TrainState) -> dict[str, np.ndarray]:
    """Its trained parameters, whole, by path; every process must call this."""
    flat = parameters.flatten(self.trainable(state))
    return {path: parameters.to_host(x) for path, x in flat.items()}


class Stopped(Exception):
  """The program was asked to stop during an evaluation."""


class Evaluate(Protocol):
  """Computes the scores of each task; raises `Stopped` if `asked` says so."""

  split: str

  def __call__(
    self, trees: tuple[Any, ...], step: int, asked: Callable[[], bool], /
  ) -> dict[str, dict[str, float]]: ...
