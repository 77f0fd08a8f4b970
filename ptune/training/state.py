"""The train state, and the update that changes it.

Nothing here reads data or files, so JAX, Flax and optax are enough to run it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from ptune.model import parameters, partitioning
from ptune.model.models import EncoderDecoderModel
from ptune.training.privacy import Private


@flax.struct.dataclass
class TrainState:
  """Everything that training changes.

  Attributes:
    step: int32 []: the steps taken in this run, which also give the position
      in the data.
    trainable: The trained parameters: a nested dict as in the network.
    opt_state: The optimizer's state for them.
  """

  step: jax.Array
  trainable: Any
  opt_state: Any


# (state, frozen, batch) -> (state, sums of the loss); see `compile_step`.
Update = Callable[..., tuple[TrainState, Mapping[str, jax.Array]]]


def is_masked(leaf: Any) -> bool:
  """Whether a leaf is a placeholder for parameters of another optimizer."""
  return isinstance(leaf, optax.MaskedNode)


def abstract_state(
  tx: optax.GradientTransformation, plan: parameters.Plan
) -> TrainState:
  """The state's shapes, types and shardings."""
  trainable = parameters.unflatten(plan.select(plan.trainable))
  replicated = partitioning.replicated(plan.mesh)

  def struct(leaf, sharding=replicated):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  def moment(leaf, p):
    if is_masked(leaf):
      return leaf
    # A factored moment has fewer axes than its parameter: we replicate it.
    return struct(leaf, p.sharding if leaf.shape == p.shape else replicated)

  opt_state = optax.tree_utils.tree_map_params(
    tx,
    moment,
    jax.eval_shape(tx.init, trainable),
    trainable,
    transform_non_params=struct,
    is_leaf=is_masked,
  )
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
  return TrainState(step, trainable, opt_state)


def first_state(
  tx: optax.GradientTransformation, trainable: Any, abstract: TrainState
) -> TrainState:
  """The state before the first step."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract)

  def init(trainable):
    return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))

  return jax.jit(init, out_shardings=shardings)(trainable)


def train_step(
  model: EncoderDecoderModel,
  tx: optax.GradientTransformation,
  state: TrainState,
  frozen: Any,
  batch: Mapping[str, jax.Array],
  *,
  microbatches: int = 1,
  seed: int = 0,
  private: Private | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Updates the trainable parameters once.

  We differentiate the trainable tree only, so XLA computes no gradient of a
  frozen weight.

  Args:
    model: The loss.
    tx: The optimizer.
    state: The state, which the caller's jit donates.
    frozen: The frozen parameters.
    batch: Features [batch, length].
    microbatches: The number of parts of the batch. Their gradients are computed
      one after the other and summed.
    seed: For dropout and a method's noise, combined with the step.
    private: Clips the gradient of each row and adds noise to their sum.

  Returns:
    The next state, and the sums of `EncoderDecoderModel.loss` together with
    the norm of the gradient.
  """
  rng = jax.random.fold_in(jax.random.key(seed), state.step)

  def gradient(part, rng):
    if private is not None:
      return private.gradient(model, state.trainable, frozen, part, rng)

    def loss(trainable):
      params = parameters.merge(trainable, frozen)
      return model.loss(params, part, rng)

    return jax.grad(loss, has_aux=True)(state.trainable)

  if microbatches == 1:
    grads, sums = gradient(batch, rng)
  else:
    # Row r goes to part r % microbatches, so every part is spread over all
    # devices. [batch, ...] -> [microbatches, batch / m, ...]
    parts = {
      k: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
      for k, x in batch.items()
    }

    def add(total, part):
      part, rng = part
      return jax.tree.map(jnp.add, total, gradient(part, rng)), None

    rngs = jax.random.split(rng, microbatches)
    one = gradient({k: x[0] for k, x in parts.items()}, rngs[0])
    rest = ({k: x[1:] for k, x in parts.items()}, rngs[1:])
    (grads, sums), _ = jax.lax.scan(add, one, rest)

  if private is not None:
    grads = private.noised(state.step, grads)
  divisor = model.normalizer(batch)
  if divisor is not None:
    grads = jax.tree.map(lambda g: g / divisor, grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  sums['gradient_norm'] = optax.tree_utils.tree_norm(grads)
  return TrainState(state.step + 1, trainable, opt_state), sums


def compile_step(
  model: EncoderDecoderModel,
  tx: optax.GradientTransformation,
  plan: parameters.Plan,
  abstract: TrainState,
  microbatches: int = 1,
  seed: int = 0,
  private: Private | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Compiles `train_step`: (state, frozen, batch) -> (state, sums).

  The state is donated.
  """
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(
    functools.partial(
      train_step,
      model,
      tx,
      microbatches=microbatches,
      seed=seed,
      private=private,
    ),
    donate_argnums=0,
    out_shardings=(shardings, partitioning.replicated(plan.mesh)),
  )
