"""`ptune study`: makes a figure or table of a paper, from training to drawing.

    ptune study prompt_length --gin.MODEL_DIR="'/runs/length'"

A study says which trainings it needs and where their scores go in a table
(`studies.paper` has the studies of Lester et al. 2021). It repeats each
training for every seed. Trainings that freeze the same model run together,
many in one program (`train_many`). The study writes to MODEL_DIR/<its name>:

    results.csv               a line for every score
    table.md                  mean and standard deviation over the seeds
    figure.png, figure.svg
    runs/                     the runs, as `ptune train` writes them
    ../models/                models that the study had to pre-train first

A study never repeats the work of a line in results.csv: if you stop it and
start it again by the same command, it resumes. Each score is stored with a hash
of all settings that decide it (`setting`). If you change a setting, the study
computes the score again; the old score stays in results.csv but is not shown.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from absl import logging
from etils import epath

from ptune import evaluate
from ptune.analysis import figures
from ptune.convert import identity, open_checkpoint
from ptune.data import seqio_task
from ptune.errors import UserError, check_counts
from ptune.host.files import check_writable, write_atomically
from ptune.model import parameters, partitioning, sizes
from ptune.model.adapters import Method
from ptune.model.models import EncoderDecoderModel
from ptune.serving import ensemble, trained_model
from ptune.serving.evaluation import Stopped, evaluation_of
from ptune.studies import tables
from ptune.studies.tables import Result
from ptune.tasks.texts import TextTask
from ptune.train import train
from ptune.train_many import train_many
from ptune.training import (
  lock,
  optim,
  report,
  run_file,
  selection,
  settings,
)
from ptune.training.many import Trial

Report = Callable[[Sequence[Result], epath.Path], tuple[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Base:
  """A model to start from.

  Attributes:
    checkpoint: Its path.
    config: The network's sizes; read from the checkpoint if not given.
    make: The arguments of `ptune.pretrained.make`, for a model that the study
      has to pre-train first; `{models}` stands for the directory of such
      models. `checkpoint` is then the name of the model.
  """

  checkpoint: str
  config: sizes.Config | None = None
  make: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How a method is trained.

  Attributes:
    steps: The number of steps.
    learning_rate: The peak of the schedule.
    decay: See `optim.schedule`.
    optimizer: A function of `optim`.
  """

  steps: int
  learning_rate: float
  decay: str = 'constant'
  optimizer: Callable[..., optax.GradientTransformation] = optim.adafactor

  def schedule(self) -> optim.Schedule:
    """The learning rate at each step."""
    return optim.schedule(self.learning_rate, self.decay, 0, self.steps)


@dataclasses.dataclass(frozen=True)
class Cell:
  """One number of a table: the score of one kind of training.

  Attributes:
    row: The row of the table.
    column: The column of the table.
    base: The name of the model.
    training: A short name of the training. Cells with the same name, base and
      task share their runs.
    task: The task to train on. If several cells have the same row and column,
      the table shows the mean over their tasks.
    method: The method to train.
    tuning: How to train it.
    evaluated: The task to evaluate on; None for the task it was trained on.
    split: The split to evaluate on. None takes the best score of the
      evaluations during training, which use the validation split.
    seeds: The seeds of the trainings; None for the study's seeds.
  """

  row: str
  column: str
  base: str
  training: str
  task: str | TextTask
  method: Method
  tuning: Tuning
  evaluated: str | None = None
  split: str | None = None
  seeds: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Study:
  """The content of a figure or a table.

  Attributes:
    name: The name of the study's directory.
    title: The title of the figure.
    bases: The models, by name.
    cells: The numbers.
    task_feature_lengths: The lengths of all tasks, in tokens.
    module: The module that registers the tasks.
    batch_size: Examples in a step.
    seeds: The number of seeds; None for the number that `study` is given.
    vote: Whether to evaluate the seeds of a cell as an ensemble too. The table
      then has the columns `best` and `ensemble` beside the cell's own.
    by_size: Whether the columns are models. The figure then shows scores
      against the number of their parameters.
    evaluations: How often each training is evaluated, at even distances; its
      score is the best of these.
    timed: Whether the study compares the seconds of trainings. Then only
      trainings of the same method and task share a program.
    then: A function that gets the results of `cells` and returns further cells,
      which are trained next.
    report: A function that gets the results to show and the directory that
      their `prompt` paths are relative to. It returns the text of table.md and
      the figures by name, which replace the usual table and figure.
  """

  name: str
  title: str
  bases: Mapping[str, Base]
  cells: tuple[Cell, ...]
  task_feature_lengths: Mapping[str, int]
  module: str | None = None
  batch_size: int = 32
  seeds: int | None = None
  vote: bool = False
  by_size: bool = False
  evaluations: int = 4
  timed: bool = False
  then: Callable[[Sequence[Result]], Sequence[Cell]] | None = None
  report: Report | None = None


