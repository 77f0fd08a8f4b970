"""The start of a run: its task, its rows and its first parameters.

`train` and `train_many` call these functions in this order. Each one that
checks something raises a UserError before the run writes to MODEL_DIR.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

import gin
from ptune.convert import restore, restore_table
from ptune.convert.prompts import read_rows
from ptune.convert.source import Source
from ptune.data import batches, device_feed, packing, poisson, seqio_task
from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.model import parameters
from ptune.model.adapters import Method
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.tasks.metrics import UNLABELLED
from ptune.tasks.texts import TextTask
from ptune.training import report, selection, settings
from ptune.training.member import Member
from ptune.training.run import Run
from ptune.training.state import TrainState


def open_task(
  name: str,
  data: settings.Data,
  config: Config,
  initial_checkpoint_path: str | None,
) -> seqio_task.Provider:
  """Finds a task by its name and checks that the model can train on it.

  Raises:
    UserError: If the task does not exist, has no training split, or has
      another vocabulary than the model.
  """
  task = seqio_task.load(name, data.module)
  seqio_task.check(task, data.feature_lengths, 'train', data.use_cached)
  seqio_task.check_vocabulary(
    task, config.vocab_size, config.ids, initial_checkpoint_path
  )
  return task


def check_evaluation(
  task: seqio_task.Provider, evaluation: settings.Evaluation
) -> settings.Evaluation | None:
  """Checks EVAL_SPLIT.

  Returns:
    The evaluation. If the task lacks the default split, training only warns,
    and continues without evaluations: None.

  Raises:
    UserError: If the task lacks another split than the default one, if no row
      of the split has a label, or if EARLY_STOPPING or BEST_METRIC is set and
      nothing is evaluated.
  """
  split = evaluation.split
  if split is not None and split in task.splits:
    labelled = not isinstance(task, TextTask) or not task.labels
    if not labelled and {*task.texts(split)['targets']} == {UNLABELLED}:
      raise UserError(
        f'none of the {split} rows has a label, so they cannot choose the best'
        ' prompt. Give rows with labels, or none'
      )
    return evaluation
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
  return None


def check_batch_sizes(
  data: settings.Data, evaluation: settings.Evaluation, mesh: jax.sharding.Mesh
) -> None:
  """Raises UserError if the devices cannot split the rows of a batch evenly."""
  device_feed.check_batch_size(data.batch_size, mesh, data.microbatches)
  device_feed.check_batch_size(evaluation.batch_size or data.batch_size, mesh)


def check_base(
  plan: parameters.Plan, initial_checkpoint_path: str | None
) -> None:
  """Raises UserError if the method needs a base model and none is given."""
  if plan.frozen and initial_checkpoint_path is None:
    raise UserError(
      f'method {plan.method.name!r} freezes the base model, so'
      ' INITIAL_CHECKPOINT_PATH is needed; for example'
      ' --gin.INITIAL_CHECKPOINT_PATH="\'/models/t5_1_1_small\'"'
    )


def facts_of(
  plan: parameters.Plan,
  task: seqio_task.Provider,
  data: settings.Data,
  model: EncoderDecoderModel,
  evaluation: settings.Evaluation | None,
  seed: int,
  optimizer: Any,
) -> dict[str, Any]:
  """The facts of a run: the settings that a restart may not change.

  Args:
    plan: The parameters.
    task: The task. If it is a user's rows, their texts are facts. SeqIO's tasks
      have only their name.
    data: Its lengths and batches.
    model: Makes the loss.
    evaluation: How the best prompt is chosen; None if nothing is evaluated.
    seed: For the order of the rows and random values.
    optimizer: Makes the optimizer.
  """
  objective = model.objective or type(model).cross_entropy
  found = {
    **parameters.identity(plan),
    'task': task.name,
    'task_feature_lengths': dict(data.feature_lengths),
    'batch_size': data.batch_size,
    'pack': int(data.pack),
    'bucket_multiple': None if data.pack else data.bucket_multiple,
    'seed': seed,
    'optimizer': _name(optimizer),
    'loss': _name(objective),
    **({'privacy': data.privacy.facts()} if data.privacy else {}),
  }
  if isinstance(task, TextTask):
    inputs, targets, _ = task.training('train')
    found['rows'] = _digest(inputs, targets)
  if evaluation is not None:
    found |= _facts_of_choice(task, evaluation, data.batch_size)
  return found


def _facts_of_choice(
  task: seqio_task.Provider, evaluation: settings.Evaluation, batch_size: int
) -> dict[str, Any]:
  """The facts without which the scores of two starts cannot be compared."""
  rows = evaluation.steps and (evaluation.batch_size or batch_size)
  found = {
    'best_metric': evaluation.best_metric,
    'eval_split': evaluation.split,
    'eval_examples': rows and rows * (evaluation.steps or 0),
    'decoding': _not_default(evaluation.decoding),
  }
  if isinstance(task, TextTask):
    texts = task.texts(evaluation.split or '')
    found['rank'] = task.rank
    found['eval_rows'] = _digest(texts['inputs'], texts['targets'])
    if evaluation.best_metric is None:  # The mean of these is the score.
      found['metrics'] = sorted(task.metrics)
  return found


def _not_default(of: Any) -> dict[str, Any]:
  """The fields of a dataclass that do not have their default."""
  fields = {field.name: field.default for field in dataclasses.fields(of)}
  given = dataclasses.asdict(of)
  return {name: x for name, x in given.items() if x != fields[name]}


def _name(function: Any) -> str:
  """'wayward', also for a function that `wayward` returned."""
  return (
    getattr(function, '__qualname__', type(function).__name__)
    .split('.<locals>')[0]
    .rpartition('.')[2]
  )


def _digest(inputs: Sequence[str], targets: Sequence[str]) -> str:
  """16 hexadecimal digits that are the same for the same texts."""
  digest = hashlib.sha256()
  for row in zip(inputs, targets, strict=True):  # No copy of all texts.
    digest.update(json.dumps(row).encode())
  return digest.hexdigest()[:16]


def is_finished(
  run: Run,
  plan: parameters.Plan,
  state: TrainState | None,
  train_steps: int,
  evaluation: settings.Evaluation | None,
) -> bool:
  """Whether an earlier start has finished the run.

  If so, writes the final prompt again, because that start may have been killed
  before it did.

  Args:
    run: The run, restored.
    plan: The parameters.
    state: The restored state; None if there was none.
    train_steps: TRAIN_STEPS.
    evaluation: How the run is evaluated; None if it is not.
  """
  if state is None:
    return False
  run.say_what_changed(gin.operative_config_str())
  records, early, scored = run.records(), False, True
  if evaluation is not None:
    scored = bool(report.scores_at(records, run.start))
    early = selection.patience_is_over(
      records, evaluation.best_metric, evaluation.early_stopping
    )
  ended = scored and (early or run.start == train_steps)
  if run.start <= train_steps and not ended:
    logging.info('resuming from step %d of %s', run.start, run.directory)
    return False
  # run.json has the facts, so we need not read the base.
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


def rows_of(
  task: seqio_task.Provider,
  data: settings.Data,
  config: Config,
  method: Method | None,
  seed: int,
  positions: epath.Path,
  **drawn: int,
) -> batches.Batches:
  """Reads the task; the result gives the batch of a step.

  Args:
    task: The task.
    data: Its lengths and batches.
    config: The network's sizes and special tokens.
    method: The method, which packed rows need; None if rows are not packed.
    seed: For the order of the rows.
    positions: The directory where the positions of a stream are kept.
    **drawn: Settings of `PoissonBatches`. Without any, rows are shuffled.
  """
  if isinstance(task, TextTask):
    for split in task.splits:  # A bad file stops the run now, not at its end.
      task.texts(split)
  kind = poisson.PoissonBatches if drawn else batches.Batches
  read = functools.partial(
    packing.PackedBatches if data.pack else kind,
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
  return read(bucket_multiple=data.bucket_multiple, **drawn)


def initial_base(
  plan: parameters.Plan,
  source: Source | None,
  needed: frozenset[str],
  first: bool,
  seed: int,
) -> dict[str, jax.Array]:
  """Restores parameters of the base model, or initialises them.

  Args:
    plan: The parameters.
    source: The base model's checkpoint; None for random weights.
    needed: The paths of the parameters to restore.
    first: Whether this is the first start, so that the logged table lists the
      method's parameters as initialised.
    seed: For random weights.

  Returns:
    The parameters on the devices, by path.
  """
  if source is None or not needed:
    if needed:
      logging.info('the model starts from random weights')
    return parameters.initialize(plan, needed, seed)
  base = restore(source, plan.select(needed), ignore=plan.params.__contains__)
  fresh = plan.select(plan.adapters) if first else {}
  logging.info('%s', restore_table(source, base, fresh))
  return base


def first_adapters(
  plan: parameters.Plan,
  base: Mapping[str, jax.Array],
  task: seqio_task.Provider,
  data: settings.Data,
  seed: int,
) -> parameters.Flat:
  """Initialises the parameters that the method adds.

  Args:
    plan: The parameters.
    base: The base model's parameters, which initialisers may read.
    task: The task, whose vocabulary and labels initialisers may read.
    data: The task's lengths.
    seed: For random values.
  """
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
