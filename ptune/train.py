"""`ptune train`: tunes a prompt, or whatever a method trains, on a task.

Read from top to bottom: checks, the parameters and where they come from, the
compiled step, the loop. Stopped at any moment and started again by the same
command, a run goes on from its last checkpoint and ends with the bits of an
undisturbed one: all that changes is in the train state, the batch of a step is
a function of the step, and so is its dropout.
"""

import collections
import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath

import gin
from ptune.convert import (
  account,
  check_config,
  open_checkpoint,
  restore,
  with_rows,
)
from ptune.convert.trained import dump as dump_trained
from ptune.data import batches as batches_lib
from ptune.data import packing, seqio_task
from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.model import parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving.evaluation import Stopped, evaluation_of
from ptune.training import (
  checkpoints,
  lock,
  optim,
  profiling,
  selection,
  settings,
  stopping,
)
from ptune.training import report as report_lib
from ptune.training import state as state_lib
from ptune.training.checkpoints import Checkpoints

Optimizer = Callable[..., optax.GradientTransformation]


def train(
  *,
  model_dir: str,
  train_steps: int,
  data: settings.Data,
  config: Config,
  method: Method,
  initial_checkpoint_path: str | None,
  model: Callable[..., EncoderDecoderModel] = EncoderDecoderModel,
  optimizer: Optimizer = optim.adafactor,
  evaluation: settings.Evaluation = settings.Evaluation(),
  saving: settings.Saving = settings.Saving(),
  seed: int = 0,
  model_parallel: int = 1,
) -> state_lib.TrainState:
  """Trains, evaluates and saves, and goes on where an earlier start left off.

  Args:
    model_dir: Where everything is written.
    train_steps: Steps of this run.
    data: The task, and its batches.
    config: The network's sizes.
    method: What is added to the network, and trained.
    initial_checkpoint_path: The base model; None, where all is trained, to
      start from random weights.
    model: The loss.
    optimizer: Called with `initial_step=`, the step of the base model.
    evaluation: What is evaluated on the way, and what the best prompt is.
    saving: What is written on the way.
    seed: Of the initialisation, the data order and dropout.
    model_parallel: Devices that one copy of the weights is split over.

  Returns:
    The final state.

  Raises:
    ValueError: If the settings do not fit together, before any step.
    FloatingPointError: If the loss is not finite.
  """
  # ------------------------------------------------------------------ checks
  settings.check(data, evaluation, saving, TRAIN_STEPS=train_steps)
  directory = checkpoints.run_directory(model_dir)
  task = seqio_task.load(data.task, data.module)
  seqio_task.check(task, data.feature_lengths, 'train', data.use_cached)
  seqio_task.check_vocabulary(
    task, config.vocab_size, config.ids, initial_checkpoint_path
  )
  evaluates = check_evaluation(task, evaluation)
  mesh = partitioning.make_mesh(model_parallel)
  batches_lib.check_batch_size(data.batch_size, mesh, data.microbatches)
  batches_lib.check_batch_size(evaluation.batch_size or data.batch_size, mesh)

  plan = parameters.plan(config, method, mesh)
  logging.info('%s', parameters.summary(plan))
  if plan.frozen and initial_checkpoint_path is None:
    raise UserError(
      f'method {method.name!r} freezes the base model, so'
      ' INITIAL_CHECKPOINT_PATH is needed; for example'
      ' --gin.INITIAL_CHECKPOINT_PATH="\'/models/t5_1_1_small\'"'
    )
  pack = data.pack
  trained = packing.model_of(model, plan) if pack else model(plan.network)
  run: dict[str, Any] = {
    **parameters.identity(plan),
    'task': task.name,
    'task_feature_lengths': dict(data.feature_lengths),
    'batch_size': data.batch_size,
    'pack': int(pack),
    'bucket_multiple': None if pack else data.bucket_multiple,
    'seed': seed,
    'optimizer': getattr(optimizer, '__name__', type(optimizer).__name__),
  }
  checkpoints.check_writable('MODEL_DIR', directory)
  with lock.held(directory):
    present = checkpoints.read_run(directory)
    checkpoints.compare(directory, present, run)

    # ----------------------------------------------- where an earlier start was
    source = None
    if initial_checkpoint_path is not None:
      source = open_checkpoint(initial_checkpoint_path)
      check_config(source, config)
      plan = with_rows(plan, source)
    run['initial_step'] = (source and source.step) or 0
    tx = optimizer(initial_step=run['initial_step'])
    like = state_lib.abstract_state(tx, plan)
    state, sums = checkpoints.restore(directory / 'checkpoints', like) or (
      None,
      {},
    )
    start = 0 if state is None else int(state.step)
    records = [
      r for r in report_lib.read_records(directory) if r['step'] <= start
    ]
    if state is not None:
      scored = not evaluates or bool(report_lib.scores_at(records, start))
      early = selection.patience_is_over(
        records, evaluation.best_metric, evaluation.early_stopping
      )
      if start > train_steps or (scored and (early or start == train_steps)):
        scores = report_lib.scores_at(records, start)
        write_prompt(directory, f'step_{start}', plan, state, scores, present)
        logging.info(
          'the run in %s is finished, at step %d; for more steps raise %s',
          directory,
          start,
          'EARLY_STOPPING' if early else 'TRAIN_STEPS',
        )
        return state
      logging.info('going on from step %d of %s', start, directory)

    # ------------------------------------------------------------------ data
    read = functools.partial(
      packing.PackedBatches if pack else batches_lib.Batches,
      task,
      data.feature_lengths,
      data.batch_size,
      seed=seed,
      use_cached=data.use_cached,
      in_memory=data.in_memory,
      ids=config.ids,
      embedding_rows=config.vocab_size,
      positions=directory / 'stream',
    )
    batches = (
      read(method=method, pack=pack)
      if pack
      else read(bucket_multiple=data.bucket_multiple)
    )
    evaluate_all = None
    if evaluates:
      evaluate_all = evaluation_of(
        task,
        plan,
        model(plan.network),
        data,
        evaluation,
        seed,
        directory / 'eval',
      )

    # ------------------------------------------------------------ parameters
    needed = plan.base if state is None else plan.frozen
    if source is not None and needed:
      base = restore(
        source, plan.select(needed), ignore=plan.params.__contains__
      )
      fresh = plan.select(plan.adapters) if state is None else {}
      logging.info('%s', account(source, base, fresh))
    else:
      base = parameters.initialize(plan, needed, seed)
      if needed:
        logging.info('the model starts from random weights')
    frozen = {path: base[path] for path in plan.frozen}
    run['base'] = checkpoints.fingerprint(frozen) if frozen else None
    checkpoints.compare(directory, present, run)
    if state is None:
      trainable = {path: base[path] for path in plan.trainable & plan.base}
      trainable |= first_adapters(plan, base, task, data, seed)
      state = state_lib.first_state(tx, parameters.unflatten(trainable), like)
    del base
    frozen = parameters.unflatten(parameters.hold(plan, frozen))

    # ------------------------------------------------------------------ loop
    # From here on MODEL_DIR is written to: all that can be wrong was looked at.
    update = state_lib.compile_step(
      trained, tx, plan, like, data.microbatches, seed
    )
    check = None if pack else method.check  # Packing looks at each example.
    # Of packed rows, known once the first are there: before others are read.
    examples_per_step = batches.examples_per_step
    ahead = batches_lib.prefetch(batches, start, train_steps, mesh, check=check)
    # A stream is first read up to here, which can take long.
    following = next(ahead, None)
    pending: collections.deque[Mapping[str, jax.Array]] = collections.deque()
    sums, step, stop = dict(sums), start, False
    with (
      stopping.explained(directory),
      stopping.signals() as asked,
      contextlib.closing(ahead),
      Checkpoints(
        directory / 'checkpoints', start, saving.keep_checkpoints
      ) as saved,
      report_lib.Report(
        directory,
        start,
        train_steps,
        examples_per_step,
        jax.process_index() == 0,
      ) as report,
      profiling.Profile(directory / 'profile', saving.profile_steps) as profile,
    ):
      checkpoints.claim(directory, run, from_where(initial_checkpoint_path))
      if jax.process_index() == 0:
        report_lib.write_atomically(
          directory / 'model-info.txt', parameters.describe(plan)
        )
        report_lib.write_atomically(
          directory / 'config.gin', gin.operative_config_str()
        )
      while True:
        stop, last = stop or asked(step), step >= train_steps
        log, keep, look = (
          step > 0 and (last or step % period == 0)
          for period in (
            saving.log_period,
            saving.checkpoint_period,
            evaluation.period,
          )
        )
        look = look and evaluate_all is not None
        # The restored step's prompt may not have been written.
        keep = keep or (step > 0 and (stop or step == start or saved.failed))
        # Metrics are read when the device is two steps further, so that it
        # never waits for the host; all of them before anything is written.
        while len(pending) > (0 if log or keep or look else 2):
          done = step - len(pending) + 1
          _add_sums(sums, pending.popleft(), done, saved)
          report.progress(done, sums)
        if sums and (log or look):
          report.train(step, sums)
          sums = {}
        if keep:
          save(saved, state, sums, wait=last or stop)
        elif look:  # What is spoiled shall not become the best.
          check_finite(saved, state)
        scores = report_lib.scores_at(report.records, step)
        if evaluate_all and look and not stop and not scores:
          try:
            with report.paused('evaluating'):
              scores = evaluate_all((state.trainable, frozen), step, asked)
            better = selection.is_best(
              report.records, evaluation.best_metric, scores
            )
          except Stopped:
            stop = True
            continue  # To the top, which saves.
          except Exception:  # A metric's, or BEST_METRIC; nothing is lost.
            save(saved, state, sums, wait=True)
            raise
          if better:
            checkpoints.save_best(
              directory / 'best', state.replace(opt_state={})
            )
            write_prompt(directory, 'best', plan, state, scores, run)
          # Recorded last: what is recorded is not done again after a hard stop.
          report.evaluate(step, evaluate_all.split, scores)
          if selection.patience_is_over(
            report.records, evaluation.best_metric, evaluation.early_stopping
          ):
            last = keep = True
            save(saved, state, sums, wait=True)
        if keep:
          write_prompt(directory, f'step_{step}', plan, state, scores, run)
        if last or stop:
          break
        assert following is not None and following[0] == step
        _, batch = following
        with plan.scope():
          if step == start:  # Compiles; later only new lengths do.
            with report.paused('compiling'):
              state, metrics = update(state, frozen, batch)
          else:
            with profile.step(step, state):
              state, metrics = update(state, frozen, batch)
        pending.append(metrics)
        step += 1
        following = next(ahead, None)
    if last and (scores or not look):
      logging.info('finished at step %d: %s', step, directory)
    else:
      logging.info(
        'stopped at step %d, which is saved in %s; the same command goes on'
        ' from there',
        step,
        directory,
      )
    return state


