"""Estimates the memory of a training run on each device.

The bytes of the frozen and trained parameters and of the optimizer's state
follow from their shapes and shardings, and are exact. XLA gives the bytes of a
step's temporaries, which are mostly activations. It compiles the step for fake
CPU devices, or, with libtpu, for a TPU slice that this machine does not have.
Nothing runs.

The temporaries are an estimate, for two reasons. First, only two or three
shallow networks are compiled; the rest is extrapolated, because every further
layer adds the same amount (`depths`). Second, XLA's CPU compiler needs about
twice as much as the TPU's. It always compiles in float32, because for bfloat16
it would make float32 copies of the weights, which no accelerator does. For
eight v5e, the TPU's compiler needs 0.57 of the estimate for T5 1.1 base in
float32, and 0.49 for XXL in bfloat16 (0.43 for each further layer).

With REMAT alone, the CPU's compiler shows only a part of the savings, because a
late pass removes the recomputation of layers. On a TPU, REMAT reduces the
temporaries of four layers of width 256 from 334 MB to 145 MB. With REMAT and
SCAN, no pass can remove it: the layers of T5 1.1 XXL then need 3.3 GB instead
of 36 GB. With SCAN all layers are compiled, because this takes no longer.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from ptune.errors import UserError
from ptune.model import frozen_weights, parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.tools import tpu_compiler
from ptune.training import privacy as privacy_lib
from ptune.training import state as state_lib

# Replaces a mesh's memory if the TPU's compiler refuses a program because it
# needs more memory than a device has.
TOO_LARGE = 'no (by the compiler)'


@dataclasses.dataclass(frozen=True)
class Workload:
  """The settings that decide the memory of a training run; see `train`."""

  config: Config
  method: Method
  optimizer: Callable[..., optax.GradientTransformation]
  model: Callable[..., EncoderDecoderModel]
  feature_lengths: Mapping[str, int]
  batch_size: int
  microbatches: int = 1
  pack: int = 0
  decoding: Decoding = Decoding()
  train_steps: int = 1
  privacy: privacy_lib.Privacy | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device. Only `temporary` and `decoding` are estimates.

  Attributes:
    frozen: The frozen parameters.
    trainable: The trained parameters.
    optimizer: The optimizer's state.
    temporary: The further memory of a training step.
    decoding: The further memory of an evaluation that decodes; 0 if it was not
      estimated.
    seconds: The time of a step, as the TPU's compiler estimates it; see
      `tpu_compiler`.
  """

  frozen: int
  trainable: int
  optimizer: int
  temporary: int
  decoding: int = 0
  seconds: float | None = None

  @property
  def exact(self) -> int:
    return self.frozen + self.trainable + self.optimizer

  @property
  def total(self) -> int:
    return self.exact + max(self.temporary, self.decoding)


def fake_devices(count: int) -> Sequence[jax.Device]:
  """Returns `count` CPU devices."""
  try:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:
    pass  # JAX has started, and its number of devices cannot change.
  found = jax.devices('cpu')
  if len(found) < count:
    raise UserError(
      f'JAX was started with {len(found)} CPU devices, but {count} are needed;'
      f' set XLA_FLAGS=--xla_force_host_platform_device_count={count}'
    )
  return found[:count]


