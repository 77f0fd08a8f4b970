"""A trained model, ready to answer: restored, laid out, compiled."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from ptune import checkpoints, parameters, partitioning, prompt_init
from ptune.adapters import Method
from ptune.convert import open_checkpoint, restore
from ptune.models import Decoding, EncoderDecoderModel
from ptune.network import T5Config

Trees = tuple[Mapping[str, Any], ...]
PathLike = str | os.PathLike[str]


def load(
  config: T5Config,
  method: Method,
  *,
  model_dir: PathLike | None = None,
  checkpoint_path: PathLike | None = None,
  prompt_file: PathLike | None = None,
  model_parallel: int = 1,
) -> tuple[parameters.Plan, dict[str, Any], int]:
  """Restores a trained model: the base and what was trained on it.

  Args:
    config: The network's sizes.
    method: What was trained.
    model_dir: A run of `ptune train`: its best step is taken, or its newest
      where none was evaluated.
    checkpoint_path: The base model; the one that the run was started from if
      not given. A method without adapters needs nothing else.
    prompt_file: The prompt, where there is no model_dir.
    model_parallel: See `partitioning.make_mesh`.

  Returns:
    The plan, the parameters, and the step they were trained for.

  Raises:
    ValueError: If these do not name one model, or do not fit together.
  """
  plan = parameters.plan(config, method, partitioning.make_mesh(model_parallel))
  _check_sources(plan, model_dir, checkpoint_path, prompt_file)
  run: dict[str, Any] = {}
  values: dict[str, jax.Array] = {}
  step = 0
  if prompt_file is not None:
    struct = plan.params[method.prompt or '']
    prompt = prompt_init.fit(
      prompt_init.read(prompt_file), struct.shape, f'prompt file {prompt_file}'
    )
    values[method.prompt or ''] = parameters.place(prompt, struct)
  elif model_dir is not None:
    run = checkpoints.read_run(model_dir)
    checkpoints.compare(model_dir, run, parameters.identity(plan))
    checkpoint_path = checkpoint_path or run['initial_checkpoint_path']
    source = open_checkpoint(_best_or_newest(epath.Path(model_dir)))
    step = source.step or 0
    values |= restore(source, plan.select(plan.trainable))
  rest = plan.select(frozenset(plan.params) - frozenset(values))
  if rest:
    source = open_checkpoint(checkpoint_path or '')
    step = step or source.step or 0
    values |= restore(source, rest, ignore=plan.params.__contains__)
    logging.info('restored %s', source.describe())
  if run and plan.frozen:
    frozen = {path: values[path] for path in plan.frozen}
    base = {'base': checkpoints.fingerprint(frozen)}
    checkpoints.compare(model_dir or '', run, base)
  logging.info('%s', parameters.summary(plan))
  return plan, parameters.unflatten(values), step


def _check_sources(plan, model_dir, checkpoint_path, prompt_file) -> None:
  """Checks that the given paths name one model."""
  given = f'MODEL_DIR={model_dir!r}, PROMPT_FILE={prompt_file!r}'
  if model_dir is not None:
    if prompt_file is not None:
      raise ValueError(f'set MODEL_DIR or PROMPT_FILE, not both; got {given}')
    if not checkpoints.read_run(model_dir):
      raise ValueError(
        f'MODEL_DIR {model_dir} holds no run of ptune train'
        f' ({checkpoints.RUN_FILE} is not there)'
      )
    return
  if prompt_file is not None and plan.method.prompt is None:
    raise ValueError(
      f'method {plan.method.name!r} has no prompt to be read from PROMPT_FILE;'
      ' give MODEL_DIR'
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


def _best_or_newest(model_dir: epath.Path) -> epath.Path:
  best = model_dir / 'best'
  names = [child.name for child in best.iterdir()] if best.is_dir() else []
  steps = [int(name) for name in names if name.isdecimal()]
  return best / str(max(steps)) if steps else model_dir


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
