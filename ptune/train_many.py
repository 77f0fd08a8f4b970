"""Trains many prompts at once, on one frozen model and in one program.

    runs = {
      f'seed{seed}': many.Run('my_sst2', prompt.prompt(100), seed=seed)
      for seed in range(8)
    }
    train_many(runs, model_dir='/runs/seeds', train_steps=1000, ...)

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
from ptune.data import batches as data
from ptune.data import seqio_task
from ptune.errors import UserError, check_counts
from ptune.model import parameters, partitioning
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.model.sizes import T5Config
from ptune.serving.evaluation import Evaluation, Stopped
from ptune.training import checkpoints, lock, many, optim, selection, stopping
from ptune.training import report as report_lib
from ptune.training.checkpoints import Checkpoints
from ptune.training.many import Run
from ptune.training.state import TrainState

Sums = dict[str, dict[str, float]]


def train_many(
  runs: Mapping[str, Run],
  *,
  model_dir: str,
  task_feature_lengths: Mapping[str, int],
  train_steps: int,
  config: T5Config,
  initial_checkpoint_path: str,
  mixture_or_task_module: str | Sequence[str] | None = None,
  model: Callable[..., EncoderDecoderModel] = EncoderDecoderModel,
  optimizer: many.Optimizer = optim.adafactor,
  batch_size: int = 32,
  microbatches: int = 1,
  bucket_multiple: int | None = data.BUCKET_MULTIPLE,
  in_memory: bool | None = None,
  use_cached: bool = False,
  eval_period: int = 1000,
  eval_steps: int | None = None,
  eval_split: str | None = 'validation',
  eval_batch_size: int | None = None,
  decoding: Decoding = Decoding(),
  best_metric: str | None = None,
  checkpoint_period: int = 1000,
  keep_checkpoints: int | None = None,
  log_period: int = 50,
  model_parallel: int = 1,
) -> dict[str, dict[str, np.ndarray]]:
  """Trains, evaluates and saves all runs, and goes on where it was stopped.

  Args:
    runs: By name: the directory of each below `model_dir`.
    batch_size: Examples a step of each run.
    optimizer: Called with `initial_step=` and with `learning_rate=`, a number.
    The others: as of `train.train`, for every run.

  Returns:
    What each run trained, by path.

  Raises:
    ValueError: If the settings do not fit together, before any step.
    FloatingPointError: If the loss of a run is not finite.
  """
  # ------------------------------------------------------------------ checks
  check_counts(
    TRAIN_STEPS=train_steps,
    BATCH_SIZE=batch_size,
    MICROBATCHES=microbatches,
    EVAL_PERIOD=eval_period,
    CHECKPOINT_PERIOD=checkpoint_period,
    log_period=log_period,
  )
  check_counts(
    optional=True,
    EVAL_STEPS=eval_steps,
    eval_batch_size=eval_batch_size,
    KEEP_CHECKPOINTS=keep_checkpoints,
  )
  _check_names(runs)
  directory = checkpoints.run_directory(model_dir)
  tasks, evaluated = {}, {}
  for run in runs.values():
    task = seqio_task.load(run.task, mixture_or_task_module)
    seqio_task.check(task, task_feature_lengths, 'train', use_cached)
    seqio_task.check_vocabulary(task, config.vocab_size)
    tasks[run.task] = task
    evaluated[run.task] = train.check_evaluation(
      task, eval_split, None, best_metric
    )
  mesh = partitioning.make_mesh(model_parallel)
  data.check_batch_size(batch_size, mesh, microbatches)
  eval_batch_size = eval_batch_size or batch_size
  data.check_batch_size(eval_batch_size, mesh)
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
        'task': run.task,
        'task_feature_lengths': dict(task_feature_lengths),
        'batch_size': batch_size,
        'bucket_multiple': bucket_multiple,
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
      return data.Batches(
        tasks[task],
        task_feature_lengths,
        batch_size,
        seed=seed,
        bucket_multiple=bucket_multiple,
        use_cached=use_cached,
        in_memory=in_memory,
      )

    streams = [batches_of(runs[name].task, runs[name].seed) for name in order]

    def check(tokens):
      first = 0
      for group in groups.values():
        rows = slice(first, first := first + len(group.runs) * batch_size)
        if group.plan.method.check:
          group.plan.method.check(tokens[rows])

    @functools.cache  # Runs of one task and group share a compiled program.
    def evaluation_of(task, key):
      return Evaluation(
        tasks[task],
        groups[key].plan,
        model(groups[key].plan.network),
        split=eval_split or '',
        feature_lengths=task_feature_lengths,
        batch_size=eval_batch_size,
        how=decoding,
        num_examples=eval_steps and eval_steps * eval_batch_size,
        bucket_multiple=bucket_multiple,
        use_cached=use_cached,
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
              task_feature_lengths,
              use_cached,
              run.seed,
            )
          )
          for name, run in runs.items()
        },
        groups,
      )
    frozen = parameters.unflatten(parameters.hold(plan, base))
    update = many.compile_step(
      model, optimizer, source.step or 0, runs, groups, microbatches
    )

    # ------------------------------------------------------------------- loop
    ahead = data.prefetch(
      lambda step: many.joined([batches(step) for batches in streams]),
      start,
      train_steps,
      mesh,
      check=check,
    )
    stack.enter_context(stopping.explained(directory))
    asked = stack.enter_context(stopping.signals())
    stack.enter_context(contextlib.closing(ahead))
    saved = stack.enter_context(
      Checkpoints(directory / 'checkpoints', start, keep_checkpoints)
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
          batch_size,
          jax.process_index() == 0,
          name,
        )
      )
    sums, step, pending = {k: dict(v) for k, v in sums.items()}, start, None
    while True:
      stop, last = asked(step), step >= train_steps
      log, keep, look = (
        step > 0 and (last or step % period == 0)
        for period in (log_period, checkpoint_period, eval_period)
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
          evaluation = evaluation_of(run.task, key)
          try:
            scores = evaluation((one.trainable, frozen), step, asked)
          except Stopped:
            stop = True
            train.save(saved, state, sums, wait=True)
            break
          if selection.is_best(report.records, best_metric, scores):
            saved.wait()
            checkpoints.save_best(directory / name / 'best', one)
            train.write_prompt(
              directory / name, 'best', own, one, scores, facts[name]
            )
          report.evaluate(step, evaluation.split, scores)
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
