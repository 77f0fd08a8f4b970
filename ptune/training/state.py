"""The train state, and the one update that changes it.

Nothing here reads data or files, so it runs where only JAX, Flax and optax
are installed.
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
  """All that training changes.

  Attributes:
    step: int32 []: steps taken in this run, and so the position in the data.
    trainable: The trained parameters, a nested dict as in the network.
    opt_state: The optimizer's state for them.
  """

  step: jax.Array
  trainable: Any
  opt_state: Any


# (state, frozen, batch) -> (state, sums of the loss); see `compile_step`.
Update = Callable[..., tuple[TrainState, Mapping[str, jax.Array]]]


def abstract_state(
  tx: optax.GradientTransformation, plan: parameters.Plan
) -> TrainState:
  """The state's shapes, types and shardings."""
  trainable = parameters.unflatten(plan.select(plan.trainable))
  replicated = partitioning.replicated(plan.mesh)

  def struct(leaf, sharding=replicated):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  def masked(leaf):  # Stands for parameters of another `optim.grouped`.
    return isinstance(leaf, optax.MaskedNode)

  def moment(leaf, p):
    if masked(leaf):
      return leaf
    # A factored moment has fewer axes than its parameter: held whole.
    return struct(leaf, p.sharding if leaf.shape == p.shape else replicated)

  opt_state = optax.tree_utils.tree_map_params(
    tx,
    moment,
    jax.eval_shape(tx.init, trainable),
    trainable,
    transform_non_params=struct,
    is_leaf=masked,
  )
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
  return TrainState(step, trainable, opt_state)


def first_state(
  tx: optax.GradientTransformation, trainable: Any, like: TrainState
) -> TrainState:
  """The state before the first step."""
  shardings = jax.tree.map(lambda x: x.sharding, like)

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
  """One update of what is trained.

  Only the trainable tree is differentiated, and nothing reads a gradient of
  the frozen one: XLA then never computes those.

  Args:
    model: The loss.
    tx: The optimizer.
    state: Donated by the caller's jit.
    frozen: The frozen parameters.
    batch: Features [batch, length].
    microbatches: Parts whose gradients are summed, one after the other.
    seed: Of dropout, together with the step.
    private: Clips the gradient of each row, and adds noise to their sum.

  Returns:
    The next state, and the sums of `EncoderDecoderModel.loss` with the norm
    of the gradient.
  """
  drop = model.network.config.dropout_rate > 0
  rng = jax.random.fold_in(jax.random.key(seed), state.step)

  def gradient(part, rng):
    if private is not None:
      return private.gradient(
        model, state.trainable, frozen, part, rng if drop else None
      )

    def loss(trainable):
      params = parameters.merge(trainable, frozen)
      return model.loss(params, part, rng if drop else None)

    return jax.grad(loss, has_aux=True)(state.trainable)

  if microbatches == 1:
    grads, sums = gradient(batch, rng)
  else:
    # Row r goes to part r % microbatches: every part keeps its rows spread
    # over all devices. [batch, ...] -> [microbatches, batch / m, ...]
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
  like: TrainState,
  microbatches: int = 1,
  seed: int = 0,
  private: Private | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """`train_step` as a program (state, frozen, batch) that donates the state."""
  shardings = jax.tree.map(lambda x: x.sharding, like)
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
