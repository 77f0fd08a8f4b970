"""`ptune plan`: estimates the memory of each device in a training run.

    ptune plan --devices=8 --accelerator=v5e --gin_file=models/mt5_xxl.gin ...

It takes the flags of `ptune train`, builds nothing and reads no data. For every
mesh it prints the bytes on each device, which `memory` estimates, and whether
they fit.

XLA's CPU compiler needs about twice the temporaries that a TPU's does. So a
mesh that fits by its estimate does fit. The verdict is 'perhaps' for a mesh
that would fit with a part of the estimate (`CERTAIN`). Evaluation is not
counted: with beams, decoding needs room for its cache.

If libtpu is installed (`pip install 'jax[tpu]'`; no TPU is needed) and
--accelerator is a TPU, plan uses the TPU's own compiler instead. This takes
minutes for each mesh, so plan stops at the first mesh that fits. It then counts
decoding too, and estimates the time of a step; `tpu_compiler` says what this
estimate leaves out. --compiler=cpu uses XLA's CPU compiler even then.
"""

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ptune.errors import UserError
from ptune.host.columns import aligned
from ptune.model import model_info
from ptune.model.models import Decoding
from ptune.tools import tpu_compiler
from ptune.tools.memory import (
  TOO_LARGE,
  Memory,
  Workload,
  depths,
  fake_devices,
  measure,
)

GIB = 2**30

# The memory of one device in bytes. For a v7x it is half a chip, because JAX
# sees each chip as two devices. For GPUs it is the memory that CUDA reports.
ACCELERATORS: Mapping[str, int] = {
  'v4': 32 * GIB,
  'v5e': 16 * GIB,
  'v5p': 95 * GIB,
  'v6e': 32 * GIB,
  'v7x': 96 * GIB,
  'a100-40': int(39.4 * GIB),
  'a100-80': int(79.2 * GIB),
  'h100': int(79.2 * GIB),
  'h200': int(139.8 * GIB),
}
# The usable share: the runtime, the compiled programs and gaps between arrays
# take the rest.
USABLE = 0.92
# The share of the estimated temporaries that is certainly needed; see above.
CERTAIN = 0.3

# The options that save memory: fields of the configuration, each with a macro
# of its name. REMAT comes with SCAN, because the CPU's compiler shows its
# savings only in a loop.
_AGAIN = {'remat': True, 'scan': True}
OPTIONS = (_AGAIN, {'fsdp': True}, {**_AGAIN, 'fsdp': True})


def plan(
  devices: int, accelerator: str | None = None, compiler: str | None = None
) -> int | None:
  """Prints the table for the run that gin describes.

  Args:
    devices: The number of devices of the run.
    accelerator: A name in `ACCELERATORS`; None compares with all of them.
    compiler: 'cpu', or 'tpu' for the TPU's own compiler. The default is 'tpu'
      if the devices are a TPU slice and libtpu is installed, else 'cpu'.

  Returns:
    MODEL_PARALLEL of the mesh that fits best; None if no mesh fits. Without an
    accelerator, it is that of the mesh that needs the least memory.

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
  if exact and accelerator not in tpu_compiler.CHIPS:
    raise UserError(
      f'--compiler=tpu needs a TPU as --accelerator: one of'
      f' {list(tpu_compiler.CHIPS)}; got {accelerator!r}'
    )
  if exact:
    chips = tpu_compiler.devices(accelerator or '', devices)
  else:
    chips = fake_devices(devices)
  run = _run_of_gin()
  # The TPU's compiler takes minutes for a mesh, so stop at the first that fits.
  enough = lambda memory: exact and verdict(memory, accelerator, True) == 'yes'
  table = measure(run, chips, enough=enough, accelerator=accelerator)
  text, best = describe(run, table, devices, accelerator, exact)
  print(text)
  if exact and best is not None:
    print(describe_time(run, table[best], accelerator, devices))
  if best is None and accelerator:
    print(suggest(run, chips, accelerator, exact))
  return best


def suggest(
  run: Workload, devices: Sequence[Any], accelerator: str, exact: bool = False
) -> str:
  """Text that says what each of `OPTIONS` would save, if the run lacks it."""
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


def _run_of_gin() -> Workload:
  """The settings of `train.train`: gin's bindings, and its own defaults."""
  import gin
  from ptune import train  # Imports SeqIO, which a plan does not use.
  from ptune.training import settings

  programs = (train.train, settings.Data)
  defaults = {
    name: p.default
    for program in programs
    for name, p in inspect.signature(program).parameters.items()
  }
  # The learning rate's schedule needs a value, but no memory depends on it.
  if 'TRAIN_STEPS =' not in gin.config_str():
    with gin.unlock_config():
      gin.parse_config('TRAIN_STEPS = 1')
  bound: dict[str, Any] = {}
  for program in programs:
    bound |= gin.get_bindings(program, resolve_references=False)
  evaluation = gin.get_bindings(settings.Evaluation, resolve_references=False)
  defaults['decoding'] = evaluation.get('decoding', Decoding())
  values = {}
  for field in dataclasses.fields(Workload):
    value = bound.get(field.name, defaults[field.name])
    # Gin evaluates a reference when it is copied. We copy only these fields,
    # because a plan needs no MODEL_DIR.
    try:
      values[field.name] = copy.deepcopy(value)
    except (TypeError, ValueError) as error:  # A macro is not set.
      raise _not_set(field.name) from error
    if value is inspect.Parameter.empty:
      raise _not_set(field.name)
  return Workload(**values)


