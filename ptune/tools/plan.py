"""`ptune plan`: what a training run would hold on each device.

    ptune plan --devices=8 --accelerator=v5e --gin_file=models/mt5_xxl.gin ...

takes the flags of `ptune train`, builds nothing and reads no data. For every
mesh it gives the bytes of the frozen and trained parameters and of the
optimizer's state, from their shapes and shardings, which are exact; and those
of a step's temporaries (activations, above all), from XLA, which compiles the
step for as many fake CPU devices.

The temporaries are an estimate. First, only two or three shallow networks are
compiled, and the rest follows, since every further layer adds as much
(`_depths`). Second, XLA's CPU compiler needs about twice what the TPU's does.
It is given float32 also for a run in bfloat16, since it would make float32
copies of bfloat16 weights, which no accelerator does. Measured against the
TPU's compiler, for eight v5e: 0.57 of the estimate for T5 1.1 base in float32,
0.49 for XXL in bfloat16 (0.43 a further layer). So a mesh that fits by the
estimate fits; one that does not may, if it would with a part of it (`CERTAIN`).
With REMAT alone the CPU's compiler shows little of what the TPU's saves: it
forgets that layers are to be computed again late. Of four layers 256 wide, 334
MB of temporaries became 145 MB by the TPU's. With REMAT and SCAN it cannot: the
layers of T5 1.1 XXL then take 3.3 GB in place of 36. All layers are compiled
then, as that takes no longer.
Evaluation is not counted: with beams, decoding needs room for its cache.

If libtpu is installed (`pip install 'jax[tpu]'`; no TPU is needed) and
--accelerator is a TPU, the TPU's own compiler is asked instead. It takes
minutes a mesh, so that the first mesh that fits ends the search. It counts
decoding too, and estimates the time of a step; see `tpu_compiler` for what that
leaves out.
--compiler=cpu asks XLA's CPU compiler all the same.
"""

import copy
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from ptune.errors import UserError
from ptune.host.columns import aligned
from ptune.model import parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.tools import tpu_compiler
from ptune.training import state as state_lib

GIB = 2**30

# Memory of one device in bytes: of a chip, or of a GPU as CUDA counts it.
ACCELERATORS: Mapping[str, int] = {
  'v4': 32 * GIB,
  'v5e': 16 * GIB,
  'v5p': 95 * GIB,
  'v6e': 32 * GIB,
  'v7x': 192 * GIB,
  'a100-40': int(39.4 * GIB),
  'a100-80': int(79.2 * GIB),
  'h100': int(79.2 * GIB),
  'h200': int(139.8 * GIB),
}
# Left to the runtime, the compiled programs and gaps between arrays.
USABLE = 0.92
# The part of the estimated temporaries that is surely needed; see above.
CERTAIN = 0.3

# What makes room: fields of the configuration, each with a macro of its name.
# REMAT with SCAN, since the CPU's compiler shows what it saves in a loop only.
_AGAIN = {'remat': True, 'scan': True}
OPTIONS = (_AGAIN, {'fsdp': True}, {**_AGAIN, 'fsdp': True})


@dataclasses.dataclass(frozen=True)
class Run:
  """What decides the memory of a training run; see `train`."""

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


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device. Only `temporary` and `decoding` are estimates.

  Attributes:
    frozen: Of frozen parameters.
    trainable: Of trained ones.
    optimizer: Of the optimizer's state.
    temporary: Of what a step needs beside them.
    decoding: Of what an evaluation that decodes needs beside them; 0 if that
      was not asked for.
    seconds: Of a step, as the TPU's compiler estimates; see `tpu_compiler`.
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