def study(
  *,
  model_dir: str,
  studies: Sequence[Study],
  seeds: int = 3,
  together: int = 8,
  eval_steps: int | None = None,
  best_metric: str | None = None,
  model_parallel: int = 1,
  **how: Any,
) -> None:
  """Runs and draws studies; resumes an earlier start that was stopped.

  Args:
    model_dir: The directory to write to.
    studies: The studies to run.
    seeds: The number of seeds of each training; they start from 0.
    together: The largest number of trainings in one program.
    eval_steps: Batches of an evaluation; None for the whole split.
    best_metric: The metric that is the score; see `train.train`.
    model_parallel: The number of devices that share one copy of the weights.
    **how: Fields of `sizes.Config` that say how models compute, such as
      `dtype`.
  """
  check_counts(SEEDS=seeds, TOGETHER=together)
  directory = run_file.run_directory(model_dir)
  check_writable('MODEL_DIR', directory)
  with lock.acquire(directory):
    for one in studies:
      runner = Runner(
        one,
        directory,
        seeds,
        together,
        how,
        eval_steps=eval_steps,
        best_metric=best_metric,
        model_parallel=model_parallel,
      )
      try:
        runner()
      except Stopped:
        logging.info('study %s: stopped; the same command resumes', one.name)
        return


class Runner:
  """One study, in its directory."""

  def __init__(
    self,
    study: Study,
    directory: epath.Path,
    seeds: int,
    together: int,
    how: Mapping[str, Any],
    *,
    eval_steps: int | None,
    best_metric: str | None,
    model_parallel: int,
  ):
    self._study, self._together, self._how = study, together, how
    self._models, self._directory = directory / 'models', directory / study.name
    self._seeds = range(study.seeds or seeds)
    self._eval_steps, self._best_metric = eval_steps, best_metric
    self._model_parallel = model_parallel
    self._mesh = partitioning.make_mesh(model_parallel)
    self._directory.mkdir(parents=True, exist_ok=True)
    file = self._directory / 'results.csv'
    self._results = tables.read(file.read_text()) if file.exists() else []

  def __call__(self) -> None:
    """Trains and evaluates the missing cells, and draws the result."""
    self._train_all(self._study.cells)
    if self._study.then is not None:
      following = tuple(self._study.then(self._shown()))
      cells = self._study.cells + following
      self._study = dataclasses.replace(self._study, cells=cells)
      self._train_all(following)
    if self._study.vote:
      self._vote()
    self._draw()

  def _train_all(self, cells: Sequence[Cell]) -> None:
    """Trains and evaluates the cells that have no score yet."""
    start = time.monotonic()
    wanted = [(c, seed) for c in cells for seed in self._seeds_of(c)]
    wanted.sort(key=lambda x: x[1])  # All cells of a seed before the next one.
    missing = [x for x in wanted if self._found(*x) is None]
    others = len(self._results) - len(self._shown())
    logging.info(
      'study %s: found %d of %d scores in %s%s',
      self._study.name,
      len(wanted) - len(missing),
      len(wanted),
      self._directory,
      f'; {others} scores with other settings are not shown' if others else '',
    )
    for trainings in self._parts(missing):
      self._train(trainings)
      left = sum(self._found(*x) is None for x in missing)
      logging.info(
        'study %s: %d of %d scores to go, %.0f s so far',
        self._study.name,
        left,
        len(missing),
        time.monotonic() - start,
      )

  def _seeds_of(self, cell: Cell) -> Sequence[int]:
    return self._seeds if cell.seeds is None else cell.seeds

  # ----------------------------------------------------------------- training

  def _training(self, cell: Cell) -> str:
    """A short hash of all that decides a cell's training, without the seed."""
    study, method = self._study, cell.method
    return _digest(
      study.bases[cell.base],
      self._how,
      (method.name, method.placements, method.settings, method.initial),
      cell.tuning,
      (cell.task, study.module, study.task_feature_lengths, study.batch_size),
      (self._eval_steps, self._best_metric, study.evaluations),
    )

  def _setting(self, cell: Cell) -> str:
    """A short hash of all that decides a cell's scores."""
    where = [cell.evaluated, *filter(None, [cell.split])]
    return _digest(self._training(cell), *where)

  def _found(self, cell: Cell, seed: int) -> Result | None:
    at = cell.row, cell.column, str(cell.task), seed, self._setting(cell)
    for r in self._results:
      if at == (r.row, r.column, r.task, r.seed, r.setting):
        return r
    return None

  def _voted(self, cell: Cell) -> list[Result]:
    """The scores of a cell's best seed and of the ensemble of its seeds."""
    at = cell.row, str(cell.task), -1, self._setting_of_vote(cell)
    return [
      r for r in self._results if at == (r.row, r.task, r.seed, r.setting)
    ]

  def _setting_of_vote(self, cell: Cell) -> str:
    return _digest(self._setting(cell), len(self._seeds))

  def _parts(
    self, missing: Sequence[tuple[Cell, int]]
  ) -> Iterator[dict[str, list[tuple[Cell, int]]]]:
    """Yields the runs of each program: their names, and the cells of each.

    Cells that differ only in the task or split to evaluate on share a run. Runs
    of one program may differ in their learning rates.
    """
    groups: dict[Any, dict[str, list[tuple[Cell, int]]]] = {}
    for cell, seed in missing:
      whole = not cell.method.placements
      kind = (cell.method.name, str(cell.task)) if self._study.timed else ''
      tuning = dataclasses.replace(cell.tuning, learning_rate=0.0)
      runs = groups.setdefault((cell.base, tuning, kind, whole), {})
      name = _slug(f'{cell.training} {cell.task} seed{seed}')
      runs.setdefault(name, []).append((cell, seed))
    for (*_, whole), runs in groups.items():
      names, most = list(runs), 1 if whole else self._together
      for i in range(0, len(names), most):
        yield {name: runs[name] for name in names[i : i + most]}

  def _train(self, trainings: Mapping[str, list[tuple[Cell, int]]]) -> None:
    """Trains runs of one base and optimizer, and records their scores.

    Raises:
      Stopped: If the training was asked to stop; it has saved a checkpoint.
    """
    cell, seed = next(iter(trainings.values()))[0]
    tuning = cell.tuning
    checkpoint, config = self._base(cell.base)
    # The name is a function of the runs, so a second start finds the directory.
    digest = _digest(
      *(
        (name, self._training(cells[0][0])) for name, cells in trainings.items()
      )
    )
    folder = self._directory / 'runs' / f'{_slug(cell.base)}_{digest}'
    period = max(tuning.steps // self._study.evaluations, 1)
    common: dict[str, Any] = {
      'train_steps': tuning.steps,
      'data': self._data(cell.task),
      'config': config,
      'initial_checkpoint_path': checkpoint,
      'evaluation': settings.Evaluation(
        period=period,
        steps=self._eval_steps,
        best_metric=self._best_metric,
      ),
      'saving': settings.Saving(
        checkpoint_period=max(tuning.steps // 2, 1),
        keep_checkpoints=1,
        log_period=period,
      ),
      'model_parallel': self._model_parallel,
    }
    if cell.method.placements:
      train_many(
        {
          name: Trial(c.task, c.method, c.tuning.schedule(), s)
          for name, ((c, s), *_) in trainings.items()
        },
        model_dir=os.fspath(folder),
        optimizer=tuning.optimizer,
        **common,
      )
    else:
      [name] = trainings
      train(
        model_dir=os.fspath(folder / name),
        method=cell.method,
        optimizer=functools.partial(
          tuning.optimizer, learning_rate=tuning.schedule()
        ),
        seed=seed,
        **common,
      )
    records_of = {n: report.read_records(folder / n) for n in trainings}
    if not all(report.scores_at(r, tuning.steps) for r in records_of.values()):
      raise Stopped
    found: list[Result] = []
    evaluations: dict[epath.Path, Callable[[epath.Path, int], float]] = {}
    for name, cells in trainings.items():
      records = records_of[name]
      own = max(selection.history(records, self._best_metric))
      # The first record's time includes compilation, in the first step.
      paces = [
        r['seconds_per_step'] for r in records if 'seconds_per_step' in r
      ]
      pace = float(np.median(paces[1:] or paces))
      seconds = pace * tuning.steps / len(trainings)
      plan = parameters.plan(config, cells[0][0].method, self._mesh)
      counts = [
        sum(math.prod(plan.params[path].shape) for path in which)
        for which in (plan.base, plan.trainable)
      ]
      for cell, seed in cells:
        score = own
        if cell.evaluated is not None or cell.split is not None:
          place = folder / where(cell) / of_seeds(name, seed)
          if place not in evaluations:
            evaluations[place] = self._evaluation(cell, plan, place)
          score = evaluations[place](folder / name, seed)
        found.append(
          Result(
            cell.row,
            cell.column,
            str(cell.task),
            seed,
            round(score, 4),
            *counts,
            os.fspath((folder / name).relative_to(self._directory)),
            self._setting(cell),
            round(seconds, 2),
          )
        )
    self._record(found)

  def _record(self, found: Sequence[Result]) -> None:
    """Adds the results of one program: all at once, or none."""
    self._results.extend(found)
    text = tables.dump(self._results)
    write_atomically(self._directory / 'results.csv', text)

  def _base(self, name: str) -> tuple[str, sizes.Config]:
    """The checkpoint of a base and its sizes; pre-trains the base if needed."""
    base = self._study.bases[name]
    checkpoint = base.checkpoint
    if base.make is not None:
      place = self._models / checkpoint
      checkpoint = os.fspath(place)
      if not (place / 'config.json').exists():
        logging.info('pre-training %s; this takes a while', checkpoint)
        self._models.mkdir(parents=True, exist_ok=True)
        given = [x.replace('{models}', str(self._models)) for x in base.make]
        command = [sys.executable, '-m', 'ptune.pretrained.make']
        made = subprocess.run([*command, f'--output={checkpoint}', *given])
        if made.returncode:
          raise UserError(
            f'{checkpoint} was not made: its pre-training ended with status'
            f' {made.returncode} and printed the reason; the same command'
            ' resumes'
          )
    config = base.config or identity.config(open_checkpoint(checkpoint))
    return checkpoint, dataclasses.replace(config, **self._how)

  def _data(self, task: str | TextTask) -> settings.Data:
    study = self._study
    return settings.Data(
      task,
      study.task_feature_lengths,
      study.module,
      batch_size=study.batch_size,
    )

  # --------------------------------------------------------------- evaluation

  def _evaluation(
    self, cell: Cell, plan: parameters.Plan, output: epath.Path
  ) -> Callable[[epath.Path, int], float]:
    """A function that scores a cell's runs, of any seed, on its task and split.

    The runs share one compiled evaluation. It writes predictions below
    `output`, and names them by the seed instead of the step.
    """
    data = self._data(cell.evaluated or cell.task)
    how = settings.Evaluation(
      split=cell.split or 'validation', steps=self._eval_steps
    )
    evaluate = evaluation_of(
      seqio_task.load(data.task, data.module),
      plan,
      EncoderDecoderModel(plan.network),
      data,
      how,
      directory=output,
    )
    checkpoint, config = self._base(cell.base)
    base = None
    if cell.method.placements:
      base = trained_model.load_base(config, checkpoint, self._mesh)

    def score(run: epath.Path, seed: int) -> float:
      trained = settings.Trained(model_dir=os.fspath(run))
      params, _ = trained_model.load(plan, trained, base)
      return selection.score(self._best_metric, evaluate((params,), seed))

    return score

  def _vote(self) -> None:
    """Adds the scores of each cell's best seed and of its seeds' ensemble."""
    for cell in self._study.cells:
      if self._voted(cell):
        continue
      found = [r for r in (self._found(cell, s) for s in self._seeds) if r]
      prompts = {
        f'seed{r.seed}': os.fspath(
          self._directory / r.prompt / 'prompts' / 'best.npy'
        )
        for r in found
      }
      output = self._directory / f'{ensemble.NAME}_{_slug(cell.row)}'
      checkpoint, config = self._base(cell.base)
      scores = evaluate.evaluate(
        data=self._data(cell.task),
        config=config,
        method=cell.method,
        trained=settings.Trained(checkpoint_path=checkpoint, prompts=prompts),
        evaluation=settings.Evaluation(steps=self._eval_steps),
        output_dir=os.fspath(output),
        model_parallel=self._model_parallel,
      )
      voted = selection.score(self._best_metric, scores)
      best = max(r.score for r in found)
      self._record(
        [
          dataclasses.replace(
            found[0],
            column=column,
            seed=-1,
            score=score,
            setting=self._setting_of_vote(cell),
          )
          for column, score in (
            ('best', best),
            (ensemble.NAME, round(voted, 4)),
          )
        ]
      )

  # ------------------------------------------------------------------ drawing

  def _shown(self) -> list[Result]:
    shown = []
    for cell in self._study.cells:
      seeds = self._seeds_of(cell)
      shown += [r for seed in seeds if (r := self._found(cell, seed))]
      shown += self._voted(cell) if self._study.vote else []
    return shown

  def _draw(self) -> None:
    shown = self._shown()
    if self._study.report is None:
      grid = tables.table(shown)
      sized = self._study.by_size and len(tables.columns(grid)) > 1
      x = {r.column: r.parameters for r in shown} if sized else None
      text = tables.markdown(grid)
      drawn = {'figure': tables.draw(grid, self._study.title, x)}
    else:
      text, drawn = self._study.report(shown, self._directory)
    text = f'{self._study.title}\n\n{text}'
    write_atomically(self._directory / 'table.md', text)
    files: list[str] = []
    for name, fig in drawn.items():
      files += figures.save(fig, self._directory, name)
    names = ', '.join(['results.csv', 'table.md', *files])
    print(f'{text}\nin {self._directory}: {names}')


def where(cell: Cell) -> str:
  """The directory of a cell's own evaluations, beside its runs."""
  parts = [cell.evaluated, cell.split]
  return _slug('_'.join(['eval', *(part for part in parts if part)]))


def of_seeds(run: str, seed: int) -> str:
  """The common name of the runs of a training that differ in their seeds."""
  return run.removesuffix(f'_seed{seed}')


def _digest(*settings: Any) -> str:
  text = json.dumps(_facts(settings), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _facts(x: Any) -> Any:
  """Settings as JSON; a function becomes its name and its closure's values."""
  if isinstance(x, Mapping):
    return {str(key): _facts(value) for key, value in x.items()}
  if isinstance(x, list | tuple):
    return [_facts(value) for value in x]
  if isinstance(x, np.ndarray):
    return hashlib.sha256(x.tobytes()).hexdigest()
  if isinstance(x, functools.partial):
    return _facts([x.func, x.args, x.keywords])
  if isinstance(x, TextTask):
    return _facts_of_texts(x)
  if callable(x):
    x = inspect.unwrap(x)
    name = f'{x.__module__}.{x.__qualname__}'
    if not inspect.isfunction(x):
      return name
    return _facts([name, inspect.getclosurevars(x).nonlocals])
  if dataclasses.is_dataclass(x):
    return _facts({f.name: getattr(x, f.name) for f in dataclasses.fields(x)})
  return x if isinstance(x, str | int | float | None) else str(x)


@functools.cache
def _facts_of_texts(task: TextTask) -> Any:
  splits = {
    split: hashlib.sha256(json.dumps(task.texts(split)).encode()).hexdigest()
    for split in task.splits
  }
  return _facts([task.name, task.labels, task.rank, task.metric_fns, splits])


def _slug(name: str) -> str:
  return ''.join(c if c.isalnum() or c in '._-' else '_' for c in name)
