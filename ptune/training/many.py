"""One update of many prompts on one frozen model: one batch, one program.

`jax.vmap` maps `state.train_step` over the runs. Each run has its own rows of
the batch, learning rate, seed and optimizer state, and gets the same update as
if it were trained alone. The frozen weights are not mapped, so they multiply
the rows of all runs at once. Runs whose parameters differ in shape, such as
prompts of different lengths, are mapped in groups; the program computes one
group after the other.

Nothing here reads data or files; the program is `train_many`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ptune.errors import UserError
from ptune.model import parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.training import optim
from ptune.training import state as state_lib
from ptune.training.state import TrainState

# Called with `initial_step=` and `learning_rate=`, a number.
Optimizer = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Trial:
  """The settings in which one of many runs may differ from the others.

  Attributes:
    task: The SeqIO task or mixture; None for `Data.task`.
    method: The method, which adds trained parameters to the network.
    learning_rate: A number, or a function of the step.
    seed: For the initialisation, the data order and dropout.
  """

  task: str | None
  method: Method
  learning_rate: float | optim.Schedule = 0.3
  seed: int = 0

  def rate(self, step: jax.Array) -> jax.Array:
    """The learning rate of a step, float32."""
    rate = self.learning_rate
    return jnp.asarray(rate(step) if callable(rate) else rate, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs whose parameters have the same shapes and meaning.

  Attributes:
    plan: The parameters of one of them.
    runs: Their names, in the order of the batch's rows.
  """

  plan: parameters.Plan
  runs: tuple[str, ...]


def group(
  runs: Mapping[str, Trial], config: Config, mesh: jax.sharding.Mesh
) -> dict[str, Group]:
  """Groups the runs that one mapped update can train.

  Raises:
    ValueError: If a run trains parameters of the base model.
  """
  plans: dict[str, parameters.Plan] = {}
  names: dict[str, list[str]] = {}
  for name, run in runs.items():
    plan = parameters.plan(config, run.method, mesh)
    if plan.frozen != plan.base:
      raise UserError(
        f'run {name!r} has method {run.method.name!r}, which trains parameters'
        ' of the base model, so the runs cannot share it; use ptune train'
      )
    key = json.dumps(parameters.identity(plan), sort_keys=True)
    plans.setdefault(key, plan)
    names.setdefault(key, []).append(name)
  return {
    f'group_{i}': Group(plans[key], tuple(names[key]))
    for i, key in enumerate(plans)
  }


def abstract_state(
  tx: optax.GradientTransformation, groups: Mapping[str, Group]
) -> TrainState:
  """The state of all runs: by group, arrays whose first axis is the runs."""
  trainable, opt_state, step = {}, {}, None
  for name, members in groups.items():
    abstract = state_lib.abstract_state(tx, members.plan)
    step = abstract.step
    trainable[name], opt_state[name] = jax.tree.map(
      functools.partial(_stacked, len(members.runs)),
      (abstract.trainable, abstract.opt_state),
    )
  return TrainState(step, trainable, opt_state)


def _stacked(runs: int, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  assert isinstance(x.sharding, NamedSharding)
  spec = PartitionSpec(None, *x.sharding.spec)
  return jax.ShapeDtypeStruct(
    (runs, *x.shape), x.dtype, sharding=NamedSharding(x.sharding.mesh, spec)
  )


def first_state(
  tx: optax.GradientTransformation,
  trainable: Mapping[str, Mapping[str, Any]],
  groups: Mapping[str, Group],
) -> TrainState:
  """The state before the first step.

  Args:
    tx: The optimizer.
    trainable: The parameters that each run trains, by the run's name: nested
      dicts as in the network.
    groups: The runs.
  """
  abstract = abstract_state(tx, groups)

  def init(trainable):
    stacked = {
      name: jax.tree.map(
        lambda *x: jnp.stack(x), *(trainable[run] for run in members.runs)
      )
      for name, members in groups.items()
    }
    opt_state = {k: jax.vmap(tx.init)(x) for k, x in stacked.items()}
    return TrainState(jnp.zeros((), jnp.int32), stacked, opt_state)

  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(init, out_shardings=shardings)(dict(trainable))


def of_run(state: TrainState, groups: Mapping[str, Group], run: str) -> Any:
  """The trained parameters of a run: a nested dict as in the network."""
  name = next(name for name, g in groups.items() if run in g.runs)
  index = groups[name].runs.index(run)
  return jax.tree.map(lambda x: x[index], state.trainable[name])


def compile_step(
  model: Callable[..., EncoderDecoderModel],
  optimizer: Optimizer,
  initial_step: int,
  runs: Mapping[str, Trial],
  groups: Mapping[str, Group],
  microbatches: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Compiles one update of all runs: (state, frozen, batch) -> (state, sums).

  The batch is [runs * batch, length]: all rows of the first run, then all rows
  of the second, in the order of the groups. The sums are [runs]. The state is
  donated.
  """

  def update(state, frozen, batch):
    trainable, opt_state, sums, first = {}, {}, [], 0
    size = batch['encoder_input_tokens'].shape[0] // len(runs)
    for name, members in groups.items():
      count = len(members.runs)
      rows = slice(first, first := first + count * size)
      part = {
        k: x[rows].reshape(count, size, *x.shape[1:]) for k, x in batch.items()
      }
      mine = [runs[run] for run in members.runs]

      def one(trainable, opt_state, part, rate, seed, members=members):
        new, sums = state_lib.train_step(
          model(members.plan.network),
          optimizer(initial_step=initial_step, learning_rate=rate),
          TrainState(state.step, trainable, opt_state),
          frozen,
          part,
          microbatches=microbatches,
          seed=seed,
        )
        return new.trainable, new.opt_state, sums

      trainable[name], opt_state[name], own = jax.vmap(one)(
        state.trainable[name],
        state.opt_state[name],
        part,
        jnp.stack([run.rate(state.step) for run in mine]),
        np.array([run.seed for run in mine], np.uint32),
      )
      sums.append(own)
    sums = jax.tree.map(lambda *x: jnp.concatenate(x), *sums)
    return TrainState(state.step + 1, trainable, opt_state), sums

  tx = optimizer(initial_step=initial_step, learning_rate=0.0)
  abstract = abstract_state(tx, groups)
  mesh = next(iter(groups.values())).plan.mesh
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(
    update,
    donate_argnums=0,
    out_shardings=(shardings, partitioning.replicated(mesh)),
  )


def joined(
  batches: Sequence[Mapping[str, np.ndarray]], pad: int = 0
) -> dict[str, np.ndarray]:
  """Concatenates batches along the rows, padded to the longest.

  Args:
    batches: T5's features, by name.
    pad: The token that tokens are padded with; weights are padded with 0.
  """

  def padded(x, length, value):
    return np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=value)

  result = {}
  for name in batches[0]:
    parts = [batch[name] for batch in batches]
    longest = max(x.shape[1] for x in parts)
    value = pad if name.endswith('_tokens') else 0
    result[name] = np.concatenate([padded(x, longest, value) for x in parts])
  return result