def measure(
  run: Workload,
  devices: Sequence[Any],
  extrapolate: bool = True,
  enough: Callable[[Memory], bool] = lambda memory: False,
  accelerator: str | None = None,
) -> dict[int, Memory | str]:
  """Computes the memory of every mesh of the devices.

  Args:
    run: The training run.
    devices: The devices, which may be fake.
    extrapolate: Whether to compile shallow networks only; see `depths`.
    enough: Called with the memory of a mesh; if it returns True, meshes that
      split the weights into more parts are not tried.
    accelerator: The type of TPU devices. For TPUs, the time of a step and the
      memory of decoding are estimated too.

  Returns:
    For each MODEL_PARALLEL, the memory, or why the mesh is not possible.
  """
  # These programs never run, so caching them would be of no use.
  jax.config.update('jax_enable_compilation_cache', False)
  one = partitioning.make_mesh(1, devices[:1])
  whole = parameters.plan(run.config, run.method, one)
  sizes = depths(run.config, run.method) if extrapolate else [_depth(run)]
  compiled = run.config
  if devices[0].platform == 'cpu':
    compiled = dataclasses.replace(run.config, dtype='float32')
  shallow = [
    parameters.plan(compiled.with_depth(*depth), run.method, one)
    for depth in sizes
  ]
  table: dict[int, Memory | str] = {}
  for parts in (m for m in range(1, len(devices) + 1) if len(devices) % m == 0):
    mesh = partitioning.make_mesh(parts, devices)
    rows = run.batch_size // run.microbatches
    if rows % mesh.shape['data'] or run.batch_size % run.microbatches:
      table[parts] = (
        f'BATCH_SIZE {run.batch_size} (MICROBATCHES {run.microbatches}) is not'
        f' divisible by {mesh.shape["data"]}'
      )
      continue
    try:
      found = [_measured(run, p.on(mesh), accelerator) for p in shallow]
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      table[parts] = TOO_LARGE
      continue
    temporary, decoding, seconds = (
      at_depth(_depth(run), sizes, values)
      for values in zip(*found, strict=True)
    )
    memory = memory_of(run, whole.on(mesh), int(temporary))
    memory = dataclasses.replace(
      memory, decoding=int(decoding), seconds=seconds or None
    )
    table[parts] = memory
    logging.info('%d x %d: done', *mesh.shape.values())
    if enough(memory):
      break
  return table


def _depth(run: Workload) -> tuple[int, int]:
  return run.config.num_encoder_layers, run.config.num_decoder_layers


def depths(config, method: Method) -> list[tuple[int, int]]:
  """The (encoder, decoder) depths to compile.

  The first and last layers of a network keep other arrays than the rest. From
  two layers on, each further layer adds the same amount. Encoder and decoder
  grow together if they are equally deep:

      (24, 24) -> (2, 2), (3, 3)
      (12, 4)  -> (2, 2), (3, 2), (2, 3)
      (3, 3)   -> (3, 3), itself

  With scan, it returns the whole depth: the program has the same size.
  """
  encoder, decoder = config.num_encoder_layers, config.num_decoder_layers
  # A method may name a layer by its number, so this layer must exist.
  named = any(re.search(r'layers_\d', p.site) for p in method.placements)
  if (
    config.scan
    or named
    or min(encoder, decoder) < 2
    or max(encoder, decoder) <= 3
  ):
    return [(encoder, decoder)]
  if encoder == decoder:
    return [(2, 2), (3, 3)]
  return [(2, 2), (3, 2), (2, 3)]


def at_depth(
  depth: tuple[int, int],
  sizes: Sequence[tuple[int, int]],
  values: Sequence[float],
) -> float:
  """Extrapolates values at the depths `sizes` linearly to another depth.

  (24, 24), [(2, 2), (3, 3)], [10, 14] -> 10 + 22 * 4
  """
  value = values[0]
  for other, at in zip(sizes[1:], values[1:], strict=True):
    steps = [
      (d - a) // (b - a)
      for d, a, b in zip(depth, sizes[0], other, strict=True)
      if a != b
    ]
    value += steps[0] * (at - values[0])
  return value


def state_of(run: Workload, plan: parameters.Plan) -> state_lib.TrainState:
  """The shapes and shardings of the train state."""
  return state_lib.abstract_state(run.optimizer(initial_step=0), plan)


def memory_of(run: Workload, plan: parameters.Plan, temporary: int) -> Memory:
  """The memory of one device between two steps, and what a step adds."""
  abstract = state_of(run, plan)
  return Memory(
    frozen=_bytes_on_one(frozen_weights.shapes(plan)),
    trainable=_bytes_on_one(abstract.trainable),
    optimizer=_bytes_on_one(abstract.opt_state),
    temporary=temporary,
  )