def plan(
  devices: int, accelerator: str | None = None, compiler: str | None = None
) -> int | None:
  """Prints the table for the run that gin describes.

  Args:
    devices: Devices of the run.
    accelerator: A name in `ACCELERATORS`; None compares with all.
    compiler: 'cpu', or 'tpu' for the TPU's own; if not given, the latter for a
      slice of TPUs if libtpu is installed.

  Returns:
    MODEL_PARALLEL of the mesh that fits best, None if there is none. Without
    an accelerator, of the mesh that needs the least memory.

  Raises:
    ValueError: If an argument is unknown, or no mesh is possible.
  """
  if accelerator is not None and accelerator not in ACCELERATORS:
    raise UserError(
      f'--accelerator is {accelerator!r}; it must be one of'
      f' {list(ACCELERATORS)}'
    )
  if devices < 1:
    raise UserError(f'--devices is {devices}; it must be at least 1')
  if compiler is None:
    chip = tpu_compiler.CHIPS.get(accelerator or '')
    known = chip is not None and devices in chip.topologies
    compiler = 'tpu' if known and tpu_compiler.available() else 'cpu'
  exact = compiler == 'tpu'
  if exact:
    chips = tpu_compiler.devices(accelerator or '', devices)
  else:
    chips = _fake_devices(devices)
  run = _run_of_gin()
  # A mesh takes the TPU's compiler minutes: the first that fits is enough.
  enough = lambda memory: exact and verdict(memory, accelerator, True) == 'yes'
  table = measure(run, chips, enough=enough, accelerator=accelerator)
  text, best = describe(run, table, accelerator, exact)
  print(text)
  if exact and best is not None:
    print(describe_time(run, table[best], accelerator, devices))
  if best is None and accelerator:
    print(suggest(run, chips, accelerator, exact))
  return best


def suggest(
  run: Run, devices: Sequence[Any], accelerator: str, exact: bool = False
) -> str:
  """What each of `OPTIONS` that the run does not have would do: text."""
  lines, seen = [], {run.config}
  for option in OPTIONS:
    config = dataclasses.replace(run.config, **option)
    if config in seen:
      continue
    seen.add(config)
    table = measure(
      dataclasses.replace(run, config=config),
      devices,
      enough=lambda memory: verdict(memory, accelerator, exact) == 'yes',
      accelerator=accelerator,
    )
    possible = {m: x for m, x in table.items() if isinstance(x, Memory)}
    flags = ' '.join(
      f'--gin.{name.upper()}=True'
      for name in option
      if not getattr(run.config, name)
    )
    lines.append(f'with {flags}: {_best(possible, accelerator, exact)[1]}')
  return '\n'.join(lines)


def _run_of_gin() -> Run:
  """The settings of `train.train`: what gin binds, and its own defaults."""
  import gin
  from ptune import train  # Imports SeqIO, which a plan does not use.
  from ptune.training import settings

  programs = (train.train, settings.Data)
  defaults = {
    name: p.default
    for program in programs
    for name, p in inspect.signature(program).parameters.items()
  }
  # The schedule of the learning rate reads it; no memory depends on it.
  if 'TRAIN_STEPS =' not in gin.config_str():
    with gin.unlock_config():
      gin.parse_config('TRAIN_STEPS = 1')
  bound: dict[str, Any] = {}
  for program in programs:
    bound |= gin.get_bindings(program, resolve_references=False)
  evaluation = gin.get_bindings(settings.Evaluation, resolve_references=False)
  defaults['decoding'] = evaluation.get('decoding', Decoding())
  values = {}
  for field in dataclasses.fields(Run):
    value = bound.get(field.name, defaults[field.name])
    # Gin evaluates a reference when it is copied. The others stay as they
    # are: a plan needs no MODEL_DIR.
    try:
      values[field.name] = copy.deepcopy(value)
    except (TypeError, ValueError) as error:  # Of a macro that is not set.
      raise _not_set(field.name) from error
    if value is inspect.Parameter.empty:
      raise _not_set(field.name)
  return Run(**values)


def _not_set(name: str) -> ValueError:
  return UserError(
    f'{name} of the run is not set; a plan needs what `ptune train` does, but'
    ' no MODEL_DIR, task or checkpoint: a file of models/, one of methods/ or'
    ' prompts/, --gin_file=runs/train.gin, and'
    " --gin.TASK_FEATURE_LENGTHS=\"{'inputs': 512, 'targets': 16}\""
  )