def from_where(checkpoint: str | None) -> dict[str, str | None]:
  """What a run records of its base: found from any directory."""
  if checkpoint is not None and '://' not in checkpoint:
    checkpoint = os.fspath(checkpoints.absolute(checkpoint))
  return {'initial_checkpoint_path': checkpoint}


def first_adapters(
  plan: parameters.Plan,
  base: Mapping[str, jax.Array],
  task: seqio_task.Provider,
  data: settings.Data,
  seed: int,
) -> parameters.Flat:
  """First values of what the method added; they may look at base and task."""
  return prompt_init.initialize_adapters(
    plan,
    prompt_init.Base(
      embedding=functools.partial(parameters.embedding_rows, plan, base),
      vocabulary=lambda: seqio_task.vocabulary(task),
      labels=lambda: seqio_task.distinct_targets(
        task, data.feature_lengths, use_cached=data.use_cached
      ),
    ),
    seed,
  )


def check_evaluation(
  task: seqio_task.Provider, evaluation: settings.Evaluation
) -> bool:
  """Whether there is a split to evaluate; the default need not exist."""
  split = evaluation.split
  if split is not None and split in task.splits:
    return True
  splits = ', '.join(sorted(task.splits))
  if split not in (None, 'validation'):
    raise UserError(
      f'EVAL_SPLIT is {split!r}, and task {task.name!r} has the splits'
      f' {splits}; choose one of them, or None to evaluate nothing'
    )
  for name, value in (
    ('EARLY_STOPPING', evaluation.early_stopping),
    ('BEST_METRIC', evaluation.best_metric),
  ):
    if value is not None:
      raise UserError(
        f'{name} is {value!r}, and nothing is evaluated: EVAL_SPLIT is'
        f' {split!r}, and task {task.name!r} has the splits {splits}. Set'
        f' EVAL_SPLIT to one of them, or leave {name} out'
      )
  logging.warning(
    'nothing is evaluated, and no best prompt is chosen: EVAL_SPLIT is %r, and'
    ' the task has the splits %s',
    split,
    splits,
  )
  return False


