"""`ptune train`: tunes a prompt, or whatever a method trains, on a task.

Read from top to bottom: checks, the parameters and where they come from, the
compiled step, the loop. Stopped at any moment and started again by the same
command, a run goes on from its last checkpoint and ends with the bits of an
undisturbed one: all that changes is in the train state, the batch of a step is
a function of the step, and so is its dropout.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from absl import logging
from etils import epath

import gin
from ptune.convert import (
  check_config,
  open_checkpoint,
  restore,
  restore_table,
  with_rows,
)
from ptune.convert.fingerprint import of_params
from ptune.convert.prompts import read_rows
from ptune.convert.source import Source
from ptune.data import batches, device_feed, packing, seqio_task
from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.model import parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving.evaluation import evaluation_of
from ptune.training import (
  loop,
  optim,
  report,
  selection,
  settings,
)
from ptune.training import privacy as privacy_lib
from ptune.training import state as state_lib
from ptune.training.loop import Member
from ptune.training.run import Run

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
  privacy: privacy_lib.Privacy | None = None,
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
    privacy: How private the training rows are to stay; None if they need not.
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
  run = Run(model_dir, initial_checkpoint_path)
  task = open_task(data.task, data, config, initial_checkpoint_path)
  evaluates = check_evaluation(task, evaluation)
  mesh = partitioning.make_mesh(model_parallel)
  check_batch_sizes(data, evaluation, mesh)
  plan = parameters.plan(config, method, mesh)
  logging.info('%s', parameters.summary(plan))
  check_base(plan, initial_checkpoint_path)
  evaluated = model(plan.network)
  trained = packing.model_of(model, plan) if data.pack else evaluated
  facts = facts_of(plan, task.name, data, seed, optimizer)
  if privacy is not None:
    privacy_lib.check(method, evaluated, data.pack)
    facts['privacy'] = privacy.facts()
  with run:
    run.compare({'': facts})
    privacy_lib.check_same(run.present[''], facts)

    # ------------------------------------------ where an earlier start was
    source = None
    if initial_checkpoint_path is not None:
      source = open_checkpoint(initial_checkpoint_path)
      check_config(source, config)
      plan = with_rows(plan, source)
    facts['initial_step'] = (source and source.step) or 0
    tx = optimizer(initial_step=facts['initial_step'])
    like = state_lib.abstract_state(tx, plan)
    state = run.restore(like)
    scored = evaluation if evaluates else None
    if _is_finished(run, plan, state, train_steps, scored):
      return state

    # ------------------------------------------------------------------ data
    rows = rows_of(task, data, config, method, seed, run.directory / 'stream')
    if privacy is not None:
      facts['examples'] = rows.num_examples
      train_steps = privacy_lib.last_step(
        privacy, train_steps, data.batch_size, rows.num_examples
      )
    evaluate = None
    if evaluates:
      evaluate = evaluation_of(
        task, plan, evaluated, data, evaluation, seed, run.directory / 'eval'
      )

    # ------------------------------------------------------------ parameters
    needed = plan.base if state is None else plan.frozen
    base = initial_base(plan, source, needed, state is None, seed)
    frozen = {path: base[path] for path in plan.frozen}
    facts['base'] = of_params(frozen) if frozen else None
    run.compare({'': facts})
    if state is None:
      trainable = {path: base[path] for path in plan.trainable & plan.base}
      trainable |= first_adapters(plan, base, task, data, seed)
      state = state_lib.first_state(tx, parameters.unflatten(trainable), like)
    del base
    frozen = parameters.unflatten(parameters.freeze(plan, frozen))

    # ------------------------------------------------------------------ loop
    private = privacy and privacy_lib.of_run(privacy, run.directory)
    update = state_lib.compile_step(
      trained, tx, plan, like, data.microbatches, seed, private
    )
    member = Member('', plan, facts, lambda state: state.trainable)
    # Packing looks at each example by itself.
    check = None if data.pack else method.check
    # Known once the first packed rows are there: before others are read.
    examples_per_step = rows.examples_per_step
    with contextlib.closing(
      device_feed.prefetch(rows, run.start, train_steps, mesh, check=check)
    ) as ahead:
      following = device_feed.with_first(ahead)
      run.begin([member], train_steps, examples_per_step, saving)
      run.describe(parameters.describe(plan), gin.operative_config_str())
      steps = loop.Loop(run, update, frozen, {'': evaluate}, evaluation)
      return steps(state, following)


def open_task(
  name: str,
  data: settings.Data,
  config: Config,
  initial_checkpoint_path: str | None,
) -> seqio_task.Provider:
  """A task that can be trained on, by its name."""
  task = seqio_task.load(name, data.module)
  seqio_task.check(task, data.feature_lengths, 'train', data.use_cached)
  seqio_task.check_vocabulary(
    task, config.vocab_size, config.ids, initial_checkpoint_path
  )
  return task


def check_batch_sizes(
  data: settings.Data, evaluation: settings.Evaluation, mesh: jax.sharding.Mesh
) -> None:
  """Raises UserError if the devices cannot share the rows of a batch."""
  device_feed.check_batch_size(data.batch_size, mesh, data.microbatches)
  device_feed.check_batch_size(evaluation.batch_size or data.batch_size, mesh)


def check_base(
  plan: parameters.Plan, initial_checkpoint_path: str | None
) -> None:
  """Raises UserError if there is no base, and one is frozen."""
  if plan.frozen and initial_checkpoint_path is None:
    raise UserError(
      f'method {plan.method.name!r} freezes the base model, so'
      ' INITIAL_CHECKPOINT_PATH is needed; for example'
      ' --gin.INITIAL_CHECKPOINT_PATH="\'/models/t5_1_1_small\'"'
    )


def facts_of(
  plan: parameters.Plan,
  task: str,
  data: settings.Data,
  seed: int,
  optimizer: Any,
) -> dict[str, Any]:
  """What a run is: the settings that may not change while it goes on."""
  return {
    **parameters.identity(plan),
    'task': task,
    'task_feature_lengths': dict(data.feature_lengths),
    'batch_size': data.batch_size,
    'pack': int(data.pack),
    'bucket_multiple': None if data.pack else data.bucket_multiple,
    'seed': seed,
    'optimizer': getattr(optimizer, '__name__', type(optimizer).__name__),
  }


def rows_of(
  task: seqio_task.Provider,
  data: settings.Data,
  config: Config,
  method: Method | None,
  seed: int,
  positions: epath.Path,
) -> batches.Batches:
  """The batches of a run, as a function of the step."""
  read = functools.partial(
    packing.PackedBatches if data.pack else batches.Batches,
    task,
    data.feature_lengths,
    data.batch_size,
    seed=seed,
    use_cached=data.use_cached,
    in_memory=data.in_memory,
    ids=config.ids,
    embedding_rows=config.vocab_size,
    positions=positions,
  )
  if data.pack:
    assert method is not None
    return read(method=method, pack=data.pack)
  return read(bucket_multiple=data.bucket_multiple)


def initial_base(
  plan: parameters.Plan,
  source: Source | None,
  needed: frozenset[str],
  first: bool,
  seed: int,
) -> dict[str, jax.Array]:
  """The parameters of the base that are needed, on the devices.

  Args:
    plan: The parameters.
    source: The checkpoint of the base; None for random weights.
    needed: The paths of what is needed.
    first: Whether what the method adds is new as well, for the account.
    seed: Of random weights.
  """
  if source is None or not needed:
    if needed:
      logging.info('the model starts from random weights')
    return parameters.initialize(plan, needed, seed)
  base = restore(source, plan.select(needed), ignore=plan.params.__contains__)
  fresh = plan.select(plan.adapters) if first else {}
  logging.info('%s', restore_table(source, base, fresh))
  return base


def _is_finished(
  run: Run,
  plan: parameters.Plan,
  state: state_lib.TrainState | None,
  train_steps: int,
  evaluation: settings.Evaluation | None,
) -> bool:
  """Whether an earlier start has come to the end; then leaves its prompt."""
  if state is None:
    return False
  records, early, scored = run.records(), False, True
  if evaluation is not None:
    scored = bool(report.scores_at(records, run.start))
    early = selection.patience_is_over(
      records, evaluation.best_metric, evaluation.early_stopping
    )
  ended = scored and (early or run.start == train_steps)
  if run.start <= train_steps and not ended:
    logging.info('going on from step %d of %s', run.start, run.directory)
    return False
  # What it was trained on is on disk: the base is not read.
  member = Member('', plan, run.present[''], lambda state: state.trainable)
  run.discard(member)
  scores = report.scores_at(records, run.start)
  run.write_prompt(member, f'step_{run.start}', state, scores)
  logging.info(
    'the run in %s is finished, at step %d; for more steps raise %s',
    run.directory,
    run.start,
    'EARLY_STOPPING' if early else 'TRAIN_STEPS',
  )
  return True


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
      sites=functools.cache(functools.partial(parameters.sites, plan, base)),
      read=read_rows,
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


if __name__ == '__main__':
  # The same as `ptune train`; gin imports this module under its own name.
  from ptune import cli

  sys.argv.insert(1, 'train')
  sys.exit(cli.main())