def _bytes_on_one(tree: Any) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _batch(
  run: Workload, plan: parameters.Plan
) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of the global batch of a step."""
  lengths = run.feature_lengths
  if run.pack:
    from ptune.data import packing  # Imports SeqIO.

    lengths = packing.room(run.method, lengths, run.pack)
  rows = NamedSharding(plan.mesh, PartitionSpec('data'))

  def tokens(feature):
    return jax.ShapeDtypeStruct(
      (run.batch_size, lengths[feature]), jnp.int32, sharding=rows
    )

  batch = {
    'encoder_input_tokens': tokens('inputs'),
    'decoder_input_tokens': tokens('targets'),
    'decoder_target_tokens': tokens('targets'),
    'decoder_loss_weights': tokens('targets'),
  }
  if run.pack:
    batch['encoder_segment_ids'] = tokens('inputs')
    batch['decoder_segment_ids'] = tokens('targets')
  return batch


def compile_step(run: Workload, plan: parameters.Plan) -> jax.stages.Compiled:
  """Compiles a step of training for the devices of a plan, from shapes."""
  model = run.model(plan.network)
  if run.pack:
    from ptune.data import packing

    model = packing.model_of(run.model, plan)
  private = None
  if run.privacy is not None:  # Any key will do, because nothing runs.
    private = privacy_lib.Private(run.privacy, np.zeros(2, np.uint32))
  # Outside of the scope, because an optimizer makes arrays, and the TPUs of the
  # scope do not exist.
  abstract = state_of(run, plan)
  update = state_lib.compile_step(
    model,
    run.optimizer(initial_step=0),
    plan,
    abstract,
    run.microbatches,
    private=private,
  )
  frozen = parameters.unflatten(frozen_weights.shapes(plan))
  options = {}
  if plan.mesh.devices.flat[0].platform == 'cpu':
    # Take the order of operations that needs the least memory, as on TPU and
    # GPU; the CPU's compiler prefers one with more concurrency. Do not optimise
    # machine code, because it never runs.
    options = {
      'xla_cpu_enable_concurrency_optimized_scheduler': False,
      'xla_backend_optimization_level': 0,
    }
  with plan.scope():
    return update.lower(abstract, frozen, _batch(run, plan)).compile(options)


def compile_decoding(
  run: Workload, plan: parameters.Plan, decoding: Decoding
) -> jax.stages.Compiled:
  """Compiles the prediction of a batch for the devices of a plan."""
  model = run.model(plan.network)
  frozen = parameters.unflatten(frozen_weights.shapes(plan))
  trainable = parameters.unflatten(plan.select(plan.trainable))

  def predict(trainable, frozen, tokens):
    params = parameters.merge(trainable, frozen)
    length = run.feature_lengths['targets']
    return model.predict(params, tokens, length, decoding, jax.random.key(0))

  tokens = _batch(run, plan)['encoder_input_tokens']
  with plan.scope():
    return jax.jit(predict).lower(trainable, frozen, tokens).compile()


def _measured(
  run: Workload, plan: parameters.Plan, accelerator: str | None
) -> tuple[int, int, float]:
  """The bytes that a step adds to the state on one device, and its time.

  Returns:
    The temporaries of a step and of decoding in bytes, and the estimated
    seconds of a step. For devices other than TPUs, the last two are 0.
  """
  program = compile_step(run, plan)
  # The batch also exists only during the step.
  batch = _bytes_on_one(_batch(run, plan))
  temporary = program.memory_analysis().temp_size_in_bytes + batch
  if plan.mesh.devices.flat[0].platform != 'tpu' or accelerator is None:
    return temporary, 0, 0.0
  seconds = tpu_compiler.estimate(program.as_text(), accelerator).seconds(
    accelerator
  )
  decoding = compile_decoding(run, plan, run.decoding).memory_analysis()
  return temporary, decoding.temp_size_in_bytes + batch, seconds
