"""Private prompts: a prompt that reveals little about any one training row.

The method is Abadi et al. 2016, "Deep Learning with Differential Privacy"
(arXiv 1607.00133), applied to a prompt as in Duan, Dziedzic, Papernot and
Boenisch 2023, "Flocks of Stochastic Parrots" (arXiv 2305.15594). A step
computes the gradient g_r of each row r of a batch, and gives the optimizer

    sum over r of g_r * min(1, clip / |g_r|)  +  N(0, (noise * clip)^2)

Every row reads its own copy of the prompt, [batch, prompt, embed]. So one
backward pass computes all g_r, at the cost of an ordinary one.

The guarantee bounds, at the given delta, how much one row's loss can change the
trained prompt:

- Shuffled batches: an epoch visits each row once. The reported epsilon is that
  of one Gaussian mechanism for each epoch, without any gain from sampling.
  Beside it we report the epsilon that Poisson-sampled batches of this size
  would have had, because papers report it; it does not hold here.
- Poisson-sampled batches (see `data.poisson`): each step draws each row
  independently, by a key that stays secret. The reported epsilon is that of one
  Poisson-sampled Gaussian mechanism for each step.

The guarantee covers the prompt and everything computed from it. It does not
cover the log of a run, which has the loss on training rows. It does not cover
labels that were read from the training set to initialise the prompt (set
CLASS_LABELS instead), or settings that were chosen by many runs.
"""

import dataclasses
import functools
import hashlib
import secrets
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ptune.errors import UserError
from ptune.methods import prompt, row_prompts
from ptune.model import parameters
from ptune.model.adapters import Method
from ptune.model.models import Batch, EncoderDecoderModel

# A file in MODEL_DIR. Anyone who knows its content can remove the noise.
SECRET = 'noise.key'
SAMPLING = ('shuffle', 'poisson')


@dataclasses.dataclass(frozen=True)
class Privacy:
  """The privacy settings of a run.

  Attributes:
    clip: CLIP_NORM, the largest norm of a row's gradient.
    noise: NOISE_MULTIPLIER, the standard deviation of the noise over `clip`.
    delta: DELTA; below 1 over the number of training rows.
    epsilon: EPSILON, at which the run stops; None for no limit.
    sampling: SAMPLING, how batches are drawn: 'shuffle' or 'poisson'.
  """

  clip: float = 1.0
  noise: float = 1.0
  delta: float = 1e-5
  epsilon: float | None = None
  sampling: str = 'shuffle'

  def __post_init__(self):
    wrong = [
      f'{name} is {value!r}; it must be {expected}'
      for name, value, fits, expected in (
        ('CLIP_NORM', self.clip, self.clip > 0, 'above 0'),
        ('NOISE_MULTIPLIER', self.noise, self.noise >= 0, 'at least 0'),
        ('DELTA', self.delta, 0 < self.delta < 1, 'between 0 and 1'),
        (
          'EPSILON',
          self.epsilon,
          self.epsilon is None or self.epsilon > 0,
          'above 0, or None',
        ),
        (
          'SAMPLING',
          self.sampling,
          self.sampling in SAMPLING,
          f'one of {SAMPLING}',
        ),
      )
      if not fits
    ]
    if wrong:
      raise UserError('\n'.join(wrong))

  def facts(self) -> dict[str, Any]:
    """The facts that a restart may not change; EPSILON may change."""
    facts = {'clip': self.clip, 'noise': self.noise, 'delta': self.delta}
    if self.sampling != 'shuffle':  # Runs of earlier versions lack this fact.
      facts['sampling'] = self.sampling
    return facts


def check(method: Method, model: EncoderDecoderModel, pack: int) -> None:
  """Refuses methods and losses that give no gradient for each row.

  Raises:
    ValueError: If the method is not a plain prompt, rows are packed, or the
      loss is divided by a number that depends on all rows.
  """
  if method.name != 'prompt':
    raise UserError(
      f'METHOD is {method.name!r}; only a prompt at the start of the input can'
      ' be trained privately: choose methods/prompt.gin or a file of prompts/'
    )
  if pack:
    raise UserError(
      'packed rows hold several examples, but each example needs its own'
      ' gradient; turn packing off (PACK)'
    )
  if isinstance(model.loss_normalizing_factor, str):
    raise UserError(
      f'loss_normalizing_factor is {model.loss_normalizing_factor!r}, which'
      ' depends on all rows; set it to None or to a number'
    )


