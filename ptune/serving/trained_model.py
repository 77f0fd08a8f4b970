"""A trained model: its paths checked, its parameters restored."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from ptune.convert import check_config, open_checkpoint, restore, restore_table
from ptune.convert.fingerprint import of_params
from ptune.convert.hub import locate
from ptune.convert.prompts import find, read_prompt, read_rows
from ptune.convert.trained import SUFFIX, facts_beside, open_trained
from ptune.errors import UserError
from ptune.host.files import absolute, check_writable
from ptune.methods import prompt_array
from ptune.model import frozen_weights, model_info, parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.sizes import Config
from ptune.serving.bank import OTHER_METHODS, PromptBank, parse
from ptune.training import checkpoints, run_file
from ptune.training.settings import PathLike, Trained

# The base model without any method.
NOTHING = Method('base', (), ())


def output_directory(
  name: str, output_dir: PathLike | None, model_dir: PathLike | None, below: str
) -> epath.Path:
  """Makes the directory that a program writes to.

  Args:
    name: The setting's name, for errors.
    output_dir: The directory; None for a directory in `model_dir`.
    model_dir: MODEL_DIR.
    below: The name of the directory in MODEL_DIR.

  Raises:
    ValueError: If neither is given, or we cannot write to the directory.
  """
  if output_dir is None and model_dir is None:
    raise UserError(
      f'{name} is needed without a MODEL_DIR; for example'
      f' --gin.{name}="\'/runs/out\'"'
    )
  if output_dir is None:
    _check_run(model_dir)
    output_dir = run_file.run_directory(model_dir) / below
  directory = absolute(output_dir)
  check_writable(name, directory)
  return directory


def check(plan: parameters.Plan, trained: Trained) -> None:
  """Checks that the given paths name one model; see `load`.

  Raises:
    ValueError: If they do not, or if the run was trained with other settings
      than those of `plan`.
  """
  model_dir, prompt_file = trained.model_dir, trained.prompt_file
  given = f'MODEL_DIR={model_dir!r}, PROMPT_FILE={prompt_file!r}'
  if model_dir is not None:
    if prompt_file is not None:
      raise UserError(f'set MODEL_DIR or PROMPT_FILE, not both; got {given}')
    run = _check_run(model_dir)
    run_file.compare(model_dir, run, parameters.identity(plan))
    return
  if prompt_file is not None and not plan.frozen:
    raise UserError(
      f'method {plan.method.name!r} trains all of the model: it'
      ' has no prompt to be read from PROMPT_FILE; give MODEL_DIR'
    )
  if prompt_file is not None:
    _refuse_folded(plan.method, prompt_file)
  if prompt_file is None and plan.adapters:
    raise UserError(
      'set MODEL_DIR (a run of ptune train) or PROMPT_FILE (a prompt for the'
      f' base model in CHECKPOINT_PATH); got {given}'
    )
  if trained.checkpoint_path is None:
    raise UserError(
      'CHECKPOINT_PATH, the base model, is needed without a MODEL_DIR; for'
      ' example --gin.CHECKPOINT_PATH="\'/models/t5_1_1_small\'"'
    )


def base_of(trained: Trained) -> PathLike | None:
  """Returns the base model: CHECKPOINT_PATH, or the one that a run recorded."""
  if trained.checkpoint_path is not None or trained.model_dir is None:
    return trained.checkpoint_path
  run = run_file.read(run_file.run_directory(trained.model_dir))
  return run.get('initial_checkpoint_path')


def _refuse_folded(method: Method, prompt_file: PathLike) -> None:
  """Raises a UserError if what `method` writes is read by a simpler method."""
  if method.fold is None:
    return
  if method.prompt is None:
    fix = 'set METHOD to the simpler method'
  else:
    fix = (
      'a .npy file is a plain prompt, so set METHOD to prompt with'
      ' --gin_file=methods/prompt.gin'
    )
  raise UserError(
    f'METHOD {method.name!r} cannot read PROMPT_FILE={prompt_file!r}: it saves'
    f' its parameters in the form of a simpler method; {fix}, or give a'
    f' MODEL_DIR with checkpoints of {method.name!r}'
  )


def _check_run(model_dir: PathLike | None) -> dict[str, Any]:
  directory = run_file.run_directory(model_dir)
  run = run_file.read(directory)
  if not run:
    raise UserError(
      f'MODEL_DIR {directory} has no run of ptune train ({run_file.FILE} does'
      ' not exist)'
    )
  return run


def load(
  plan: parameters.Plan,
  trained: Trained,
  base: Mapping[str, jax.Array] | None = None,
) -> tuple[dict[str, Any], int]:
  """Restores a trained model: the base and the trained parameters.

  Args:
    plan: The parameters.
    trained: A run, or the base model with a file from a run's prompts/. From a
      run we take the best step, or the newest one if none was evaluated. A
      method without adapters needs the base model only.
    base: The result of `load_base`, if the base is on the devices already.

  Returns:
    The parameters, and the step at which they were saved.

  Raises:
    ValueError: If these do not fit together.
  """
  model_dir, prompt_file = trained.model_dir, trained.prompt_file
  checkpoint_path = trained.checkpoint_path
  run: dict[str, Any] = {}
  values: dict[str, jax.Array] = {}
  step = None
  if prompt_file is not None:
    values, facts = read_prompt_file(plan, prompt_file)
    step = facts.get('step')
  elif model_dir is not None:
    directory = run_file.run_directory(model_dir)
    run = facts = run_file.read(directory)
    checkpoint_path = checkpoint_path or run['initial_checkpoint_path']
    if (directory / 'best').exists() or (directory / 'checkpoints').exists():
      source = open_checkpoint(_best_or_newest(directory))
      step = source.step
      values |= restore(source, plan.select(plan.trainable))
    else:  # A run of `train_many`, where one checkpoint holds all runs.
      values, facts = read_prompt_file(plan, find(directory))
      step = facts.get('step')
  rest = plan.select(frozenset(plan.params) - frozenset(values))
  if rest and base is not None:
    values |= {path: base[path] for path in rest}
  elif rest:
    restored, base_step = _restore_base(plan, checkpoint_path, rest)
    step = base_step if step is None else step
    values |= restored
  if (model_dir or prompt_file) and plan.frozen:
    frozen = {path: values[path] for path in plan.frozen}
    fingerprint = of_params(frozen)
    run_file.compare(model_dir or '', run, {'base': fingerprint})
    if facts.get('base', fingerprint) != fingerprint:
      logging.warning(
        'prompt file %s was trained on another base model (fingerprint %s)'
        ' than the one in CHECKPOINT_PATH %s (%s)',
        prompt_file,
        facts['base'],
        checkpoint_path,
        fingerprint,
      )
  logging.info('%s', model_info.summary(plan))
  frozen = {path: values.pop(path) for path in plan.frozen}
  return parameters.unflatten(
    values | frozen_weights.freeze(plan, frozen)
  ), step or 0


def read_prompt_file(
  plan: parameters.Plan, prompt_file: PathLike
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
  """Reads a file that `ptune train` wrote to `prompts/`, and its .json.

  Args:
    plan: The parameters. Its method must read this kind of file; see `check`.
    prompt_file: The file, or anything that `convert.prompts.find` accepts.

  Returns:
    The trained parameters by path, and the facts in the .json; {} if there is
    no .json.

  Raises:
    ValueError: If the file does not fit the method or its shapes.
  """
  _refuse_folded(plan.method, prompt_file)
  path = plan.method.prompt
  place = locate(prompt_file)
  # For a run, an adapter or a checkpoint, read the prompt in it.
  place = find(place) if place.is_dir() else place
  if path is None:
    source, facts = open_trained(place)
    ours = dict(plan.method.settings)
    theirs = facts.get('settings', ours)
    if theirs != ours:
      raise UserError(
        f'prompt file {os.fspath(prompt_file)} was trained with the settings'
        f' {theirs}, and METHOD {plan.method.name!r} has {ours}; set the'
        ' settings of the file'
      )
    return restore(source, plan.select(plan.trainable)), facts
  struct = plan.params[path]
  prompt = prompt_array.fit(
    read_rows(place), struct.shape, f'prompt file {prompt_file}'
  )
  if place.is_dir() or place.suffix == SUFFIX:
    facts = read_prompt(place).facts
  else:
    facts = facts_beside(place)
  theirs = facts.get('method') or ''
  if theirs.startswith(OTHER_METHODS) and theirs != plan.method.name:
    raise UserError(
      f'prompt file {os.fspath(prompt_file)} was trained with method'
      f' {theirs!r}, and METHOD is {plan.method.name!r}, which would insert it'
      ' at another place; set METHOD to the method of the file'
    )
  return {path: parameters.place(prompt, struct)}, facts


def named_prompts(trained: Trained, method: Method) -> dict[str, str]:
  """Parses PROMPTS into files or runs by name, for `load_bank`.

  Raises:
    ValueError: If PROMPTS names none, or contradicts other settings.
  """
  prompts = trained.prompts
  assert prompts is not None
  if trained.model_dir is not None or trained.prompt_file is not None:
    raise UserError(
      'set PROMPTS, or MODEL_DIR, or PROMPT_FILE; got'
      f' PROMPTS={prompts!r}, MODEL_DIR={trained.model_dir!r},'
      f' PROMPT_FILE={trained.prompt_file!r}'
    )
  if method.name != 'prompt':
    raise UserError(
      f'METHOD is {method.name!r}; with PROMPTS, use methods/prompt.gin'
    )
  named = parse(prompts) if isinstance(prompts, str) else dict(prompts)
  for path in named.values():
    try:
      find(path)
    except FileNotFoundError as error:
      raise UserError(
        f'PROMPTS names {path}, which does not exist. {error}'
      ) from error
  return named


def load_bank(
  config: Config,
  checkpoint_path: PathLike | None,
  max_decode_length: int,
  prompts: Mapping[str, PathLike],
  **settings: Any,
) -> PromptBank:
  """Restores a base model and makes a bank of prompts for it.

  Args:
    config: The network's sizes.
    checkpoint_path: CHECKPOINT_PATH: the base model.
    max_decode_length: The most tokens of an answer, its EOS included.
    prompts: Files or runs, by the names of the prompts.
    **settings: Other arguments of `PromptBank`.

  Raises:
    ValueError: If the base does not fit, or a prompt does not fit it.
  """
  mesh = settings.pop('mesh', None) or partitioning.make_mesh()
  base = load_base(config, checkpoint_path, mesh)
  bank = PromptBank(
    config,
    base,
    max_decode_length,
    mesh=mesh,
    fingerprint=of_params(base),
    **settings,
  )
  for name, path in prompts.items():
    bank.add(name, path)
  return bank


def load_base(
  config: Config, checkpoint_path: PathLike | None, mesh: Mesh | None = None
) -> dict[str, jax.Array]:
  """Restores every parameter of a base model, by path.

  Args:
    config: The network's sizes.
    checkpoint_path: CHECKPOINT_PATH: the base model.
    mesh: The devices; None for all of them.

  Raises:
    ValueError: If the base does not fit.
  """
  plan = parameters.plan(config, NOTHING, mesh or partitioning.make_mesh())
  check(plan, Trained(checkpoint_path=checkpoint_path))
  return _restore_base(plan, checkpoint_path, plan.select(plan.base))[0]


def _restore_base(
  plan: parameters.Plan,
  checkpoint_path: PathLike | None,
  wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[dict[str, jax.Array], int | None]:
  """Restores parameters from CHECKPOINT_PATH; also returns its step."""
  source = open_checkpoint(checkpoint_path or '')
  check_config(source, plan.network.config)
  restored = restore(source, wanted, ignore=plan.params.__contains__)
  logging.info('%s', restore_table(source, restored))
  return restored, source.step


def _best_or_newest(model_dir: epath.Path) -> epath.Path:
  """The best checkpoint, or MODEL_DIR, whose newest one is then read."""
  steps = checkpoints.finished_steps(model_dir / 'best')
  return model_dir / 'best' / str(steps[-1]) if steps else model_dir