def save(
  saved: Checkpoints,
  state: state_lib.TrainState,
  sums: Mapping[str, float],
  wait: bool,
) -> None:
  """Saves a state, unless its last update spoiled it."""
  check_finite(saved, state)
  saved.save(state, sums, wait)


def check_finite(saved: Checkpoints, state: state_lib.TrainState) -> None:
  """Raises a FloatingPointError if the last update spoiled the parameters."""
  if not bool(_is_finite(state.trainable)):
    raise FloatingPointError(
      f'the trained parameters are not finite after step {int(state.step)}.'
      f' {_last_good(saved)}'
    )


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
  leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves))


def _add_sums(
  sums: dict[str, float],
  metrics: Mapping[str, jax.Array],
  step: int,
  saved: Checkpoints,
) -> None:
  """Adds one step's metrics; a loss that is not finite ends the run."""
  values = {k: float(v) for k, v in jax.device_get(dict(metrics)).items()}
  if not np.isfinite(values['loss']):
    raise FloatingPointError(
      f'the loss is {values["loss"]} at step {step}. {_last_good(saved)}'
    )
  for key, value in values.items():
    sums[key] = sums.get(key, 0.0) + value
  sums['gradient_norm'] = values['gradient_norm']  # The newest, not a sum.


def _last_good(saved: Checkpoints) -> str:
  saved.wait()
  return (
    f'{saved.last_good()}. Lower LEARNING_RATE, or look at the batch of that'
    ' step'
  )


