"""A trained model, ready to answer: restored, laid out, compiled."""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from ptune import (
  checkpoints,
  decoding,
  parameters,
  partitioning,
  prompt_init,
)
from ptune.convert import account, check_config, open_checkpoint, restore
from ptune.convert.trained import open_trained
from ptune.models import Decoding, EncoderDecoderModel

Trees = tuple[Mapping[str, Any], ...]
PathLike = str | os.PathLike[str]


def output_directory(
  name: str, output_dir: PathLike | None, model_dir: PathLike | None, below: str
) -> epath.Path:
  """Makes the directory that a program writes to.

  Args:
    name: What users call it.
    output_dir: The directory, if given.
    model_dir: MODEL_DIR, if given; `below` is made in it otherwise.
    below: Name of a directory.

  Raises:
    ValueError: If neither is given, or it cannot be written.
  """
  if output_dir is None and model_dir is None:
    raise ValueError(
      f'{name} is needed where there is no MODEL_DIR; for example'
      f' --gin.{name}="\'/runs/out\'"'
    )
  if output_dir is None:
    _check_run(model_dir)
    output_dir = checkpoints.run_directory(model_dir) / below
  directory = checkpoints.absolute(output_dir)
  checkpoints.check_writable(name, directory)
  return directory


def check(
  plan: parameters.Plan,
  model_dir: PathLike | None = None,
  checkpoint_path: PathLike | None = None,
  prompt_file: PathLike | None = None,
) -> None:
  """Checks that the given paths name one model; `load` says what they are.

  Raises:
    ValueError: If they do not, or it was not trained as `plan` says.
  """
  given = f'MODEL_DIR={model_dir!r}, PROMPT_FILE={prompt_file!r}'
  if model_dir is not None:
    if prompt_file is not None:
      raise ValueError(f'set MODEL_DIR or PROMPT_FILE, not both; got {given}')
    run = _check_run(model_dir)
    checkpoints.compare(model_dir, run, parameters.identity(plan))
    return
  if prompt_file is not None and not plan.frozen:
    raise ValueError(
      f'method {plan.method.name!r} trains all of the model: it'
      ' has no prompt to be read from PROMPT_FILE; give MODEL_DIR'
    )
  if prompt_file is not None and plan.method.fold:
    raise ValueError(
      f'method {plan.method.name!r} folds what it trained into a simpler'
      ' method: set METHOD to that one, such as methods/prompt.gin for a .npy,'
      f' to read PROMPT_FILE={prompt_file!r}; or give MODEL_DIR'
    )
  if prompt_file is None and plan.adapters:
    raise ValueError(
      'set MODEL_DIR (a run of ptune train) or PROMPT_FILE (a prompt for the'
      f' base model in CHECKPOINT_PATH); got {given}'
    )
  if checkpoint_path is None:
    raise ValueError(
      'CHECKPOINT_PATH, the base model, is needed without a MODEL_DIR; for'
      ' example --gin.CHECKPOINT_PATH="\'/models/t5_1_1_small\'"'
    )


def _check_run(model_dir: PathLike | None) -> dict[str, Any]:
  directory = checkpoints.run_directory(model_dir)
  run = checkpoints.read_run(directory)
  if not run:
    raise ValueError(
      f'MODEL_DIR {directory} holds no run of ptune train'
      f' ({checkpoints.RUN_FILE} is not there)'
    )
  return run


def load(
  plan: parameters.Plan,
  model_dir: PathLike | None = None,
  checkpoint_path: PathLike | None = None,
  prompt_file: PathLike | None = None,
) -> tuple[dict[str, Any], int]:
  """Restores a trained model: the base and what was trained on it.

  Args:
    plan: The parameters.
    model_dir: A run of `ptune train`: its best step is taken, or its newest
      where none was evaluated.
    checkpoint_path: The base model; the one that the run was started from if
      not given. A method without adapters needs nothing else.
    prompt_file: A file of a run's prompts/, where there is no model_dir.

  Returns:
    The parameters, and the step they were trained for.

  Raises:
    ValueError: If these do not fit together.
  """
  run: dict[str, Any] = {}
  values: dict[str, jax.Array] = {}
  step = None
  if prompt_file is not None:
    trained, facts = _read(plan, prompt_file)
    values |= trained
    step = facts.get('step')
  elif model_dir is not None:
    directory = checkpoints.run_directory(model_dir)
    run = facts = checkpoints.read_run(directory)
    checkpoint_path = checkpoint_path or run['initial_checkpoint_path']
    source = open_checkpoint(_best_or_newest(directory))
    step = source.step
    values |= restore(source, plan.select(plan.trainable))
  rest = plan.select(frozenset(plan.params) - frozenset(values))
  if rest:
    source = open_checkpoint(checkpoint_path or '')
    check_config(source, plan.network.config)
    step = source.step if step is None else step
    restored = restore(source, rest, ignore=plan.params.__contains__)
    values |= restored
    logging.info('%s', account(source, restored))
  if (model_dir or prompt_file) and plan.frozen:
    frozen = {path: values[path] for path in plan.frozen}
    base = checkpoints.fingerprint(frozen)
    checkpoints.compare(model_dir or '', run, {'base': base})
    if facts.get('base', base) != base:
      logging.warning(
        'prompt file %s was trained on another base model (fingerprint %s)'
        ' than that of CHECKPOINT_PATH %s (%s)',
        prompt_file,
        facts['base'],
        checkpoint_path,
        base,
      )
  logging.info('%s', parameters.summary(plan))
  frozen = {path: values.pop(path) for path in plan.frozen}
  return parameters.unflatten(values | parameters.hold(plan, frozen)), step or 0


