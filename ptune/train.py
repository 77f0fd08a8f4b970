"""`ptune train`: trains a prompt, or another method's parameters, on a task.

The program reads from top to bottom: checks, the parameters and where they come
from, the compiled step, the loop. If you stop a run at any moment and start it
again by the same command, it resumes from its last checkpoint and ends with the
same bits as an undisturbed run. This holds because the train state is all that
changes: the batch and the dropout of a step are functions of the step.
"""

import contextlib
import sys
from collections.abc import Callable

import optax
from absl import logging

import gin
from ptune.convert import check_config, open_checkpoint, with_rows
from ptune.convert.fingerprint import of_params
from ptune.data import device_feed, packing
from ptune.model import frozen_weights, model_info, parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving.evaluation import evaluation_of
from ptune.training import loop, optim, privacy, settings, start
from ptune.training import state as state_lib
from ptune.training.member import Member
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
  seed: int = 0,
  model_parallel: int = 1,
) -> state_lib.TrainState:
  """Trains, evaluates and saves; resumes an earlier start of the same run.

  Args:
    model_dir: The directory that the run writes to.
    train_steps: The last step of this run.
    data: The task, its batches, and how private its rows stay.
    config: The network's sizes.
    method: The method, which adds trained parameters to the network.
    initial_checkpoint_path: The base model. None starts from random weights,
      which only a method that trains the whole model allows.
    model: Makes the loss of a network.
    optimizer: Called with `initial_step=`, the step of the base model.
    evaluation: When to evaluate, on what, and which prompt is the best.
    saving: What to write during training.
    seed: For the initialisation, the data order and dropout.
    model_parallel: The number of devices that share one copy of the weights.

  Returns:
    The final state.

  Raises:
    ValueError: If the settings do not fit together; raised before any step.
    FloatingPointError: If the loss is not finite.
  """
  # ------------------------------------------------------------------ checks
  settings.check(data, evaluation, saving, TRAIN_STEPS=train_steps)
  run = Run(model_dir, initial_checkpoint_path)
  task = start.open_task(data.task, data, config, initial_checkpoint_path)
  scored = start.check_evaluation(task, evaluation)
  mesh = partitioning.make_mesh(model_parallel)
  start.check_batch_sizes(data, evaluation, mesh)
  plan = parameters.plan(config, method, mesh)
  logging.info('%s', model_info.summary(plan))
  start.check_base(plan, initial_checkpoint_path)
  evaluated = model(plan.network)
  trained = packing.model_of(model, plan) if data.pack else evaluated
  if data.privacy is not None:
    privacy.check(method, evaluated, data.pack)
  facts = start.facts_of(plan, task, data, evaluated, scored, seed, optimizer)
  with run:
    run.compare({'': facts})
    privacy.check_same(run.present[''], facts)

    # ---------------------------------------------------- an earlier start
    source = None
    if initial_checkpoint_path is not None:
      source = open_checkpoint(initial_checkpoint_path)
      check_config(source, config)
      plan = with_rows(plan, source)
    facts['initial_step'] = (source and source.step) or 0
    tx = optimizer(initial_step=facts['initial_step'])
    abstract = state_lib.abstract_state(tx, plan)
    state = run.restore(abstract)
    if start.is_finished(run, plan, state, train_steps, scored):
      return state

    # ------------------------------------------------------------------ data
    private = data.privacy and privacy.of_run(data.privacy, run.directory)
    drawn = privacy.drawn(private, mesh.shape['data'] * data.microbatches)
    place = run.directory / 'stream'
    rows = start.rows_of(task, data, config, method, seed, place, **drawn)
    if data.privacy is not None:
      facts['examples'] = rows.num_examples
      train_steps = privacy.last_step(
        data.privacy, train_steps, data.batch_size, rows.num_examples
      )
    evaluate = None
    if scored is not None:
      evaluate = evaluation_of(
        task, plan, evaluated, data, evaluation, seed, run.directory / 'eval'
      )

    # ------------------------------------------------------------ parameters
    needed = plan.base if state is None else plan.frozen
    base = start.initial_base(plan, source, needed, state is None, seed)
    frozen = {path: base[path] for path in plan.frozen}
    facts['base'] = of_params(frozen) if frozen else None
    run.compare({'': facts})
    if state is None:
      trainable = {path: base[path] for path in plan.trainable & plan.base}
      trainable |= start.first_adapters(plan, base, task, data, seed)
      state = state_lib.first_state(
        tx, parameters.unflatten(trainable), abstract
      )
    del base
    frozen = parameters.unflatten(frozen_weights.freeze(plan, frozen))

    # ------------------------------------------------------------------ loop
    update = state_lib.compile_step(
      trained, tx, plan, abstract, data.microbatches, seed, private
    )
    member = Member('', plan, facts, lambda state: state.trainable)
    check = None if data.pack else method.check  # `packing` has checked them.
    # For packed rows this reads the first rows, so it comes before the others.
    examples_per_step = rows.examples_per_step
    with contextlib.closing(
      device_feed.prefetch(rows, run.start, train_steps, mesh, check=check)
    ) as ahead:
      following = device_feed.with_first(ahead)
      run.begin([member], train_steps, examples_per_step, saving)
      run.describe(model_info.table(plan), gin.operative_config_str())
      steps = loop.Loop(run, update, frozen, {'': evaluate}, evaluation)
      return steps(state, following)


if __name__ == '__main__':
  # The same as `ptune train`; gin imports this module under its own name.
  from ptune import cli

  sys.argv.insert(1, 'train')
  sys.exit(cli.main())
