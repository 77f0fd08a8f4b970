"""A run and its MODEL_DIR: held, compared, restored and written.

    with Run(model_dir) as run:        # holds the directory
      run.compare({'': facts})         # refuses another run's
      state = run.restore(like)        # where an earlier start was, or None
      run.begin(members, ...)          # from here on it is written to
      run.save(state, sums, wait=False)

A run trains one prompt, in MODEL_DIR itself, or several, each in a directory of
its name below it. Checkpoints are of all together.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from ptune.convert import open_checkpoint
from ptune.host.files import check_writable, write_atomically
from ptune.training import (
  checkpoints,
  lock,
  profiling,
  prompt_files,
  report,
  run_file,
  settings,
  stopping,
  trackers,
)
from ptune.training.member import Member
from ptune.training.state import TrainState

Scores = Mapping[str, Mapping[str, float]]
# By the name of a member: what the steps since the last record add up to.
Sums = dict[str, dict[str, float]]


class Run(contextlib.AbstractContextManager['Run']):
  """A MODEL_DIR that this process holds.

  Attributes:
    directory: MODEL_DIR.
    present: By name, what run.json says of an earlier start; '' is MODEL_DIR.
    start: The step that was restored.
    sums: What was restored with it, see `checkpoints`.
    members: What is trained; as all that follow, known after `begin`.
    train_steps: The last step.
    saving: When it is logged and saved.
    asked: Whether to stop.
    reports: The records of each member.
    profile: The trace.
  """

  def __init__(
    self,
    model_dir: Any,
    initial_checkpoint_path: str | None,
    names: Sequence[str] = ('',),
  ):
    """Opens nothing yet.

    Args:
      model_dir: MODEL_DIR.
      initial_checkpoint_path: The base, which run.json notes.
      names: Those of the members, in the order of their rows in a batch; '' is
        the name of the only one.

    Raises:
      UserError: If it is not the name of a directory.
    """
    self.directory = run_file.run_directory(model_dir)
    self.start, self.sums = 0, dict[str, Any]()
    self.members: Sequence[Member] = ()
    self._base = initial_checkpoint_path
    # Several share MODEL_DIR, which has a run.json of its own.
    self._shared = {} if '' in names else {'': {'runs': list(names)}}
    self._names = dict.fromkeys((*self._shared, *names))
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> 'Run':
    check_writable('MODEL_DIR', self.directory)
    self._is_held = self._stack.enter_context(lock.acquire(self.directory))
    self.present = {
      name: run_file.read(self.place(name)) for name in self._names
    }
    return self

  def __exit__(self, *error) -> bool | None:
    return self._stack.__exit__(*error)

  def place(self, name: str) -> epath.Path:
    """The directory of a member."""
    return self.directory / name if name else self.directory

  def compare(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that what is on disk, if anything, is this run.

    Args:
      facts: By the name of a member.

    Raises:
      UserError: If they differ; all that differs is listed.
    """
    for name, own in {**self._shared, **facts}.items():
      run_file.compare(self.place(name), self.present[name], own)

  def restore(self, like: TrainState) -> TrainState | None:
    """The state where an earlier start was; None if it saved none.

    Args:
      like: Shapes, types and shardings of the state.
    """
    found = checkpoints.restore(self.directory / 'checkpoints', like)
    if found is None:
      return None
    state, self.sums = found
    self.start = int(state.step)
    return state

  def records(self, name: str = '') -> list[report.Record]:
    """The records of a member up to the step that was restored."""
    found = report.read_records(self.place(name))
    return [record for record in found if record['step'] <= self.start]

  # ------------------------------------------------------------------ writing

  def begin(
    self,
    members: Sequence[Member],
    train_steps: int,
    examples_per_step: float,
    saving: settings.Saving,
  ) -> None:
    """Begins to write: all that can be wrong was checked before.

    From here on SIGTERM and Ctrl-C are noted, to be acted on between two steps.

    Args:
      members: What is trained.
      train_steps: The last step.
      examples_per_step: Of one member.
      saving: What is written.
    """
    self.members, self.train_steps = members, train_steps
    self.saving = saving
    enter = self._stack.enter_context
    enter(stopping.explained(self.directory))
    self.asked = enter(stopping.signals())
    for member in members:
      self.discard(member)
    self._saved = enter(
      checkpoints.Checkpoints(
        self.directory / 'checkpoints', self.start, saving.keep_checkpoints
      )
    )
    self._without_best = {
      member.name
      for member in members
      if not checkpoints.finished_steps(self.place(member.name) / 'best')
    }
    notes = run_file.from_where(self._base)
    for name, own in self._shared.items():
      run_file.claim(self.place(name), own, {})
    for member in members:
      self.place(member.name).mkdir(parents=True, exist_ok=True)
      run_file.claim(self.place(member.name), member.facts, notes)
    self.reports = {
      member.name: enter(
        report.Report(
          self.place(member.name),
          self.start,
          train_steps,
          examples_per_step,
          jax.process_index() == 0,
          member.name,
          self._tracker(member),
        )
      )
      for member in members
    }
    self.profile = enter(
      profiling.Profile(self.directory / 'profile', saving.profile_steps)
    )

  def _tracker(self, member: Member) -> trackers.Tracker | None:
    if self.saving.tracker is None or jax.process_index() != 0:
      return None
    place = self.place(member.name)
    tracker = trackers.Tracker(self.saving.tracker, place, member.facts)
    return self._stack.enter_context(contextlib.closing(tracker))

  def describe(self, model_info: str, config: str) -> None:
    """Writes model-info.txt, and config.gin, which reruns the run."""
    if jax.process_index() == 0:
      write_atomically(self.directory / 'model-info.txt', model_info)
      write_atomically(self.directory / 'config.gin', config)

  def discard(self, member: Member) -> None:
    """Drops what an earlier start left of steps that are taken again.

    That start wrote it after its last checkpoint. The steps may come out
    differently now, so neither records nor a best prompt of them may stay.
    """
    if jax.process_index() != 0:
      return
    place, kept = self.place(member.name), self.records(member.name)
    if len(kept) < len(report.read_records(place)):
      report.write_records(place, kept)
    if not checkpoints.drop_after(place / 'best', self.start):
      return
    steps = checkpoints.finished_steps(place / 'best')
    if not steps:
      prompt_files.remove(place, 'best')
      return
    source = open_checkpoint(place / 'best' / str(steps[-1]))
    trained = {
      path: source.leaves[path].read() for path in member.plan.trainable
    }
    scores = report.scores_at(kept, steps[-1])
    facts = self.present[member.name]
    prompt_files.write(
      place, 'best', member.plan, trained, steps[-1], scores, facts
    )

  def check_directory(self) -> None:
    """Raises an OSError if MODEL_DIR is not what this run has opened."""
    if not self._is_held():
      raise OSError(
        f'MODEL_DIR {self.directory} was deleted, renamed or replaced while'
        ' this run trained; nothing more is written there. Move it back and'
        ' start the same command, or choose another MODEL_DIR'
      )

  @property
  def failed(self) -> bool:
    """Whether a checkpoint that was being written is lost."""
    return self._saved.failed

  def save(self, state: TrainState, sums: Sums, wait: bool) -> None:
    """Saves a state, unless its last update spoiled it."""
    self.check_finite(state)
    self.check_directory()
    self._saved.save(state, sums, wait)
    if wait:
      for member in self.members:
        checkpoints.prune_best(
          self.place(member.name) / 'best', self._saved.restarts()
        )

  def check_finite(self, state: TrainState) -> None:
    """Raises FloatingPointError if the last update spoiled the parameters."""
    if not bool(_is_finite(state.trainable)):
      raise FloatingPointError(
        f'the trained parameters are not finite after step {int(state.step)}.'
        f' {self.last_good()}'
      )

  def last_good(self) -> str:
    """What is kept after a loss that is not finite, and what to do."""
    self._saved.wait()
    return (
      f'{self._saved.last_good()}. Lower LEARNING_RATE, or look at the batch'
      ' of that step'
    )

  def lost_best(self, member: Member) -> bool:
    """Whether no best prompt is on disk, whatever the records say."""
    return member.name in self._without_best

  def save_best(
    self, member: Member, state: TrainState, scores: Scores
  ) -> None:
    """Keeps a state as the best of a member, until a better one comes."""
    self.check_directory()
    self._without_best.discard(member.name)
    checkpoints.save_best(
      self.place(member.name) / 'best',
      TrainState(state.step, member.trainable(state), {}),
      self._saved.restarts(),
    )
    self.write_prompt(member, 'best', state, scores)

  def write_prompt(
    self, member: Member, name: str, state: TrainState, scores: Scores
  ) -> None:
    """Writes what a member has trained, see `prompt_files`."""
    trained = member.trained(state)
    if jax.process_index() == 0:
      prompt_files.write(
        self.place(member.name),
        name,
        member.plan,
        trained,
        int(state.step),
        scores,
        member.facts,
      )

  def log_end(self, step: int, finished: bool) -> None:
    """Says how the run has ended."""
    if finished:
      logging.info('finished at step %d: %s', step, self.directory)
    else:
      logging.info(
        'stopped at step %d, which is saved in %s; the same command goes on'
        ' from there',
        step,
        self.directory,
      )

  @contextlib.contextmanager
  def paused(self, doing: str) -> Iterator[None]:
    """Leaves what is done inside out of the rate of training."""
    with contextlib.ExitStack() as stack:
      for one in self.reports.values():
        stack.enter_context(one.paused(doing))
      yield


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
  leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves))