def _read(
  plan: parameters.Plan, prompt_file: PathLike
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
  """What `ptune train` wrote to `prompts/`, and what stands beside it."""
  path = plan.method.prompt
  if path is None:
    source, facts = open_trained(prompt_file)
    ours = dict(plan.method.settings)
    theirs = facts.get('settings', ours)
    if theirs != ours:
      raise ValueError(
        f'prompt file {os.fspath(prompt_file)} was trained with the settings'
        f' {theirs}, and METHOD {plan.method.name!r} has {ours}; give those of'
        ' the file'
      )
    return restore(source, plan.select(plan.trainable)), facts
  struct = plan.params[path]
  prompt = prompt_init.fit(
    prompt_init.read(prompt_file), struct.shape, f'prompt file {prompt_file}'
  )
  beside = epath.Path(os.fspath(prompt_file).removesuffix('.npy') + '.json')
  # Another's has no such file.
  facts = json.loads(beside.read_text()) if beside.is_file() else {}
  return {path: parameters.place(prompt, struct)}, facts


def _best_or_newest(model_dir: epath.Path) -> epath.Path:
  """The checkpoint that was the best when it was evaluated."""
  steps = checkpoints.finished_steps(model_dir / 'best')
  return model_dir / 'best' / str(steps[-1]) if steps else model_dir


class Predictor:
  """The programs that answer a batch; each is compiled at its first use.

  What is asked of it takes the parameters as one or several trees, which are
  merged; rows are split over the devices, answers come back whole.
  """

  def __init__(
    self,
    plan: parameters.Plan,
    model: EncoderDecoderModel,
    max_decode_length: int,
    how: Decoding = Decoding(),
    seed: int = 0,
  ):
    """Prepares the programs.

    Args:
      plan: The parameters.
      model: The model.
      max_decode_length: Most tokens of an answer, its EOS included.
      how: How predictions are decoded.
      seed: For sampling.
    """
    # What is out of range is said now, and not when a run has long trained.
    if how.num_beams < 1:
      raise ValueError(f'num_beams is {how.num_beams}; it must be at least 1')
    jax.eval_shape(
      lambda: decoding.sampling_probabilities(
        jnp.zeros((1, 2)), how.temperature, how.top_k, how.top_p
      )
    )
    self._plan = plan
    merge = parameters.merge

    def predict(trees, tokens, rows):
      base = jax.random.key(seed)
      # A row's sample depends on the row, not on the batch it is put in.
      keys = jax.vmap(lambda row: jax.random.fold_in(base, row))(rows)
      params = merge(*trees)
      return model.predict(params, tokens, max_decode_length, how, keys)

    jit = functools.partial(
      jax.jit, out_shardings=partitioning.replicated(plan.mesh)
    )
    self._predict = jit(predict)
    self._score = jit(lambda trees, batch: model.score(merge(*trees), batch))
    self._sums = jit(lambda trees, batch: model.loss(merge(*trees), batch)[1])

  def predict(
    self, trees: Trees, batch: Mapping[str, jax.Array], rows: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Answers [batch, max_decode_length], and their scores [batch].

    Args:
      trees: The parameters.
      batch: With `encoder_input_tokens`.
      rows: [batch] a number of each row, from which its samples are drawn.
    """
    with self._plan.scope():
      return jax.device_get(
        self._predict(
          trees, batch['encoder_input_tokens'], rows.astype(np.uint32)
        )
      )

  def score(self, trees: Trees, batch: Mapping[str, jax.Array]) -> np.ndarray:
    """Log probabilities of the targets: [batch]."""
    with self._plan.scope():
      return jax.device_get(self._score(trees, batch))

  def sums(
    self, trees: Trees, batch: Mapping[str, jax.Array]
  ) -> dict[str, float]:
    """The sums of `EncoderDecoderModel.loss`."""
    with self._plan.scope():
      sums = jax.device_get(self._sums(trees, batch))
    return {name: float(value) for name, value in sums.items()}
