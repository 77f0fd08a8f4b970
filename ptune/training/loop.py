"""The loop that all training runs: update, log, save, evaluate, until the end.

A run trains one prompt or several; the loop is the same. Stopped at any moment
and begun again where its last checkpoint was, it ends with the bits of an
undisturbed one: all that changes is in the train state, and the batch of a step
is a function of the step.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from ptune.model import parameters
from ptune.training import report, selection, settings
from ptune.training.state import TrainState

if TYPE_CHECKING:  # A demonstration loads neither Orbax nor anything heavy.
  from ptune.training.run import Run

# Steps that the device is ahead of the metrics that are read, so that it never
# waits for the host.
AHEAD = 2
Batch = Mapping[str, jax.Array]
Update = Callable[..., tuple[TrainState, Mapping[str, jax.Array]]]


class Stopped(Exception):
  """An evaluation was given up because the program is asked to end."""


class Evaluate(Protocol):
  """Gives scores by task; raises `Stopped` if asked to stop."""

  split: str

  def __call__(
    self, trees: tuple[Any, ...], step: int, asked: Callable[[], bool], /
  ) -> dict[str, dict[str, float]]: ...


@dataclasses.dataclass(frozen=True)
class Member:
  """One of the prompts that a run trains.

  Attributes:
    name: Its directory below MODEL_DIR; '' for the only one.
    plan: The parameters.
    facts: What it is, as run.json has it.
    trainable: What it trains, taken from the state of the run.
  """

  name: str
  plan: parameters.Plan
  facts: Mapping[str, Any]
  trainable: Callable[[TrainState], Any]

  def trained(self, state: TrainState) -> dict[str, np.ndarray]:
    """What it has trained, whole, by path; all processes must ask."""
    flat = parameters.flatten(self.trainable(state))
    return {path: parameters.whole(x) for path, x in flat.items()}


@dataclasses.dataclass
class Loop:
  """What happens between the first step of a start and the last.

  Attributes:
    run: What is trained, up to which step, and where it is written.
    update: The compiled step; its sums are scalars, or [members].
    frozen: The frozen parameters.
    evaluate: By the name of a member; None for one that is not evaluated.
    evaluation: When it is evaluated, and what is the best.
  """

  run: 'Run'
  update: Update
  frozen: Any
  evaluate: Mapping[str, Evaluate | None]
  evaluation: settings.Evaluation

  def __call__(
    self, state: TrainState, batches: Iterator[tuple[int, Batch]]
  ) -> TrainState:
    """Trains from the step of the state on.

    Args:
      state: The first or the restored state; it is donated.
      batches: Yields (step, batch on the devices) from that step on.

    Returns:
      The last state.

    Raises:
      FloatingPointError: If a loss is not finite.
    """
    run, step = self.run, self.run.start
    self._sums = {name: dict(own) for name, own in run.sums.items()}
    self._pending = collections.deque[Mapping[str, jax.Array]]()
    following = next(batches, None)
    stop = ended = False
    while True:
      # ------------------------------------------------ between two steps
      stop = stop or run.asked(step)
      ended = step >= self.run.train_steps
      log, save, evaluate = self._due(step, stop)
      writes = log or save or evaluate
      self._read_metrics(step, 0 if writes else AHEAD)
      if writes:
        run.check_place()
      if log or evaluate:
        self._log(step)
      if save:
        run.save(state, self._sums, wait=ended or stop)
      if evaluate and not stop:
        stop, over = self._evaluate(state, step)
        ended = ended or over
        if stop or over:
          save = True
          run.save(state, self._sums, wait=True)
      if save:
        self._write_prompts(state, step)
      if ended or stop:
        break
      # ------------------------------------------------------------- a step
      assert following is not None and following[0] == step
      _, batch = following
      with self.run.members[0].plan.scope():
        if step == run.start:  # Compiles; later only new lengths do.
          with run.paused('compiling'):
            state, metrics = self.update(state, self.frozen, batch)
        else:
          with run.profile.step(step, state):
            state, metrics = self.update(state, self.frozen, batch)
      self._pending.append(metrics)
      step += 1
      following = next(batches, None)
    scored = not evaluate or self._are_scored(step)
    run.tell_end(step, finished=ended and scored)
    return state

  def _due(self, step: int, stop: bool) -> tuple[bool, bool, bool]:
    """Whether it is time to log, to save and to evaluate."""
    last = step >= self.run.train_steps
    log, save, evaluate = (
      step > 0 and (last or step % period == 0)
      for period in (
        self.run.saving.log_period,
        self.run.saving.checkpoint_period,
        self.evaluation.period,
      )
    )
    # The prompt of the restored step may not have been written.
    restored = step == self.run.start
    save = save or (step > 0 and (stop or restored or self.run.failed))
    return log, save, evaluate and any(map(self._evaluates, self.run.members))

  def _evaluates(self, member: Member) -> bool:
    return self.evaluate[member.name] is not None

  def _read_metrics(self, step: int, ahead: int) -> None:
    """Adds up what the device has computed, but for the newest `ahead`."""
    while len(self._pending) > ahead:
      done = step - len(self._pending) + 1
      add_metrics(self, self._pending.popleft(), done)
      for name, one in self.run.reports.items():
        one.progress(done, self._sums[name])

  def _log(self, step: int) -> None:
    """Records the sums since the last record, and begins new ones."""
    for name, sums in self._sums.items():
      self.run.reports[name].train(step, sums)
    self._sums = {}

  def _evaluate(self, state: TrainState, step: int) -> tuple[bool, bool]:
    """Evaluates all that have no scores; keeps what is the best.

    Returns:
      Whether to stop, since a signal came; and whether no member has got
      better for EARLY_STOPPING evaluations.
    """
    run, best_metric = self.run, self.evaluation.best_metric
    run.check_finite(state)  # What is spoiled shall not become the best.
    over = []
    for member in self.run.members:
      evaluate, told = self.evaluate[member.name], run.reports[member.name]
      if evaluate is None:
        continue
      if not self._is_scored(member, step):
        trees = (member.trainable(state), self.frozen)
        try:
          with run.paused('evaluating'):
            scores = evaluate(trees, step, run.asked)
          better = selection.is_best(told.records, best_metric, scores)
        except Stopped:
          return True, False
        except Exception:  # A metric's, or BEST_METRIC; nothing is lost.
          run.save(state, self._sums, wait=True)
          raise
        if better or run.lost_best(member):
          run.save_best(member, state, scores)
        # Recorded last: what is recorded is not done again after a hard stop.
        told.evaluate(step, evaluate.split, scores)
      over.append(
        selection.patience_is_over(
          told.records, best_metric, self.evaluation.early_stopping
        )
      )
    return False, all(over)

  def _is_scored(self, member: Member, step: int) -> bool:
    return bool(report.scores_at(self.run.reports[member.name].records, step))

  def _are_scored(self, step: int) -> bool:
    evaluated = filter(self._evaluates, self.run.members)
    return all(self._is_scored(member, step) for member in evaluated)

  def _write_prompts(self, state: TrainState, step: int) -> None:
    for member in self.run.members:
      scores = report.scores_at(self.run.reports[member.name].records, step)
      self.run.write_prompt(member, f'step_{step}', state, scores)


def add_metrics(
  loop: Loop, metrics: Mapping[str, jax.Array], step: int
) -> None:
  """Adds one step's metrics; a loss that is not finite ends the run."""
  values = {
    key: np.atleast_1d(x) for key, x in jax.device_get(dict(metrics)).items()
  }
  for i, member in enumerate(loop.run.members):
    loss = float(values['loss'][i])
    if not np.isfinite(loss):
      which = f' of run {member.name!r}' if member.name else ''
      raise FloatingPointError(
        f'the loss{which} is {loss} at step {step}. {loop.run.last_good()}'
      )
    own = loop._sums.setdefault(member.name, {})
    for key, value in values.items():
      own[key] = own.get(key, 0.0) + float(value[i])
    # The newest, not a sum.
    own['gradient_norm'] = float(values['gradient_norm'][i])
