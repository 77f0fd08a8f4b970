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
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from etils import epath

import gin
from ptune import (
  checkpoints,
  data,
  evaluate,
  optim,
  parameters,
  partitioning,
  prompt_init,
)
from ptune import report as report_lib
from ptune import state as state_lib
from ptune.adapters import Method
from ptune.checkpoints import Checkpoints
from ptune.convert import open_checkpoint, restore
from ptune.models import Decoding, EncoderDecoderModel
from ptune.network import T5Config

Optimizer = Callable[..., optax.GradientTransformation]


def train(
  *,
  model_dir: str,
  mixture_or_task_name: str,
  task_feature_lengths: Mapping[str, int],
  train_steps: int,
  config: T5Config,
  method: Method,
  initial_checkpoint_path: str | None,
  mixture_or_task_module: str | Sequence[str] | None = None,
  model: Callable[..., EncoderDecoderModel] = EncoderDecoderModel,
  optimizer: Optimizer = optim.adafactor,
  batch_size: int = 32,
  microbatches: int = 1,
  bucket_multiple: int | None = data.BUCKET_MULTIPLE,
  in_memory: bool | None = None,
  use_cached: bool = False,
  eval_period: int = 1000,
  eval_steps: int | None = None,
  eval_split: str = 'validation',
  eval_batch_size: int | None = None,
  decoding: Decoding = Decoding(),
  best_metric: str | None = None,
  early_stopping: int | None = None,
  checkpoint_period: int = 1000,
  keep_checkpoints: int | None = None,
  log_period: int = 50,
  seed: int = 0,
  model_parallel: int = 1,
) -> state_lib.TrainState:
  """Trains, evaluates and saves, and goes on where an earlier start left off.

  Args:
    model_dir: Where everything is written.
    mixture_or_task_name: The SeqIO task or mixture.
    task_feature_lengths: Longest inputs and targets, in tokens.
    train_steps: Steps of this run.
    config: The network's sizes.
    method: What is added to the network, and trained.
    initial_checkpoint_path: The base model; None, where all is trained, to
      start from random weights.
    mixture_or_task_module: Imported first; registers the task.
    model: The loss.
    optimizer: Called with `initial_step=`, the step of the base model.
    batch_size: Examples a step.
    microbatches: Parts that a batch is computed in, one after the other.
    bucket_multiple: Lengths are rounded up to a multiple of it, in batches of
      like lengths; None pads all to task_feature_lengths.
    in_memory: See `data.Batches`.
    use_cached: USE_CACHED_TASKS.
    eval_period: Steps between evaluations.
    eval_steps: Batches of an evaluation; the whole split if not given.
    eval_split: What is evaluated.
    eval_batch_size: Rows that an evaluation computes at once; batch_size if
      not given.
    decoding: How predictions are made.
    best_metric: Chooses the best prompt: the name of a metric, with a minus
      in front if less is better. If not given, the mean of the task's own
      metrics, or the loss where it has none.
    early_stopping: Evaluations without a better score after which training
      ends; never if not given.
    checkpoint_period: Steps between checkpoints.
    keep_checkpoints: How many are kept; all if not given.
    log_period: Steps between records in the log.
    seed: Of the initialisation, the data order and dropout.
    model_parallel: Devices that one copy of the weights is split over.

  Returns:
    The final state.

  Raises:
    ValueError: If the settings do not fit together, before any step.
    FloatingPointError: If the loss is not finite.
  """
  # ------------------------------------------------------------------ checks
  for name, value in (
    ('TRAIN_STEPS', train_steps),
    ('EVAL_PERIOD', eval_period),
    ('CHECKPOINT_PERIOD', checkpoint_period),
    ('MICROBATCHES', microbatches),
    ('LOG_PERIOD', log_period),
  ):
    if value < 1:
      raise ValueError(f'{name} is {value}; it must be at least 1')
  if batch_size % microbatches:
    raise ValueError(
      f'BATCH_SIZE {batch_size} cannot be computed in MICROBATCHES'
      f' {microbatches} equal parts'
    )
  task = data.load_task(mixture_or_task_name, mixture_or_task_module)
  data.check_task(task, task_feature_lengths, 'train', use_cached)
  data.check_vocabulary(task, config.vocab_size)
  mesh = partitioning.make_mesh(model_parallel)
  data.check_batch_size(batch_size // microbatches, mesh)
  directory = epath.Path(model_dir)
  _check_writable(directory)

  plan = parameters.plan(config, method, mesh)
  logging.info('%s', parameters.summary(plan))
  if plan.frozen and initial_checkpoint_path is None:
    raise ValueError(
      f'method {method.name!r} freezes the base model, so'
      ' INITIAL_CHECKPOINT_PATH is needed; for example'
      ' --gin.INITIAL_CHECKPOINT_PATH="\'/models/t5_1_1_small\'"'
    )
  run: dict[str, Any] = {
    **parameters.identity(plan),
    'task': mixture_or_task_name,
    'task_feature_lengths': dict(task_feature_lengths),
    'batch_size': batch_size,
    'seed': seed,
  }
  present = checkpoints.read_run(directory)
  if present:
    checkpoints.compare(model_dir, present, run)

  # ------------------------------------------------- where an earlier start was
  source = None
  if initial_checkpoint_path is not None:
    source = open_checkpoint(initial_checkpoint_path)
  tx = optimizer(initial_step=(source and source.step) or 0)
  saved = Checkpoints(directory / 'checkpoints', keep_checkpoints)
  best = Checkpoints(directory / 'best', keep=1)
  like = state_lib.abstract_state(tx, plan)
  state = saved.restore(like)
  start = 0 if state is None else int(state.step)
  report = report_lib.Report(
    directory, start, train_steps, batch_size, jax.process_index() == 0
  )
  patience = functools.partial(_patience_is_over, report, best_metric)
  if state is not None:
    if start >= train_steps or patience(early_stopping):
      logging.info(
        'the run in %s is finished, at step %d; for more steps raise'
        ' TRAIN_STEPS',
        model_dir,
        start,
      )
      report.close()
      return state
    logging.info('going on from step %d of %s', start, model_dir)

  # -------------------------------------------------------------------- data
  batches = data.Batches(
    task,
    task_feature_lengths,
    batch_size,
    seed=seed,
    bucket_multiple=bucket_multiple,
    use_cached=use_cached,
    in_memory=in_memory,
  )

  # -------------------------------------------------------------- parameters
  needed = plan.base if state is None else plan.frozen
  if source is not None:
    base = restore(source, plan.select(needed), ignore=plan.params.__contains__)
    logging.info('restored %s', source.describe())
  else:
    base = parameters.initialize(plan, needed, seed)
    logging.info('the model starts from random weights')
  frozen = {path: base[path] for path in plan.frozen}
  run['base'] = checkpoints.fingerprint(frozen) if frozen else None
  checkpoints.claim(
    directory, run, {'initial_checkpoint_path': initial_checkpoint_path}
  )
  if state is None:
    trainable = {path: base[path] for path in plan.trainable & plan.base}
    trainable |= parameters.initialize_adapters(
      plan,
      prompt_init.Base(
        embedding=functools.partial(parameters.embedding_rows, base),
        vocabulary=lambda: data.vocabulary(task),
        labels=lambda: data.distinct_targets(
          task, task_feature_lengths, use_cached=use_cached
        ),
      ),
      seed,
    )
    state = state_lib.first_state(tx, parameters.unflatten(trainable), like)
  frozen = parameters.unflatten(frozen)
  del base

  # -------------------------------------------------------------- evaluation
  evaluation = None
  if eval_split in task.splits:
    evaluation = evaluate.Evaluation(
      task,
      plan,
      model(plan.network),
      split=eval_split,
      feature_lengths=task_feature_lengths,
      batch_size=eval_batch_size or batch_size,
      how=decoding,
      num_examples=eval_steps and eval_steps * (eval_batch_size or batch_size),
      bucket_multiple=bucket_multiple,
      use_cached=use_cached,
      seed=seed,
      directory=directory / 'eval',
    )
  else:
    logging.warning(
      'the task has no split %r, so nothing is evaluated and no best prompt'
      ' is chosen; its splits: %s',
      eval_split,
      sorted(task.splits),
    )
  if jax.process_index() == 0:
    report_lib.write_atomically(
      directory / 'model-info.txt', parameters.describe(plan)
    )
    report_lib.write_atomically(
      directory / 'config.gin', gin.operative_config_str()
    )

  # -------------------------------------------------------------------- loop
  update = state_lib.compile_step(
    model(plan.network), tx, plan, like, microbatches, seed
  )
  pending: collections.deque[Mapping[str, jax.Array]] = collections.deque()
  sums: dict[str, float] = {}
  step = start
  ahead = data.prefetch(batches, start, train_steps, mesh)
  with _stop_signals() as stopping, contextlib.closing(ahead):
    while True:
      stop, last = bool(stopping), step == train_steps
      log, keep, look = (
        step > 0 and (last or step % period == 0)
        for period in (log_period, checkpoint_period, eval_period)
      )
      keep = keep or (stop and step > 0)
      # Metrics are read when the device is two steps further, so that it never
      # waits for the host; all of them before anything is written.
      while len(pending) > (0 if log or keep or look else 2):
        done = step - len(pending) + 1
        _add_sums(sums, pending.popleft(), done, saved)
        report.progress(done)
      if sums and (log or keep):
        report.train(step, sums)
        sums = {}
      if keep:
        saved.save(state)
      if evaluation and look and not stop and not report.scores(step):
        try:
          with report.paused():
            scores = evaluation(
              (state.trainable, frozen), step, lambda: bool(stopping)
            )
        except evaluate.Stopped:
          continue  # To the top, which saves.
        if _is_best(report, best_metric, scores):
          best.save(state.replace(opt_state={}))
          best.wait()
          _write_prompt(directory, 'best', plan, state, scores, run)
        # Recorded last: what is recorded is not done again after a hard stop.
        for name, values in scores.items():
          report.evaluate(step, eval_split, name, values)
        last = last or patience(early_stopping)
        if last:
          keep = True
          saved.save(state)
      if keep:
        scores = report.scores(step)
        _write_prompt(directory, f'step_{step}', plan, state, scores, run)
      if last or stop:
        break
      _, batch = next(ahead)
      with plan.scope():
        if step == start:  # Compiles; later only new lengths do.
          with report.paused():
            state, metrics = update(state, frozen, batch)
        else:
          state, metrics = update(state, frozen, batch)
      pending.append(metrics)
      step += 1
    saved.close()
    best.close()
  report.close()
  if last:
    logging.info('finished at step %d: %s', step, model_dir)
  else:
    logging.info(
      'stopped by %s at step %d, which is saved in %s; the same command goes'
      ' on from there',
      stopping[0],
      step,
      model_dir,
    )
  return state


def _check_writable(directory: epath.Path) -> None:
  """Finds out before any work whether results can be written."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f'.writable-{os.getpid()}'
    probe.write_text('ptune')
    probe.unlink()
  except OSError as error:
    raise ValueError(
      f'MODEL_DIR {directory} cannot be written: {error}. Choose another, or'
      ' free space'
    ) from error


def _add_sums(
  sums: dict[str, float],
  metrics: Mapping[str, jax.Array],
  step: int,
  saved: Checkpoints,
) -> None:
  """Adds one step's metrics; a loss that is not finite ends the run."""
  values = {k: float(v) for k, v in jax.device_get(dict(metrics)).items()}
  if not np.isfinite(values['loss']):
    saved.wait()
    raise FloatingPointError(
      f'the loss is {values["loss"]} at step {step}. Nothing after the last'
      f' checkpoint (step {saved.newest}) was kept; started again, the run'
      ' goes on from there. Lower the learning rate, or look at the batch of'
      ' that step'
    )
  for key, value in values.items():
    sums[key] = sums.get(key, 0.0) + value
  sums['gradient_norm'] = values['gradient_norm']  # The newest, not a sum.


def score(
  best_metric: str | None, scores: Mapping[str, Mapping[str, float]]
) -> float:
  """What is maximised: one number from the metrics of all tasks."""
  if best_metric is not None:
    name, sign = best_metric.removeprefix('-'), 1.0
    if name != best_metric:
      sign = -1.0
    found = [s[name] for s in scores.values() if name in s]
    if not found:
      known = sorted({k for s in scores.values() for k in s})
      raise ValueError(
        f'BEST_METRIC {best_metric!r} is not among the metrics {known}'
      )
    return sign * float(np.mean(found))
  own = [
    value
    for values in scores.values()
    for name, value in values.items()
    if name not in ('loss', 'token_accuracy')
  ]
  if own:
    return float(np.mean(own))
  return -float(np.mean([s['loss'] for s in scores.values()]))


def _is_best(
  report: report_lib.Report,
  best_metric: str | None,
  scores: Mapping[str, Mapping[str, float]],
) -> bool:
  """Whether scores are better than all recorded ones."""
  before = [
    score(best_metric, report.scores(step)) for step in report.evaluated_steps
  ]
  return score(best_metric, scores) > max(before, default=-np.inf)


def _patience_is_over(
  report: report_lib.Report, best_metric: str | None, evaluations: int | None
) -> bool:
  """Whether so many evaluations have brought no better score."""
  steps = report.evaluated_steps
  if evaluations is None or not steps:
    return False
  values = [score(best_metric, report.scores(step)) for step in steps]
  return len(values) - 1 - int(np.argmax(values)) >= evaluations


def _write_prompt(
  directory: epath.Path,
  name: str,
  plan: parameters.Plan,
  state: state_lib.TrainState,
  scores: Mapping[str, Mapping[str, float]],
  run: Mapping[str, Any],
) -> None:
  """Writes the prompt for other programs, with what it was trained on."""
  path = plan.method.prompt
  if path is None or jax.process_index() != 0:
    return
  step = int(state.step)
  prompt = np.asarray(parameters.flatten(state.trainable)[path], np.float32)
  buffer = io.BytesIO()
  np.save(buffer, prompt)
  facts = {
    'step': step,
    'prompt_length': prompt.shape[0],
    'scores': scores,
    **{k: run[k] for k in ('task', 'base', 'method', 'seed', 'batch_size')},
  }
  folder = directory / 'prompts'
  folder.mkdir(parents=True, exist_ok=True)
  report_lib.write_atomically(folder / f'{name}.npy', buffer.getvalue())
  report_lib.write_atomically(
    folder / f'{name}.json', json.dumps(facts, indent=2) + '\n'
  )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
  """Collects SIGTERM and Ctrl-C, to be acted on between two steps.

  A second Ctrl-C interrupts at once.
  """
  received: list[str] = []
  if threading.current_thread() is not threading.main_thread():
    yield received
    return

  def note(number, frame):
    del frame
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append(signal.Signals(number).name)

  before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


if __name__ == '__main__':
  # The same as `ptune train`; gin imports this module under its own name.
  from ptune import cli

  sys.exit(cli.main(['train', *sys.argv[1:]]))
