"""Trains many prompts at once: one frozen model, one compiled program.

    runs = {
      f'seed{seed}': many.Trial(None, prompt.prompt(100), seed=seed)
      for seed in range(8)
    }
    data = settings.Data('my_sst2', {'inputs': 128, 'targets': 4})
    train_many(
      runs, model_dir='/runs/seeds', train_steps=1000, data=data, ...
    )

Use it for sweeps (seeds, learning rates, lengths, initialisations) and for
several tasks. Each run ends with the prompt that `ptune train` would give it.
It has a subdirectory of `model_dir`, named after it, with run.json, prompts/,
best/ and metrics.jsonl as `ptune train` writes them. One checkpoint holds all
runs.

If dropout and bucket_multiple are both set, a run's prompt is as good as the
one of `ptune train` but not bit-identical: rows are padded to the longest of
all runs, and dropout depends on shapes.

A run can use any method that adds parameters to the model and trains only
these.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ptune.convert import check_config, open_checkpoint, with_rows
from ptune.convert.fingerprint import of_params
from ptune.data import device_feed, seqio_task
from ptune.errors import UserError
from ptune.model import frozen_weights, parameters, partitioning
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving.evaluation import evaluation_of
from ptune.training import loop, many, optim, run_file, settings, start
from ptune.training.member import Member
from ptune.training.run import Run


def train_many(
  runs: Mapping[str, many.Trial],
  *,
  model_dir: str,
  train_steps: int,
  data: settings.Data,
  config: Config,
  initial_checkpoint_path: str,
  model: Callable[..., EncoderDecoderModel] = EncoderDecoderModel,
  optimizer: many.Optimizer = optim.adafactor,
  evaluation: settings.Evaluation = settings.Evaluation(),
  saving: settings.Saving = settings.Saving(),
  model_parallel: int = 1,
) -> dict[str, dict[str, np.ndarray]]:
  """Trains, evaluates and saves all runs; resumes an earlier start.

  Args:
    runs: The runs by name; the name is the subdirectory of `model_dir`.
    data: The batches of each run. Runs without a task use `data.task`.
    optimizer: Called with `initial_step=` and with `learning_rate=`, a number.
    Other arguments: See `train.train`; they hold for every run.

  Returns:
    The trained parameters of each run, by path.

  Raises:
    ValueError: If the settings do not fit together, before any step.
    FloatingPointError: If the loss of a run is not finite.
  """
  # ------------------------------------------------------------------ checks
  settings.check(data, evaluation, saving, TRAIN_STEPS=train_steps)
  runs = _checked(runs, data)
  tasks, evaluated = {}, {}
  for one in runs.values():
    tasks[one.task] = start.open_task(
      one.task, data, config, initial_checkpoint_path
    )
    evaluated[one.task] = start.check_evaluation(tasks[one.task], evaluation)
  mesh = partitioning.make_mesh(model_parallel)
  start.check_batch_sizes(data, evaluation, mesh)
  groups = many.group(runs, config, mesh)
  order = [name for members in groups.values() for name in members.runs]
  with Run(model_dir, initial_checkpoint_path, order) as run:
    # ---------------------------------------------------- an earlier start
    source = open_checkpoint(initial_checkpoint_path)
    check_config(source, config)
    places = {
      name: (key, with_rows(members.plan, source))
      for key, members in groups.items()
      for name in members.runs
    }
    facts = {}
    for name, one in runs.items():
      (_, plan), scored = places[name], evaluated[one.task]
      facts[name] = facts_of(one, plan, tasks, data, model, scored, optimizer)
      facts[name]['initial_step'] = source.step or 0
    run.compare(facts)
    tx = optimizer(initial_step=source.step or 0, learning_rate=0.0)
    state = run.restore(many.abstract_state(tx, groups))
    _check_start(run, train_steps)

    # ------------------------------------------------------------------ data
    @functools.cache  # Runs with the same task and seed share rows.
    def rows_of(task, seed):
      place = run.directory / 'stream' / f'{tasks[task].name}-{seed}'
      return start.rows_of(tasks[task], data, config, None, seed, place)

    rows = [rows_of(runs[name].task, runs[name].seed) for name in order]

    @functools.cache  # Runs with the same task and group share a program.
    def evaluation_for(task, key):
      if evaluated[task] is None:
        return None
      plan = groups[key].plan
      return evaluation_of(
        tasks[task], plan, model(plan.network), data, evaluation
      )

    evaluate = {
      name: evaluation_for(one.task, places[name][0])
      for name, one in runs.items()
    }

    # ------------------------------------------------------------ parameters
    plan = next(iter(groups.values())).plan
    base = start.initial_base(plan, source, plan.base, False, 0)
    fingerprint = of_params(base)
    for own in facts.values():
      own['base'] = fingerprint
    run.compare(facts)
    if state is None:
      trainable = {}
      for name, one in runs.items():
        own = dataclasses.replace(places[name][1], method=one.method)
        trainable[name] = parameters.unflatten(
          start.first_adapters(own, base, tasks[one.task], data, one.seed)
        )
      state = many.first_state(tx, trainable, groups)
    frozen = parameters.unflatten(frozen_weights.freeze(plan, base))

    # ------------------------------------------------------------------ loop
    update = many.compile_step(
      model, optimizer, source.step or 0, runs, groups, data.microbatches
    )
    members = []
    for name in order:
      own = functools.partial(many.of_run, groups=groups, run=name)
      members.append(Member(name, places[name][1], facts[name], own))
    check = functools.partial(_check_rows, groups, data.batch_size)
    joined = lambda step: many.joined([b(step) for b in rows], config.ids.pad)
    with contextlib.closing(
      device_feed.prefetch(joined, run.start, train_steps, mesh, check=check)
    ) as ahead:
      following = device_feed.with_first(ahead)
      run.begin(members, train_steps, data.batch_size, saving)
      steps = loop.Loop(run, update, frozen, evaluate, evaluation)
      state = steps(state, following)
    return {member.name: member.trained(state) for member in members}


def facts_of(
  run: many.Trial,
  plan: parameters.Plan,
  tasks: Mapping[str | None, seqio_task.Provider],
  data: settings.Data,
  model: Callable[..., EncoderDecoderModel],
  evaluation: settings.Evaluation | None,
  optimizer: many.Optimizer,
) -> dict[str, Any]:
  """The facts of one of the runs; see `start.facts_of`."""
  rate, task, made = run.learning_rate, tasks[run.task], model(plan.network)
  return {
    **start.facts_of(plan, task, data, made, evaluation, run.seed, optimizer),
    'learning_rate': 'schedule' if callable(rate) else rate,
  }


def _check_rows(groups: Mapping[str, many.Group], size: int, tokens) -> None:
  """Lets each group's method check its own rows of a batch."""
  first = 0
  for group in groups.values():
    rows = slice(first, first := first + len(group.runs) * size)
    if group.plan.method.check:
      group.plan.method.check(tokens[rows])


def _check_start(run: Run, train_steps: int) -> None:
  if run.start > train_steps:
    raise UserError(
      f'the runs in {run.directory} are at step {run.start}, beyond'
      f' TRAIN_STEPS {train_steps}; raise it, or choose another MODEL_DIR'
    )


def _checked(
  runs: Mapping[str, many.Trial], data: settings.Data
) -> dict[str, many.Trial]:
  """Checks the runs and sets the task of each."""
  if data.pack:
    raise UserError(f'PACK is {data.pack}; only ptune train packs rows')
  if data.privacy:
    raise UserError(
      'train_many cannot train privately; train each run by ptune train, or'
      ' leave out losses/private.gin'
    )
  taken = ('', '.', '..', 'checkpoints', 'stream', run_file.FILE)
  wrong = [name for name in runs if name in taken or '/' in name]
  if wrong or not runs:
    raise UserError(
      f'the runs are {list(runs)}; give at least one, and choose names that can'
      f' be directories instead of {wrong}'
    )
  return {
    name: dataclasses.replace(run, task=run.task or data.task)
    for name, run in runs.items()
  }