def _not_set(name: str) -> ValueError:
  return UserError(
    f'{name} of the run is not set; a plan needs the settings of `ptune train`,'
    ' but no MODEL_DIR, task or checkpoint: a file of models/, one of methods/'
    ' or prompts/, --gin_file=runs/train.gin, and'
    " --gin.TASK_FEATURE_LENGTHS=\"{'inputs': 512, 'targets': 16}\""
  )


# ----------------------------------------------------------------- describing


def verdict(memory: Memory, accelerator: str, exact: bool = False) -> str:
  """'yes', 'no', or 'perhaps' if it depends on the error of the estimate."""
  usable = USABLE * ACCELERATORS[accelerator]
  if memory.total <= usable:
    return 'yes'
  least = memory.exact + CERTAIN * memory.temporary
  return 'no' if exact or least > usable else 'perhaps'


def describe(
  run: Workload,
  table: Mapping[int, Memory | str],
  devices: int,
  accelerator: str | None,
  exact: bool = False,
) -> tuple[str, int | None]:
  """Returns the table as text, and MODEL_PARALLEL of the mesh that fits best.

  The best mesh is the one that fits with the fewest parts, because prompt
  tuning exchanges almost nothing along `data`, but two sums in each layer along
  `model`.

  Raises:
    ValueError: If no mesh is possible.
  """
  possible = {m: x for m, x in table.items() if isinstance(x, Memory)}
  if not possible and TOO_LARGE not in table.values():
    raise UserError('\n'.join(str(why) for why in table.values()))
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
        *(model_info.format_bytes(n) for n in numbers),
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
  whole = run.config.num_encoder_layers, run.config.num_decoder_layers
  # There is one width, unless encoder and decoder differ.
  widths = dict.fromkeys(run.config.axis_sizes()['embed'])
  parts = f', in {run.microbatches} parts' if run.microbatches > 1 else ''
  parts += f', {run.pack} of the longest a row' if run.pack else ''
  text = [
    f'{run.method.name}, {whole[0]} + {whole[1]} layers of'
    f' {" + ".join(map(str, widths))}, {run.config.dtype}; a batch of'
    f' {run.batch_size}'
    f' with {lengths}{parts}; bytes on each of {devices} devices:',
    '',
    *rows,
    '',
    closing,
  ]
  compiled = depths(run.config, run.method)
  if compiled != [whole]:
    text.append(
      'temporary: extrapolated linearly from networks of '
      + ', '.join(f'{e} + {d}' for e, d in compiled)
      + ' layers.'
    )
  if not exact:
    text.append(
      "temporary: estimated by XLA's CPU compiler, which needs about twice as"
      " much as the TPU's (perhaps: it fits if less is needed); the rest is"
      ' exact.'
    )
  if accelerator and accelerator[0] in 'ah':
    text.append(
      'JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says'
      f' otherwise; the table assumes {USABLE}.'
    )
  return '\n'.join(text), best


def describe_time(
  run: Workload, memory: Memory | str, accelerator: str | None, devices: int
) -> str:
  """The estimated time of a step and of the run, as text; '' if not known."""
  if not isinstance(memory, Memory) or not memory.seconds or not accelerator:
    return ''
  lengths = run.feature_lengths
  tokens = run.batch_size * (lengths['inputs'] + lengths['targets'])
  chip = tpu_compiler.CHIPS[accelerator]
  chips = devices / chip.per_chip
  hours = run.train_steps * memory.seconds * chips / 3600
  ms = 1000 * memory.seconds
  step = f'{ms:,.0f}' if ms >= 10 else f'{ms:.2g}'
  return (
    f'a step: {step} ms,'
    f' {tokens / memory.seconds:,.0f} tokens a second;'
    f' {run.train_steps:,} steps: {hours:,.2f} chip-hours of {accelerator}.\n'
    "This is the compiler's estimate, not a measurement. It leaves out waits"
    ' for memory and collectives, and evaluations. It counts every row with the'
    ' longest inputs and targets.'
    + f' The clock of {accelerator} is assumed.'
    * chip.assumed_clock
  )


def _best(
  possible: Mapping[int, Memory], accelerator: str | None, exact: bool
) -> tuple[int | None, str]:
  """The best mesh, and a line of text that says so."""
  if accelerator is None:
    least = min(possible, key=lambda m: possible[m].total)
    return least, (
      f'MODEL_PARALLEL = {least} needs the least memory; name an --accelerator'
      ' to get the best mesh for it.'
    )
  size = model_info.format_bytes(ACCELERATORS[accelerator])
  for wanted in ('yes', 'perhaps'):
    for parts, memory in sorted(possible.items()):
      if verdict(memory, accelerator, exact) == wanted:
        word = {'yes': 'fits', 'perhaps': 'may fit'}[wanted]
        needed = model_info.format_bytes(memory.total)
        return parts, (
          f'best: --gin.MODEL_PARALLEL={parts}, the mesh with the fewest parts'
          f' that {word} {accelerator} ({needed} of {size}).'
        )
  return None, f'no mesh fits {accelerator} ({size}).'
