"""A run and its MODEL_DIR: locking, comparing, restoring and writing.

    with Run(model_dir) as run:        # locks the directory
      run.compare({'': facts})         # refuses the directory of another run
      state = run.restore(like)        # the state of an earlier start, or None
      run.begin(members, ...)          # from here on we write to the directory
      run.save(state, sums, wait=False)

A run trains one prompt in MODEL_DIR itself, or several prompts, each in a
subdirectory of its name. One checkpoint holds all prompts of the run.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from ptune.config.flags import CONFIG
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
# The sums over the steps since the last record, by the name of a member.
Sums = dict[str, dict[str, float]]


class Run(contextlib.AbstractContextManager['Run']):
  """A MODEL_DIR that this process has locked.

  `members` and the attributes after it are set by `begin`.

  Attributes:
    directory: MODEL_DIR.
    present: The run.json of an earlier start, by the name of a member; '' is
      MODEL_DIR itself.
    start: The step of the restored state.
    sums: The sums that were restored with it; see `checkpoints`.
    members: What the run trains.
    train_steps: The last step.
    saving: When to log and save.
    asked: Tells whether a signal asks the run to stop.
    reports: The records of each member, by name.
    profile: The profiler.
  """

  def __init__(
    self,
    model_dir: Any,
    initial_checkpoint_path: str | None,
    names: Sequence[str] = ('',),
  ):
    """Stores the arguments; `__enter__` opens the directory.

    Args:
      model_dir: MODEL_DIR.
      initial_checkpoint_path: The base model, which run.json records.
      names: The names of the members, in the order of their rows in a batch;
        ('',) if there is only one.

    Raises:
      UserError: If `model_dir` is not the name of a directory.
    """
    self.directory = run_file.run_directory(model_dir)
    self.start, self.sums = 0, dict[str, Any]()
    self.members: Sequence[Member] = ()
    self._trackers: list[trackers.Tracker] = []
    self._base = initial_checkpoint_path
    # Several members share MODEL_DIR, which then has its own run.json.
    self._shared = {} if '' in names else {'': {'runs': list(names)}}
    self._names = dict.fromkeys((*self._shared, *names))
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> 'Run':
    check_writable('MODEL_DIR', self.directory)
    self._still_locked = self._stack.enter_context(lock.acquire(self.directory))
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
    """Checks that MODEL_DIR is empty or holds this run.

    Args:
      facts: The facts of each member, by name.

    Raises:
      UserError: If facts differ from those on disk; lists every difference.
    """
    for name, own in {**self._shared, **facts}.items():
      run_file.compare(self.place(name), self.present[name], own)

  def say_what_changed(self, config: str) -> None:
    """Warns of settings that may change, and differ from the last start's.

    Args:
      config: The settings of this start, as `describe` writes them.
    """
    file = self.directory / CONFIG
    if not file.exists():
      return
    if found := run_file.changed(file.read_text(), config):
      logging.warning(
        'the settings are not those of the last start in %s: %s',
        self.directory,
        '; '.join(found),
      )

  def restore(self, abstract: TrainState) -> TrainState | None:
    """Restores the state that an earlier start saved; None if there is none.

    Args:
      abstract: The shapes, types and shardings of the state.
    """
    found = checkpoints.restore(self.directory / 'checkpoints', abstract)
    if found is None:
      return None
    state, self.sums = found
    self.start = int(state.step)
    return state

  def records(self, name: str = '') -> list[report.Record]:
    """The records of a member up to the restored step."""
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
    """Starts writing to MODEL_DIR; call this after all checks.

    From here on, the loop handles SIGTERM and Ctrl-C between two steps.

    Args:
      members: What the run trains.
      train_steps: The last step.
      examples_per_step: The examples in a step, for one member.
      saving: When to log and save.
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
    if jax.process_index() == 0:
      for name, text in saving.rows.items():
        (self.directory / name).parent.mkdir(exist_ok=True)
        write_atomically(self.directory / name, text)
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
          saving.curves,
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
    self._trackers.append(tracker)
    return self._stack.enter_context(contextlib.closing(tracker))

  def describe(self, model_info: str, config: str) -> None:
    """Writes model-info.txt and config.gin, which can repeat the run."""
    if jax.process_index() == 0:
      write_atomically(self.directory / 'model-info.txt', model_info)
      write_atomically(self.directory / CONFIG, config)

  def discard(self, member: Member) -> None:
    """Deletes records and a best prompt from steps after the restored one.

    An earlier start wrote them after its last checkpoint. We repeat these
    steps, and their results may differ this time.
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
    """Raises an OSError if MODEL_DIR is not the directory that we locked."""
    if not self._still_locked():
      raise OSError(
        f'MODEL_DIR {self.directory} was deleted, renamed or replaced while'
        ' this run trained; nothing more is written there. Move it back and'
        ' start the same command, or choose another MODEL_DIR'
      )

  @property
  def failed(self) -> bool:
    """Whether writing a checkpoint failed."""
    return self._saved.failed

  def save(self, state: TrainState, sums: Sums, wait: bool) -> None:
    """Saves a state; raises FloatingPointError if it is not finite.

    Args:
      state: The state.
      sums: Saved with it; see `checkpoints`.
      wait: Whether to wait until the checkpoint is on disk.
    """
    self.check_finite(state)
    self.check_directory()
    self._saved.save(state, sums, wait)
    if wait:
      for member in self.members:
        checkpoints.prune_best(
          self.place(member.name) / 'best', self._saved.restarts()
        )

  def check_finite(self, state: TrainState) -> None:
    """Raises FloatingPointError if a trained parameter is not finite."""
    if not bool(_is_finite(state.trainable)):
      raise FloatingPointError(
        f'the trained parameters are not finite after step {int(state.step)}.'
        f' {self.last_good()}'
      )

  def last_good(self) -> str:
    """Says which checkpoint is still good and what to do, for an error."""
    self._saved.wait()
    return (
      f'{self._saved.last_good()}. Lower LEARNING_RATE, or look at the batch'
      ' of that step'
    )

  def lost_best(self, member: Member) -> bool:
    """Whether the best prompt is missing on disk, despite recorded scores."""
    return member.name in self._without_best

  def save_best(
    self, member: Member, state: TrainState, scores: Scores
  ) -> None:
    """Saves a state as a member's best so far."""
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
    """Writes a member's trained parameters; see `prompt_files`."""
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

  def end(self, step: int, ended: bool, scored: bool) -> None:
    """Logs how the run ended, and sends the last numbers to its trackers.

    Args:
      step: The last step of this start.
      ended: Whether the run is at its end.
      scored: Whether no evaluation of that step is missing.
    """
    if scored:
      for tracker in self._trackers:
        tracker.send()
    if ended and scored:
      logging.info('finished at step %d: %s', step, self.directory)
    else:
      logging.info(
        'stopped at step %d, which is saved in %s; the same command resumes'
        ' from there',
        step,
        self.directory,
      )

  @contextlib.contextmanager
  def paused(self, doing: str) -> Iterator[None]:
    """Excludes the time spent inside from the reported training rate."""
    with contextlib.ExitStack() as stack:
      for one in self.reports.values():
        stack.enter_context(one.paused(doing))
      yield


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
  leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves))
