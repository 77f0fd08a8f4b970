"""Estimates a step with the TPU's own compiler; needs no TPU.

    python -m benchmarks.tpu --size=t5_1_1_large --chip=v5e
    python -m benchmarks.tpu --size=t5_1_1_xl --chip=v6e --devices=8 \
      --model_parallel=4
    python -m benchmarks.tpu --decode --beams=4 --targets=64

It needs libtpu: `pip install 'jax[tpu]'`. It compiles a network with --layers
layers of full width, and multiplies their cost. With --continued, it also
compiles one more layer, and extrapolates linearly. This takes twice as long,
counts the work of only the first or last layer once, and gives the temporaries
of all layers. Nothing runs: all times are the compiler's estimates.
`ptune.tools.tpu_compiler` lists what they leave out.

All figures are for one device: a chip, or half a v7x. For each part of the
network, `parts` has the FLOP of its matrix products, its bytes from and to HBM,
its time, and its products' share of the device's peak in this time. The `share`
of the whole counts FLOP as papers do (`peers.analytic_flops`), so computing
something twice does not raise it.
"""

import argparse
import dataclasses
import json
import tempfile
import time

import jax

from benchmarks import peers
from ptune.errors import UserError
from ptune.methods import prompt
from ptune.model import parameters, partitioning, sizes
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.tools import memory, tpu_compiler
from ptune.training import optim


def compiled(
  args: argparse.Namespace, whole: sizes.T5Config, layers: int
) -> jax.stages.Compiled:
  """Compiles a network with as many encoder and decoder layers."""
  config = dataclasses.replace(
    whole.with_depth(layers, layers),
    dropout_rate=args.dropout_rate,
    dtype=args.dtype,
    frozen_dtype=args.frozen_dtype,
    fused_attention=False if args.plain_attention else None,
    remat=args.remat,
    scan=args.scan,
    fsdp=args.fsdp,
  )
  devices = tpu_compiler.devices(args.chip, args.devices)
  mesh = partitioning.make_mesh(args.model_parallel, devices)
  plan = parameters.plan(config, prompt.prompt(args.prompt_length), mesh)
  run = memory.Workload(
    config=config,
    method=plan.method,
    optimizer=optim.adafactor,
    model=EncoderDecoderModel,
    feature_lengths={'inputs': args.inputs, 'targets': args.targets},
    batch_size=args.batch,
    pack=0,
  )
  if args.decode:
    return memory.compile_decoding(run, plan, Decoding(args.beams))
  return memory.compile_step(run, plan)


def measure(args: argparse.Namespace, schedules: str) -> dict[str, object]:
  """Compiles and estimates; returns the results to print."""
  whole = peers.SIZES[args.size]
  if not isinstance(whole, sizes.T5Config):
    raise UserError(f'--size={args.size} is no T5, and FLOP are counted for T5')
  depth = whole.num_encoder_layers
  layers = min(args.layers, depth - args.continued)
  if layers < 1:
    raise UserError(f'--layers is {args.layers}; it must be at least 1')
  start = time.perf_counter()
  programs = [
    compiled(args, whole, layers + more) for more in range(1 + args.continued)
  ]
  seconds = time.perf_counter() - start
  estimates = [
    tpu_compiler.estimate(program.as_text(), args.chip, schedules)
    for program in programs
  ]
  allocated = [program.memory_analysis() for program in programs]
  temporary = [found.temp_size_in_bytes for found in allocated]
  if args.continued:
    estimate = estimates[0].continued(estimates[1], depth - layers)
    temporary[0] += (depth - layers) * (temporary[1] - temporary[0])
  else:
    estimate = estimates[0].deepened(depth / layers)
  if args.hlo:
    with open(args.hlo, 'w') as file:
      file.write(programs[0].as_text())
  chip, step = tpu_compiler.CHIPS[args.chip], estimate.seconds(args.chip)
  result = {
    'estimated_ms': round(1e3 * step, 1),
    'whole': _described(estimate.total, args.chip),
    'temporary_megabytes': round(temporary[0] / 1e6),
    'aliased_bytes': allocated[0].alias_size_in_bytes,
    'parts': {
      name: _described(cost, args.chip)
      for name, cost in sorted(estimate.parts.items())
    },
    'collectives': estimate.collectives,
    'kernels': estimate.kernels,
    'kernels_scheduled': estimate.scheduled,
    'compile_seconds': round(seconds, 1),
    'note': 'estimates of the compiler, not measured; see the module',
  }
  if not args.decode:
    flops = peers.analytic_flops(args) / args.devices
    result['model_tflops'] = round(flops / 1e12, 2)
    result['share'] = round(flops / step / chip.flops, 3)
  return result


def _described(cost: tpu_compiler.Cost, name: str) -> dict[str, float]:
  """Returns the cost of a part on a chip of this name."""
  chip, seconds = tpu_compiler.CHIPS[name], cost.seconds(name)
  return {
    'ms': round(1e3 * seconds, 2),
    'kernels_ms': round(1e3 * cost.kernel_cycles / chip.clock, 2),
    'gflops': round(cost.flops / 1e9, 1),
    'hbm_gigabytes': round(cost.bytes / 1e9, 2),
    'share': round(cost.flops / seconds / chip.flops, 3) if seconds else 0.0,
  }


def main() -> None:
  parser = peers.parser(
    __doc__, size='t5_1_1_large', batch=32, inputs=512, dtype='bfloat16'
  )
  parser.add_argument('--chip', choices=tpu_compiler.CHIPS, default='v5e')
  parser.add_argument('--devices', type=int, default=1)
  parser.add_argument('--model_parallel', type=int, default=1)
  parser.add_argument('--layers', type=int, default=2)
  parser.add_argument('--dropout_rate', type=float, default=0.1)
  for name in ('continued', 'scan', 'fsdp', 'plain_attention', 'decode'):
    parser.add_argument(f'--{name}', action='store_true')
  parser.add_argument('--beams', type=int, default=1)
  parser.add_argument('--hlo', help='a file for the compiled program')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as schedules:
    tpu_compiler.dump_bundles(schedules)
    try:
      result = measure(args, schedules)
    except UserError as error:  # No libtpu, or no such slice.
      raise SystemExit(str(error)) from None
  about = {'jax': jax.__version__}
  print(json.dumps({**vars(args), **about, **result}))


if __name__ == '__main__':
  main()
