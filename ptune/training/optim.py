"""Optimizers and learning-rate schedules from optax, with T5X's settings.

Each optimizer takes the step of the initial checkpoint, because Adafactor
continues to count from there.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax
from flax import traverse_util

from ptune.errors import UserError

Schedule = Callable[[int], float]


def schedule(
  learning_rate: float = 0.3,
  decay: str = 'constant',
  warmup_steps: int = 0,
  decay_steps: int | None = None,
  end_factor: float = 0.0,
) -> Schedule:
  """The learning rate as a function of this run's step.

  Args:
    learning_rate: The peak.
    decay: 'constant', 'linear', 'cosine', or 'rsqrt', which falls with
      1/sqrt(step) after the warm-up.
    warmup_steps: The steps of a linear rise from 0.
    decay_steps: The step at which linear and cosine decay end.
    end_factor: The fraction of the peak at which they end.

  Raises:
    ValueError: If the rate is not a number, or the decay is unknown or needs
      `decay_steps`.
  """
  if not isinstance(learning_rate, int | float) or not (
    0 <= learning_rate < math.inf
  ):
    raise UserError(
      f'LEARNING_RATE is {learning_rate!r}; it must be a number of at least 0'
    )
  if warmup_steps < 0:
    raise UserError(f'warmup_steps is {warmup_steps}; it cannot be negative')
  if decay in ('linear', 'cosine'):
    if decay_steps is None or decay_steps <= warmup_steps:
      raise UserError(
        f'{decay} decay after {warmup_steps} warm-up steps needs a later'
        f' decay_steps, not {decay_steps}; set it to TRAIN_STEPS'
      )
    length = decay_steps - warmup_steps
    if decay == 'linear':
      main = optax.linear_schedule(
        learning_rate, learning_rate * end_factor, length
      )
    else:
      main = optax.cosine_decay_schedule(learning_rate, length, end_factor)
  elif decay == 'rsqrt':
    first = max(warmup_steps, 1)
    main = lambda step: learning_rate * jnp.sqrt(first / (step + first))
  elif decay == 'constant':
    main = optax.constant_schedule(learning_rate)
  else:
    raise UserError(
      f"decay {decay!r} is not one of 'constant', 'linear', 'cosine', 'rsqrt'"
    )
  if not warmup_steps:
    return main
  # Step 0 is the first of warmup_steps, so its rate is not 0.
  warmup = lambda step: learning_rate * (step + 1) / warmup_steps
  return optax.join_schedules([warmup, main], [warmup_steps])


def adafactor(
  initial_step: int = 0,
  learning_rate: float | Schedule = 0.3,
  decay_rate: float = 0.8,
  weight_decay_rate: float | None = 1e-5,
  clipping_threshold: float | None = 1.0,
  multiply_by_parameter_scale: bool = False,
  min_dim_size_to_factor: int = 128,
  step_offset: int | None = None,
) -> optax.GradientTransformation:
  """Adafactor with the settings of prompt tuning.

  The second moment decays with beta2 = 1 - t^-decay_rate, where t counts from
  the initial checkpoint's step. After 1,100,000 steps, a new second moment
  takes only 1.5e-5 of each squared gradient, so updates stay at the clipping
  threshold for the whole run. Counting from 0 trains differently. Weight decay
  is not scaled by the learning rate.

  Args:
    initial_step: The step of the initial checkpoint.
    learning_rate: A number, or a function of this run's step.
    decay_rate: The exponent of the second moment's decay.
    weight_decay_rate: The fraction of a parameter that each step subtracts.
    clipping_threshold: The largest root mean square of an update.
    multiply_by_parameter_scale: Whether updates are relative to the
      parameter's root mean square.
    min_dim_size_to_factor: A second moment is factored into rows and columns
      if both dimensions are at least this large.
    step_offset: Replaces initial_step.

  Source: Shazeer and Stern 2018 (arXiv 1804.04235); T5X's adafactor.
  """
  offset = initial_step if step_offset is None else step_offset
  return optax.adafactor(
    learning_rate,
    min_dim_size_to_factor=min_dim_size_to_factor,
    decay_rate=decay_rate,
    decay_offset=-offset,
    multiply_by_parameter_scale=multiply_by_parameter_scale,
    clipping_threshold=clipping_threshold,
    weight_decay_rate=weight_decay_rate,
    eps=1e-30,
  )


def adamw(
  initial_step: int = 0,
  learning_rate: float | Schedule = 1e-3,
  b1: float = 0.9,
  b2: float = 0.999,
  weight_decay: float = 0.0,
  max_norm: float | None = 1.0,
) -> optax.GradientTransformation:
  """AdamW after clipping by the global norm.

  Args:
    initial_step: Not used, because the moments start from 0.
    learning_rate: A number, or a function of this run's step.
    b1: The decay of the first moment.
    b2: The decay of the second moment.
    weight_decay: The weight decay, which is scaled by the learning rate.
    max_norm: The largest norm of all gradients together; None for no clipping.
  """
  del initial_step
  adam = optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay)
  if max_norm is None:
    return adam
  return optax.chain(optax.clip_by_global_norm(max_norm), adam)


def relative_adam(
  initial_step: int = 0,
  learning_rate: float | Schedule = 0.01,
  b1: float = 0.9,
  b2: float = 0.98,
  max_norm: float | None = 1.0,
) -> optax.GradientTransformation:
  """Adam with steps relative to the size of each parameter array.

  It combines Adam's moments with Adafactor's scaling by the parameter's root
  mean square. It trains small models from random weights faster than either.

  Args:
    initial_step: Not used, because the moments start from 0.
    learning_rate: A number, or a function of this run's step.
    b1: The decay of the first moment.
    b2: The decay of the second moment.
    max_norm: The largest norm of all gradients together; None for no clipping.
  """
  del initial_step
  adam = optax.chain(
    optax.scale_by_adam(b1, b2),
    optax.scale_by_param_block_rms(),
    optax.scale_by_learning_rate(learning_rate),
  )
  if max_norm is None:
    return adam
  return optax.chain(optax.clip_by_global_norm(max_norm), adam)


def grouped(
  initial_step: int = 0,
  learning_rate: float | Schedule = 0.3,
  optimizer: Callable[..., optax.GradientTransformation] = adamw,
  learning_rates: Mapping[str, float | Schedule] | None = None,
) -> optax.GradientTransformation:
  """An optimizer with different learning rates for groups of parameters.

      grouped(learning_rate=0.3, learning_rates={'*/offset/*': 0.001})

  Each group is updated by itself: an optimizer that clips by the global norm
  uses the norm of the group's gradients.

  Args:
    initial_step: The step of the initial checkpoint.
    learning_rate: The rate of parameters that match no pattern.
    optimizer: Called with `initial_step=` and `learning_rate=` for each group.
    learning_rates: Maps a path pattern to a number or a function of this run's
      step. `*` matches any text, including `/`. A parameter uses the first
      pattern that matches its path.

  Raises:
    ValueError: When the state is made, if no parameter uses a pattern.
  """
  rates = {'': learning_rate, **(learning_rates or {})}

  def key(pattern):  # Names the group in the state; in T5X, `/` separates keys.
    return pattern.replace('/', '.')

  def labels(params):
    # optax also calls this with a placeholder that has no leaves.
    if not isinstance(params, Mapping):
      return {}
    flat = traverse_util.flatten_dict(params, sep='/')
    found = {
      path: next((p for p in rates if fnmatch.fnmatchcase(path, p)), '')
      for path in flat
    }
    if idle := sorted(set(rates) - {''} - set(found.values())):
      raise UserError(
        f'learning_rates has {idle}, which no parameter uses; the trained'
        ' parameters are:\n  ' + '\n  '.join(flat)
      )
    keys = {path: key(pattern) for path, pattern in found.items()}
    return traverse_util.unflatten_dict(keys, sep='/')

  return optax.partition(
    {
      key(pattern): optimizer(initial_step=initial_step, learning_rate=rate)
      for pattern, rate in rates.items()
    },
    labels,
  )