def write_prompt(
  directory: epath.Path,
  name: str,
  plan: parameters.Plan,
  state: state_lib.TrainState,
  scores: Mapping[str, Mapping[str, float]],
  run: Mapping[str, Any],
) -> None:
  """Writes what is trained for other programs, and what it was trained on."""
  method = plan.method
  if not plan.frozen:
    return  # The checkpoints are the whole model.
  trained = parameters.flatten(state.trainable)
  trained = {path: parameters.whole(x) for path, x in trained.items()}
  if jax.process_index() != 0:
    return
  if method.fold:
    assert plan.rows is not None
    trained = method.fold(trained, plan.rows)
  known = ('task', 'base', 'method', 'settings', 'seed', 'batch_size')
  facts = {
    'step': int(state.step),
    'scores': scores,
    **{k: run[k] for k in known if k in run},
  }
  if method.prompt is None:
    file, contents = f'{name}.safetensors', dump_trained(trained)
  else:
    prompt, buffer = (
      np.asarray(trained[method.prompt], np.float32),
      io.BytesIO(),
    )
    np.save(buffer, prompt)
    file, contents = f'{name}.npy', buffer.getvalue()
    facts['prompt_length'] = prompt.shape[0]
  folder = directory / 'prompts'
  folder.mkdir(parents=True, exist_ok=True)
  report_lib.write_atomically(folder / file, contents)
  report_lib.write_atomically(
    folder / f'{name}.json', json.dumps(facts, indent=2) + '\n'
  )


if __name__ == '__main__':
  # The same as `ptune train`; gin imports this module under its own name.
  from ptune import cli

  sys.argv.insert(1, 'train')
  sys.exit(cli.main())