def check_same(present: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
  """Refuses to resume a private run without privacy, or the reverse.

  Args:
    present: The run.json of an earlier start; {} if there is none.
    facts: The facts of this run.

  Raises:
    ValueError: If only one of the two is private.
  """
  if present and ('privacy' in present) != ('privacy' in facts):
    was, now = (
      'private' if 'privacy' in x else 'not private' for x in (present, facts)
    )
    raise UserError(
      f'MODEL_DIR holds a run that was {was}, and this one is {now}; a run is'
      ' private from start to end, or not at all. Choose another MODEL_DIR, or'
      f' {"add" if was == "private" else "remove"} losses/private.gin'
    )


# -------------------------------------------------------------------- gradient


@dataclasses.dataclass(frozen=True)
class Private:
  """Computes the gradient of a private run; replaces the ordinary gradient.

  Attributes:
    privacy: The privacy settings.
    key: The key of the noise, uint32 [2]; see `of_run`.
  """

  privacy: Privacy
  key: np.ndarray

  def gradient(
    self,
    model: EncoderDecoderModel,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    batch: Batch,
    dropout_rng: jax.Array | None,
  ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The sum of the rows' gradients, each clipped to the norm `clip`.

    Returns:
      A tree like `trainable`, and the sums of `EncoderDecoderModel.loss`.
    """
    [value] = parameters.flatten(trainable).values()
    rows = batch['encoder_input_tokens'].shape[0]
    lengths = jnp.full(rows, value.shape[0], jnp.int32)
    own = dataclasses.replace(
      model, network=model.network.clone(placements=row_prompts.per_row())
    )

    def loss(copies):
      mine = row_prompts.row_parameters(copies, lengths)
      params = parameters.merge(frozen, parameters.unflatten(mine))
      return own.loss(params, batch, dropout_rng)

    copies = jnp.broadcast_to(value, (rows, *value.shape))
    grads, sums = jax.grad(loss, has_aux=True)(copies)
    norms = jnp.sqrt(jnp.sum(jnp.square(grads), axis=(1, 2)))
    factors = jnp.minimum(1.0, self.privacy.clip / jnp.maximum(norms, 1e-30))
    total = jnp.einsum('bpe,b->pe', grads, factors, precision='highest')
    return parameters.unflatten({prompt.PATH: total}), sums

  def noised(self, step: jax.Array, grads: Any) -> Any:
    """Adds the noise of a step to the sum of its rows' gradients."""
    scale = self.privacy.noise * self.privacy.clip
    if not scale:
      return grads
    rng = jax.random.wrap_key_data(jnp.asarray(self.key))
    rng = jax.random.fold_in(rng, step)
    return jax.tree.map(  # The prompt is the only leaf.
      lambda x: x + scale * jax.random.normal(rng, x.shape, x.dtype), grads
    )


def drawn(private: Private | None, multiple: int) -> dict[str, int]:
  """The settings of `PoissonBatches`; {} if batches are shuffled.

  The key of the rows does not reveal the key of the noise.

  Args:
    private: The gradient of a private run; None for other runs.
    multiple: The number of rows in a batch's arrays is a multiple of this.
  """
  if private is None or private.privacy.sampling != 'poisson':
    return {}
  digest = hashlib.sha256(b'rows' + private.key.tobytes()).digest()
  return {'key': int.from_bytes(digest[:8], 'little'), 'multiple': multiple}


def of_run(privacy: Privacy, directory: epath.Path) -> Private:
  """Makes the gradient of a run; its key is drawn once and kept in MODEL_DIR.

  A restarted run uses the same key, so it ends with the same bits.
  """
  file, key = directory / SECRET, np.zeros(2, np.uint32)
  if jax.process_index() == 0:
    if not file.exists():
      file.write_text(secrets.token_hex(8))
    key = np.frombuffer(bytes.fromhex(file.read_text()), np.uint32)
  return Private(privacy, np.asarray(multihost_utils.broadcast_one_to_all(key)))


# ------------------------------------------------------------------ accounting


def visits(steps: int, batch_size: int, examples: int) -> int:
  """The most visits of any row; an epoch visits each row once.

  A batch that spans two epochs can hold a row twice. The sum of its gradients
  then changes twice as much, so we count four visits, not two.

  Args:
    steps: The number of steps.
    batch_size: The rows in a step.
    examples: The number of training rows; at least a batch.
  """
  epochs = -(-steps * batch_size // examples)
  if examples % batch_size == 0:
    return epochs
  return 4 * (epochs // 2) + epochs % 2


def epsilon(privacy: Privacy, visits: int) -> float:
  """The epsilon after this many visits of a row."""
  accounting = _accounting()
  if not visits:
    return 0.0
  if not privacy.noise:
    return float('inf')
  # Several Gaussian mechanisms are equal to a single one with less noise.
  event = accounting.GaussianDpEvent(privacy.noise / np.sqrt(visits))
  return _cost(event, privacy.delta)


def epsilon_if_poisson(
  privacy: Privacy, steps: int, batch_size: int, examples: int
) -> float:
  """The epsilon if each step had drawn its rows independently."""
  accounting = _accounting()
  if not steps:
    return 0.0
  if not privacy.noise:
    return float('inf')
  drawn = accounting.PoissonSampledDpEvent(
    batch_size / examples, accounting.GaussianDpEvent(privacy.noise)
  )
  return _cost(accounting.SelfComposedDpEvent(drawn, steps), privacy.delta)


@functools.lru_cache(maxsize=64)
def _cost(event: Any, delta: float) -> float:
  from dp_accounting import pld

  return float(pld.PLDAccountant().compose(event).get_epsilon(delta))


def cost(privacy: Privacy, steps: int, batch_size: int, examples: int) -> float:
  """The epsilon that holds after this many steps."""
  if privacy.sampling == 'poisson':
    return epsilon_if_poisson(privacy, steps, batch_size, examples)
  return epsilon(privacy, visits(steps, batch_size, examples))


def last_step(
  privacy: Privacy, steps: int, batch_size: int, examples: int | None
) -> int:
  """The last of `steps` steps that does not exceed EPSILON.

  Raises:
    ValueError: If the number of rows is unknown or less than a batch, DELTA is
      too large for it, or EPSILON allows no step.
  """
  if examples is None or examples < batch_size:
    raise UserError(
      f'epsilon cannot be computed for {examples or "a stream of"} rows in'
      f' batches of {batch_size}; train on a task in memory, with at least'
      ' BATCH_SIZE rows'
    )
  if privacy.delta >= 1 / examples:
    raise UserError(
      f'DELTA is {privacy.delta}, not below 1 / {examples} training rows, so'
      ' publishing one of the rows would be allowed; lower DELTA'
    )
  if privacy.epsilon is None:
    return steps

  def within(step):
    return cost(privacy, step, batch_size, examples) <= privacy.epsilon

  low, high = 0, steps  # `low` is within EPSILON, `high` may not be.
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if within(middle) else (low, middle - 1)
  if not low:
    raise UserError(
      f'EPSILON {privacy.epsilon} allows no step with NOISE_MULTIPLIER'
      f' {privacy.noise}: the first step has epsilon'
      f' {cost(privacy, 1, batch_size, examples):.3g}; raise one of them'
    )
  return low


def spent(
  privacy: Privacy, steps: int, batch_size: int, examples: int
) -> dict[str, Any]:
  """The privacy facts of a prompt after some steps: epsilon and settings."""
  found = {
    **privacy.facts(),
    'examples': examples,
    'epsilon': cost(privacy, steps, batch_size, examples),
  }
  if privacy.sampling == 'shuffle':
    found['epsilon_if_poisson'] = epsilon_if_poisson(
      privacy, steps, batch_size, examples
    )
  return found


def describe(spent: Mapping[str, Any]) -> str:
  """The result of `spent` as a line of text."""
  said = f'epsilon {spent["epsilon"]:.3g} at delta {spent["delta"]:g}, for'
  if 'epsilon_if_poisson' not in spent:
    return f'{said} Poisson-sampled batches of {spent["examples"]} rows'
  return (
    f'{said} shuffled batches of {spent["examples"]} rows (Poisson-sampled'
    f' batches would have {spent["epsilon_if_poisson"]:.3g}, but these are not)'
  )


def _accounting() -> Any:
  try:
    import dp_accounting
  except ImportError as error:
    raise UserError(
      "epsilon needs the package dp-accounting: pip install 'ptune[privacy]'"
    ) from error
  return dp_accounting
