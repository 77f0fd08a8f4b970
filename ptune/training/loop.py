"""The loop of every training run: update, log, save and evaluate until the end.

One loop trains one prompt or several.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ptune.training import report, selection, settings
from ptune.training.member import Evaluate, Member, Stopped
from ptune.training.run import Run
from ptune.training.state import TrainState, Update

# The host reads metrics this many steps late, so the device never waits for it.
AHEAD = 2
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass
class Loop:
  """Takes a run from its first step to its last.

  Attributes:
    run: What to train, the last step, and where to write.
    update: The compiled step. The sums it returns are scalars, or [members].
    frozen: The frozen parameters.
    evaluate: For each member by name, how to evaluate it; None if it is not.
    evaluation: When to evaluate, and which scores are the best.
  """

  run: Run
  update: Update
  frozen: Any
  evaluate: Mapping[str, Evaluate | None]
  evaluation: settings.Evaluation

  def __call__(
    self, state: TrainState, batches: Iterator[tuple[int, Batch]]
  ) -> TrainState:
    """Trains from the step of `state` on.

    Args:
      state: The first state or the restored one; it is donated.
      batches: Yields (step, batch on the devices), beginning at that step.

    Returns:
      The final state.

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
      ended = step >= run.train_steps
      log, save, evaluate = self._due(step, stop)
      writes = log or save or evaluate
      self._read_metrics(step, 0 if writes else AHEAD)
      if writes:
        run.check_directory()
      if log or evaluate:
        self._log(step)
      if save:
        run.save(state, self._sums, wait=ended or stop)
      if evaluate and not stop:
        stop, no_better = self._evaluate(state, step)
        ended = ended or no_better
        if stop or no_better:
          save = True
          run.save(state, self._sums, wait=True)
      if save:
        self._write_prompts(state, step)
      if ended or stop:
        break
      # ------------------------------------------------------------- a step
      assert following is not None and following[0] == step
      _, batch = following
      with run.members[0].plan.scope():
        if step == run.start:  # This step compiles.
          with run.paused('compiling'):
            state, metrics = self.update(state, self.frozen, batch)
        else:
          with run.profile.step(step, state):
            state, metrics = self.update(state, self.frozen, batch)
      self._pending.append(metrics)
      step += 1
      following = next(batches, None)
    run.end(step, ended, scored=not evaluate or self._all_scored(step))
    return state

  def _due(self, step: int, stop: bool) -> tuple[bool, bool, bool]:
    """Whether to log, to save and to evaluate now."""
    last = step >= self.run.train_steps
    log, save, evaluate = (
      step > 0 and (last or step % period == 0)
      for period in (
        self.run.saving.log_period,
        self.run.saving.checkpoint_period,
        self.evaluation.period,
      )
    )
    # An earlier start may have been killed before it wrote the prompt of the
    # step that we restored.
    restored = step == self.run.start
    save = save or (step > 0 and (stop or restored or self.run.failed))
    return log, save, evaluate and any(map(self._evaluates, self.run.members))

  def _evaluates(self, member: Member) -> bool:
    return self.evaluate[member.name] is not None

  def _read_metrics(self, step: int, ahead: int) -> None:
    """Adds up the metrics of all steps except the newest `ahead`."""
    while len(self._pending) > ahead:
      done = step - len(self._pending) + 1
      self._add(self._pending.popleft(), done)
      for name, one in self.run.reports.items():
        one.progress(done, self._sums[name])

  def _add(self, metrics: Mapping[str, jax.Array], step: int) -> None:
    """Adds one step's metrics; stops the run if a loss is not finite."""
    values = {
      key: np.atleast_1d(x) for key, x in jax.device_get(dict(metrics)).items()
    }
    for i, member in enumerate(self.run.members):
      loss = float(values['loss'][i])
      if not np.isfinite(loss):
        which = f' of run {member.name!r}' if member.name else ''
        raise FloatingPointError(
          f'the loss{which} is {loss} at step {step}. {self.run.last_good()}'
        )
      own = self._sums.setdefault(member.name, {})
      for key, value in values.items():
        own[key] = own.get(key, 0.0) + float(value[i])
      # The newest norm, not a sum of norms.
      own['gradient_norm'] = float(values['gradient_norm'][i])

  def _log(self, step: int) -> None:
    """Records the sums since the last record, and starts new ones."""
    for name, sums in self._sums.items():
      self.run.reports[name].train(step, sums)
    self._sums = {}

  def _evaluate(self, state: TrainState, step: int) -> tuple[bool, bool]:
    """Evaluates every member without scores at this step; saves a new best.

    Returns:
      Whether a signal asks to stop; and whether no member has improved for
      EARLY_STOPPING evaluations.
    """
    run, best_metric = self.run, self.evaluation.best_metric
    run.check_finite(state)  # Parameters with NaN must not become the best.
    no_better = []
    for member in run.members:
      evaluate, records = self.evaluate[member.name], run.reports[member.name]
      if evaluate is None:
        continue
      if not self._is_scored(member, step):
        trees = (member.trainable(state), self.frozen)
        try:
          with run.paused('evaluating'):
            scores = evaluate(trees, step, run.asked)
          better = selection.is_best(records.records, best_metric, scores)
        except Stopped:
          return True, False
        except Exception:  # From a metric or BEST_METRIC: save first.
          run.save(state, self._sums, wait=True)
          raise
        if better or run.lost_best(member):
          run.save_best(member, state, scores)
        # Record last, because a restart does not repeat recorded evaluations.
        records.evaluate(step, evaluate.split, scores)
      no_better.append(
        selection.patience_is_over(
          records.records, best_metric, self.evaluation.early_stopping
        )
      )
    return False, all(no_better)

  def _scores(self, member: Member, step: int) -> dict[str, dict[str, float]]:
    return report.scores_at(self.run.reports[member.name].records, step)

  def _is_scored(self, member: Member, step: int) -> bool:
    return bool(self._scores(member, step))

  def _all_scored(self, step: int) -> bool:
    evaluated = filter(self._evaluates, self.run.members)
    return all(self._is_scored(member, step) for member in evaluated)

  def _write_prompts(self, state: TrainState, step: int) -> None:
    for member in self.run.members:
      scores = self._scores(member, step)
      self.run.write_prompt(member, f'step_{step}', state, scores)
