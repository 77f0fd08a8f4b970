"""Trains many prompts at once, on one frozen model and in one program.

    runs = {
      f'seed{seed}': many.Run(None, prompt.prompt(100), seed=seed)
      for seed in range(8)
    }
    data = settings.Data('my_sst2', {'inputs': 128, 'targets': 4})
    train_many(
      runs, model_dir='/runs/seeds', train_steps=1000, data=data, ...
    )

For sweeps (seeds, learning rates, lengths, initialisations) and for several
tasks. Each run ends with the prompt that `ptune train` would give it, and has
below `model_dir` a directory of its name with run.json, prompts/, best/ and
metrics.jsonl as that leaves them. The checkpoints are of all runs together.
With dropout and bucket_multiple, equal means as good as, not bit by bit: rows
are padded to the longest of all runs, and what is dropped depends on shapes.
Whatever adds parameters to the model and trains only those can be a run.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ptune import train
from ptune.convert import (
  account,
  check_config,
  open_checkpoint,
  restore,
  with_rows,
)
from ptune.data import batches as batches_lib
from ptune.data import seqio_task
from ptune.errors import UserError
from ptune.model import parameters, partitioning
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving.evaluation import Stopped, evaluation_of
from ptune.training import (
  checkpoints,
  lock,
  many,
  optim,
  selection,
  settings,
  stopping,
)
from ptune.training import report as report_lib
from ptune.training.checkpoints import Checkpoints
from ptune.training.many import Run
from ptune.training.state import TrainState

Sums = dict[str, dict[str, float]]


def train_many(
  runs: Mapping[str, Run],
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
  """Trains, evaluates and saves all runs, and goes on where it was stopped.

  Args:
    runs: By name: the directory of each below `model_dir`.
    data: The batches of each run; `data.task` is that of runs without one.
    optimizer: Called with `initial_step=` and with `learning_rate=`, a number.
    The others: as of `train.train`, for every run.

  Returns:
    What each run trained, by path.

  Raises:
    ValueError: If the settings do not fit together, before any step.
    FloatingPointError: If the loss of a run is not finite.
  """
  # ------------------------------------------------------------------ checks
  settings.check(data, evaluation, saving, TRAIN_STEPS=train_steps)
  runs = {
    name: dataclasses.replace(run, task=run.task or data.task)
    for name, run in runs.items()
  }
  _check_names(runs)
  directory = checkpoints.run_directory(model_dir)
  tasks, evaluated = {}, {}
  for run in runs.values():
    task = seqio_task.load(run.task, data.module)
    seqio_task.check(task, data.feature_lengths, 'train', data.use_cached)
    seqio_task.check_vocabulary(
      task, config.vocab_size, config.ids, initial_checkpoint_path
    )
    tasks[run.task] = task
    evaluated[run.task] = train.check_evaluation(task, evaluation)
  mesh = partitioning.make_mesh(model_parallel)
  batches_lib.check_batch_size(data.batch_size, mesh, data.microbatches)
  batches_lib.check_batch_size(evaluation.batch_size or data.batch_size, mesh)
  groups = many.group(runs, config, mesh)
  order = [name for members in groups.values() for name in members.runs]
  checkpoints.check_writable('MODEL_DIR', directory)
  with lock.held(directory), contextlib.ExitStack() as stack:
    # --------------------------------------------------- what is there already
    source = open_checkpoint(initial_checkpoint_path)
    check_config(source, config)
    places = {
      name: (key, with_rows(members.plan, source))
      for key, members in groups.items()
      for name in members.runs
    }
    present = checkpoints.read_run(directory)
    checkpoints.compare(directory, present, whole := {'runs': order})
    facts = {
      name: {
        **parameters.identity(places[name][1]),
        'task': tasks[run.task].name,
        'task_feature_lengths': dict(data.feature_lengths),
        'batch_size': data.batch_size,
        'bucket_multiple': data.bucket_multiple,
        'seed': run.seed,
        'learning_rate': (
          'schedule' if callable(run.learning_rate) else run.learning_rate
        ),
        'optimizer': getattr(optimizer, '__name__', type(optimizer).__name__),
        'initial_step': source.step or 0,
      }
      for name, run in runs.items()
    }
    present = {name: checkpoints.read_run(directory / name) for name in runs}
    for name in runs:
      checkpoints.compare(directory / name, present[name], facts[name])
    tx = optimizer(initial_step=source.step or 0, learning_rate=0.0)
    like = many.abstract_state(tx, groups)
    state, sums = checkpoints.restore(directory / 'checkpoints', like) or (
      None,
      {},
    )
    start = 0 if state is None else int(state.step)
    if start > train_steps:
      raise UserError(
        f'the runs in {directory} are at step {start}, beyond TRAIN_STEPS'
        f' {train_steps}; raise it, or choose another MODEL_DIR'
      )

    # ------------------------------------------------------------------- data
    @functools.cache  # Runs of one task and seed share its rows.
    def batches_of(task, seed):
      return batches_lib.Batches(
        tasks[task],
        data.feature_lengths,
        data.batch_size,
        seed=seed,
        bucket_multiple=data.bucket_multiple,
        use_cached=data.use_cached,
        in_memory=data.in_memory,
        ids=config.ids,
        embedding_rows=config.vocab_size,
        positions=directory / 'stream' / f'{tasks[task].name}-{seed}',
      )

    streams = [batches_of(runs[name].task, runs[name].seed) for name in order]

    def check(tokens):
      first = 0
      for group in groups.values():
        rows = slice(first, first := first + len(group.runs) * data.batch_size)
        if group.plan.method.check:
          group.plan.method.check(tokens[rows])

    @functools.cache  # Runs of one task and group share a compiled program.
    def evaluation_for(task, key):
      plan = groups[key].plan
      return evaluation_of(
        tasks[task], plan, model(plan.network), data, evaluation
      )

    # ------------------------------------------------------------- parameters
    plan = next(iter(groups.values())).plan
    base = restore(
      source, plan.select(plan.base), ignore=plan.params.__contains__
    )
    logging.info('%s', account(source, base))
    fingerprint = checkpoints.fingerprint(base)
    for name in runs:
      facts[name]['base'] = fingerprint
      checkpoints.compare(directory / name, present[name], facts[name])
    if state is None:
      state = many.first_state(
        tx,
        {
          name: parameters.unflatten(
            train.first_adapters(
              dataclasses.replace(places[name][1], method=run.method),
              base,
              tasks[run.task],
              data,
              run.seed,
            )
          )
          for name, run in runs.items()
        },
        groups,
      )
    frozen = parameters.unflatten(parameters.hold(plan, base))
    update = many.compile_step(
      model, optimizer, source.step or 0, runs, groups, data.microbatches
    )

    # ------------------------------------------------------------------- loop
    ahead = batches_lib.prefetch(
      lambda step: many.joined(
        [batches(step) for batches in streams], config.ids.pad
      ),
      start,
      train_steps,
      mesh,
      check=check,
    )
    stack.enter_context(stopping.explained(directory))
    asked = stack.enter_context(stopping.signals())
    stack.enter_context(contextlib.closing(ahead))
    saved = stack.enter_context(
      Checkpoints(directory / 'checkpoints', start, saving.keep_checkpoints)
    )
    checkpoints.claim(directory, whole, {})
    reports: dict[str, report_lib.Report] = {}
    for name in order:
      (directory / name).mkdir(parents=True, exist_ok=True)
      checkpoints.claim(
        directory / name,
        facts[name],
        train.from_where(initial_checkpoint_path),
      )
      reports[name] = stack.enter_context(
        report_lib.Report(
          directory / name,
          start,
          train_steps,
          data.batch_size,
          jax.process_index() == 0,
          name,
        )
      )
    sums, step, pending = {k: dict(v) for k, v in sums.items()}, start, None
    while True:
      stop, last = asked(step), step >= train_steps
      log, keep, look = (
        step > 0 and (last or step % period == 0)
        for period in (
          saving.log_period,
          saving.checkpoint_period,
          evaluation.period,
        )
      )
      keep = keep or (step > 0 and (stop or step == start or saved.failed))
      if pending is not None and (log or keep or look):
        _add_sums(sums, order, pending, step, saved)
        pending = None
      if sums and (log or look):
        for name, report in reports.items():
          report.train(step, sums[name])
        sums = {}
      if keep:
        train.save(saved, state, sums, wait=last or stop)
      elif look:
        train.check_finite(saved, state)
      for name, report in reports.items() if keep or look else ():
        run, (key, own) = runs[name], places[name]
        one = TrainState(state.step, many.of_run(state, groups, name), {})
        scores = report_lib.scores_at(report.records, step)
        if look and not stop and not scores and evaluated[run.task]:
          evaluate_one = evaluation_for(run.task, key)
          try:
            scores = evaluate_one((one.trainable, frozen), step, asked)
          except Stopped:
            stop = True
            train.save(saved, state, sums, wait=True)
            break
          if selection.is_best(report.records, evaluation.best_metric, scores):
            saved.wait()
            checkpoints.save_best(directory / name / 'best', one)
            train.write_prompt(
              directory / name, 'best', own, one, scores, facts[name]
            )
          report.evaluate(step, evaluate_one.split, scores)
        if keep:
          train.write_prompt(
            directory / name,
            f'step_{step}',
            own,
            one,
            scores,
            facts[name],
          )
      if last or stop:
        break
      _, batch = next(ahead)
      with plan.scope():
        state, metrics = update(state, frozen, batch)
      pending = metrics if pending is None else _add(pending, metrics)
      step += 1
    logging.info(
      '%s at step %d: %s',
      'finished' if last and not stop else 'stopped',
      step,
      directory,
    )
    return {
      name: {
        path: parameters.whole(x)
        for path, x in parameters.flatten(
          many.of_run(state, groups, name)
        ).items()
      }
      for name in runs
    }


def _check_names(runs: Mapping[str, Run]) -> None:
  taken = ('', '.', '..', 'checkpoints', checkpoints.RUN_FILE)
  wrong = [name for name in runs if name in taken or '/' in name]
  if wrong or not runs:
    raise UserError(
      f'the runs are {list(runs)}: there must be one at least, and a name is'
      f' that of a directory; choose others than {wrong}'
    )


@jax.jit
def _add(total: dict[str, jax.Array], more: dict[str, jax.Array]):
  """Adds sums; of the gradient's norm, the newest is kept."""
  norm = more['gradient_norm']
  return jax.tree.map(jnp.add, total, more) | {'gradient_norm': norm}


def _add_sums(
  sums: Sums,
  order: Sequence[str],
  pending: Mapping[str, jax.Array],
  step: int,
  saved: Checkpoints,
) -> None:
  """Adds what the device has summed up; a loss must be finite."""
  values = jax.device_get(dict(pending))
  for i, name in enumerate(order):
    if not np.isfinite(values['loss'][i]):
      saved.wait()
      raise FloatingPointError(
        f'the loss of run {name!r} is {values["loss"][i]} up to step {step}.'
        f' {saved.last_good()}. Lower its learning rate, or leave it out in'
        ' another MODEL_DIR'
      )
    own = sums.setdefault(name, {})
    for key, value in values.items():
      own[key] = own.get(key, 0.0) + float(value[i])
    own['gradient_norm'] = float(values['gradient_norm'][i])