def _fake_devices(count: int) -> Sequence[jax.Device]:
  """CPU devices, as many as asked for."""
  try:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:
    pass  # JAX has started: it has the devices that it has.
  found = jax.devices('cpu')
  if len(found) < count:
    raise UserError(
      f'JAX was started with {len(found)} CPU devices, and {count} are needed;'
      f' set XLA_FLAGS=--xla_force_host_platform_device_count={count}'
    )
  return found[:count]


# ------------------------------------------------------------------ measuring


def measure(
  run: Run,
  devices: Sequence[Any],
  extrapolate: bool = True,
  enough: Callable[[Memory], bool] = lambda memory: False,
  accelerator: str | None = None,
) -> dict[int, Memory | str]:
  """Works out the memory of every mesh of the devices.

  Args:
    run: The training run.
    devices: The devices, which may be fake.
    extrapolate: Compile shallow networks only, see `_depths`.
    enough: Whether no mesh of more parts than that of this memory is asked for.
    accelerator: What TPU devices are; with them, a step's time and decoding are
      asked for too.

  Returns:
    By MODEL_PARALLEL: the memory, or why the mesh is not possible.
  """
  # What is compiled here is not run; a cache of it would be of no use.
  jax.config.update('jax_enable_compilation_cache', False)
  one = partitioning.make_mesh(1, devices[:1])
  whole = parameters.plan(run.config, run.method, one)
  depths = _depths(run.config, run.method) if extrapolate else [_depth(run)]
  compiled = run.config
  if devices[0].platform == 'cpu':
    compiled = dataclasses.replace(run.config, dtype='float32')
  shallow = [
    parameters.plan(compiled.with_depth(*depth), run.method, one)
    for depth in depths
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
    found = [_measured(run, p.on(mesh), accelerator) for p in shallow]
    temporary, decoding, seconds = (
      _at_depth(_depth(run), depths, values)
      for values in zip(*found, strict=True)
    )
    memory = _held(run, whole.on(mesh), int(temporary))
    memory = dataclasses.replace(
      memory, decoding=int(decoding), seconds=seconds or None
    )
    table[parts] = memory
    logging.info('%d x %d: done', *mesh.shape.values())
    if enough(memory):
      break
  return table


def _depth(run: Run) -> tuple[int, int]:
  return run.config.num_encoder_layers, run.config.num_decoder_layers


def _depths(config, method: Method) -> list[tuple[int, int]]:
  """The (encoder, decoder) depths that are compiled.

  The first and last layers of a network differ from the others in what they
  keep. From two layers on, each further one adds the same. Encoder and decoder
  grow together where they are equally deep:

      (24, 24) -> (2, 2), (3, 3)
      (12, 4)  -> (2, 2), (3, 2), (2, 3)
      (3, 3)   -> (3, 3), itself

  With scan, all of them: it is one program in any case.
  """
  encoder, decoder = config.num_encoder_layers, config.num_decoder_layers
  # A method may name a layer by its number, which must then be there.
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


def _at_depth(
  depth: tuple[int, int],
  depths: Sequence[tuple[int, int]],
  values: Sequence[float],
) -> float:
  """Continues values, known at `depths`, linearly to another depth.

  (24, 24), [(2, 2), (3, 3)], [10, 14] -> 10 + 22 * 4
  """
  value = values[0]
  for other, at in zip(depths[1:], values[1:], strict=True):
    steps = [
      (d - a) // (b - a)
      for d, a, b in zip(depth, depths[0], other, strict=True)
      if a != b
    ]
    value += steps[0] * (at - values[0])
  return value


def _held(run: Run, plan: parameters.Plan, temporary: int) -> Memory:
  """What lies on one device between two steps, and what a step adds."""
  tx = run.optimizer(initial_step=0)
  like = state_lib.abstract_state(tx, plan)
  return Memory(
    frozen=_bytes_on_one(parameters.frozen_shapes(plan)),
    trainable=_bytes_on_one(like.trainable),
    optimizer=_bytes_on_one(like.opt_state),
    temporary=temporary,
  )


def _bytes_on_one(tree: Any) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _batch(run: Run, plan: parameters.Plan) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the global batch of a step."""
  lengths = run.feature_lengths
  if run.pack:
    from ptune.data import packing  # With it comes SeqIO.

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


def compile_step(run: Run, plan: parameters.Plan) -> jax.stages.Compiled:
  """Compiles a step of training for the devices of a plan, from shapes."""
  tx = run.optimizer(initial_step=0)
  like = state_lib.abstract_state(tx, plan)
  model = run.model(plan.network)
  if run.pack:
    from ptune.data import packing

    model = packing.model_of(run.model, plan)
  update = state_lib.compile_step(model, tx, plan, like, run.microbatches)
  frozen = parameters.unflatten(parameters.frozen_shapes(plan))
  options = {}
  if plan.mesh.devices.flat[0].platform == 'cpu':
    # The order that needs the least memory, as on TPU and GPU; by default the
    # CPU's compiler prefers one with more to do at the same time.
    # Nor does the machine code matter, which is never run.
    options = {
      'xla_cpu_enable_concurrency_optimized_scheduler': False,
      'xla_backend_optimization_level': 0,
    }
  with plan.scope():
    return update.lower(like, frozen, _batch(run, plan)).compile(options)


def compile_decoding(
  run: Run, plan: parameters.Plan, how: Decoding
) -> jax.stages.Compiled:
  """Compiles the prediction of a batch for the devices of a plan."""
  model = run.model(plan.network)
  frozen = parameters.unflatten(parameters.frozen_shapes(plan))
  trainable = parameters.unflatten(plan.select(plan.trainable))

  def predict(trainable, frozen, tokens):
    params = parameters.merge(trainable, frozen)
    length = run.feature_lengths['targets']
    return model.predict(params, tokens, length, how, jax.random.key(0))

  tokens = _batch(run, plan)['encoder_input_tokens']
  with plan.scope():
    return jax.jit(predict).lower(trainable, frozen, tokens).compile()


def _measured(
  run: Run, plan: parameters.Plan, accelerator: str | None
) -> tuple[int, int, float]:
  """Bytes on one device beside the state, and a step's time.

  Returns:
    Temporaries of a step and of decoding, and the estimated seconds of a step;
    of devices that are no TPUs, the last two are 0.
  """
  program = compile_step(run, plan)
  # The batch, too, is there only for the step.
  batch = _bytes_on_one(_batch(run, plan))
  temporary = program.memory_analysis().temp_size_in_bytes + batch
  if plan.mesh.devices.flat[0].platform != 'tpu' or accelerator is None:
    return temporary, 0, 0.0
  seconds = tpu_compiler.estimate(program.as_text(), accelerator).seconds(
    accelerator
  )
  decoding = compile_decoding(run, plan, run.decoding).memory_analysis()
  return temporary, decoding.temp_size_in_bytes + batch, seconds


# ----------------------------------------------------------------- describing


def verdict(memory: Memory, accelerator: str, exact: bool = False) -> str:
  """'yes', 'no', or 'perhaps' where the estimate of temporaries decides."""
  usable = USABLE * ACCELERATORS[accelerator]
  if memory.total <= usable:
    return 'yes'
  least = memory.exact + CERTAIN * memory.temporary
  return 'no' if exact or least > usable else 'perhaps'


def describe(
  run: Run,
  table: Mapping[int, Memory | str],
  accelerator: str | None,
  exact: bool = False,
) -> tuple[str, int | None]:
  """The table as text, and MODEL_PARALLEL of the mesh that fits best.

  The best is the one that fits with the fewest parts: prompt tuning has next
  to nothing to exchange along `data`, but two sums a layer along `model`.

  Raises:
    ValueError: If no mesh is possible.
  """
  possible = {m: x for m, x in table.items() if isinstance(x, Memory)}
  if not possible:
    raise UserError('\n'.join(str(why) for why in table.values()))
  devices = max(table)
  names = [accelerator] if accelerator else list(ACCELERATORS)
  head = [
    'data x model',
    'frozen',
    'trained',
    'optimizer',
    'temporary',
    *(['decoding'] if exact else []),
    'total',
    f'fits {accelerator}' if accelerator else 'fits',
  ]
  lines = [head]
  for parts, memory in table.items():
    mesh = f'{devices // parts} x {parts}'
    if isinstance(memory, str):
      lines.append([mesh, *[''] * (len(head) - 2), memory])
      continue
    verdicts = {n: verdict(memory, n, exact) for n in names}
    answer = ', '.join(n for n, v in verdicts.items() if v == 'yes')
    numbers = (
      memory.frozen,
      memory.trainable,
      memory.optimizer,
      memory.temporary,
      *([memory.decoding] if exact else []),
      memory.total,
    )
    lines.append(
      [
        mesh,
        *(parameters.format_bytes(n) for n in numbers),
        verdicts[accelerator] if accelerator else answer or 'none',
      ]
    )
  rows = aligned(lines, right=range(len(head) - 1))
  best, closing = _best(possible, accelerator, exact)
  if accelerator and best is None:
    bfloat16 = ' --gin.DTYPE="\'bfloat16\'",'
    closing += (
      f' Take more devices,{bfloat16 * (run.config.dtype == "float32")} or'
      ' MICROBATCHES (halves temporaries).'
    )
  lengths = ', '.join(f'{v} {k}' for k, v in run.feature_lengths.items())
  encoder, decoder = _depth(run)
  parts = f', in {run.microbatches} parts' if run.microbatches > 1 else ''
  parts += f', {run.pack} of the longest a row' if run.pack else ''
  text = [
    f'{run.method.name}, {encoder} + {decoder} layers of'
    f' {run.config.emb_dim}, {run.config.dtype}; a batch of {run.batch_size}'
    f' with {lengths}{parts}; bytes on each of {devices} devices:',
    '',
    *rows,
    '',
    closing,
  ]
  depths = _depths(run.config, run.method)
  if depths != [(encoder, decoder)]:
    text.append(
      'temporary: continued linearly from networks of '
      + ', '.join(f'{e} + {d}' for e, d in depths)
      + ' layers.'
    )
  if not exact:
    text.append(
      "temporary: by XLA's CPU compiler, which needs about twice what the TPU's"
      ' does (perhaps: would fit with less); the rest is exact.'
    )
  if accelerator and accelerator[0] in 'ah':
    text.append(
      'JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says'
      f' otherwise; the table counts with {USABLE}.'
    )
  return '\n'.join(text), best


def describe_time(
  run: Run, memory: Memory | str, accelerator: str | None, devices: int
) -> str:
  """The estimated time of a step and of the run, as text; '' if not known."""
  if not isinstance(memory, Memory) or not memory.seconds or not accelerator:
    return ''
  lengths = run.feature_lengths
  tokens = run.batch_size * (lengths['inputs'] + lengths['targets'])
  hours = run.train_steps * memory.seconds * devices / 3600
  return (
    f'a step: {1000 * memory.seconds:,.0f} ms,'
    f' {tokens / memory.seconds:,.0f} tokens a second;'
    f' {run.train_steps:,} steps: {hours:,.2f} chip-hours of {accelerator}.\n'
    "This is the compiler's estimate, not a measurement: waits for memory and"
    ' collectives are not in it, nor are evaluations. Every row is counted with'
    ' the longest inputs and targets.'
  )


def _best(
  possible: Mapping[int, Memory], accelerator: str | None, exact: bool
) -> tuple[int | None, str]:
  """The mesh to take, and a line that says so."""
  if accelerator is None:
    least = min(possible, key=lambda m: possible[m].total)
    return least, (
      f'MODEL_PARALLEL = {least} needs the least memory; name an --accelerator'
      ' for the mesh that fits it best.'
    )
  size = parameters.format_bytes(ACCELERATORS[accelerator])
  for wanted in ('yes', 'perhaps'):
    for parts, memory in sorted(possible.items()):
      if verdict(memory, accelerator, exact) == wanted:
        word = {'yes': 'fits', 'perhaps': 'may fit'}[wanted]
        needed = parameters.format_bytes(memory.total)
        return parts, (
          f'best: --gin.MODEL_PARALLEL={parts}, the least split mesh that'
          f' {word} {accelerator} ({needed} of {size}).'
        )
  return None, f'no mesh fits {accelerator} ({size}).'
