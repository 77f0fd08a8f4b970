"""Measures one training step of prompt tuning; prints one line of JSON.

    python benchmarks/step.py --size=small --batch=8 --inputs=128 \\
      --targets=16 --prompt_length=100 --dtype=float32

`flops_ratio` is XLA's count for the compiled step over that for a forward
pass of the same batch: 2 would be a backward pass through the activations
alone. It is deterministic; seconds are this machine's.
"""

import argparse
import json
import math
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from ptune import optim, parameters, partitioning, sizes
from ptune import state as state_lib
from ptune.methods import prompt
from ptune.models import EncoderDecoderModel


def batch_of(config, rows, inputs, targets, mesh):
  """Random tokens without padding, as T5's features."""
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(2, config.vocab_size, (rows, n), np.int32)
  target_tokens = draw(targets)
  features = {
    'encoder_input_tokens': draw(inputs),
    'decoder_target_tokens': target_tokens,
    'decoder_input_tokens': np.pad(target_tokens, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': np.ones_like(target_tokens),
  }
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  return {k: jax.device_put(v, rows) for k, v in features.items()}


def compile_step(plan, batch):
  """Compiles the update and the forward pass from shapes alone.

  Returns:
    The two programs and the abstract state.
  """
  model = EncoderDecoderModel(plan.network)
  tx = optim.adafactor()
  like = state_lib.abstract_state(tx, plan)
  frozen = parameters.unflatten(parameters.held(plan))
  update = state_lib.compile_step(model, tx, plan, like)

  def loss(trainable, frozen, batch):
    return model.loss(parameters.merge(trainable, frozen), batch)[0]

  with plan.scope():
    step = update.lower(like, frozen, batch).compile()
    forward = jax.jit(loss).lower(like.trainable, frozen, batch).compile()
  return step, forward, tx, like


def measure(args) -> dict[str, object]:
  """Runs the steps; returns what is printed."""
  config = sizes.t5(
    f'{args.family}_{args.size}',
    dtype=args.dtype,
    frozen_dtype=args.frozen_dtype,
  )
  mesh = partitioning.make_mesh()
  plan = parameters.plan(config, prompt.prompt(args.prompt_length), mesh)
  batch = batch_of(config, args.batch, args.inputs, args.targets, mesh)
  start = time.perf_counter()
  step, forward, tx, like = compile_step(plan, batch)
  compile_seconds = time.perf_counter() - start

  params = parameters.initialize(plan, plan.params, seed=0)
  frozen = parameters.unflatten(
    parameters.hold(plan, {p: params.pop(p) for p in plan.frozen})
  )
  trainable = parameters.unflatten({p: params[p] for p in plan.trainable})
  state = state_lib.first_state(tx, trainable, like)
  wall, cpu = [], []
  for _ in range(args.steps + 1):
    start, start_cpu = time.perf_counter(), time.process_time()
    state, sums = step(state, frozen, batch)
    jax.block_until_ready((state, sums))
    wall.append(time.perf_counter() - start)
    cpu.append(time.process_time() - start_cpu)
  flops = [program.cost_analysis()['flops'] for program in (step, forward)]
  temporary = step.memory_analysis().temp_size_in_bytes
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {
    **vars(args),
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'flops_ratio': round(flops[0] / flops[1], 4),
    'step_gflops': round(flops[0] / 1e9, 2),
    'cpu_seconds_per_step': round(float(np.median(cpu[1:])), 4),
    'wall_seconds_per_step': round(float(np.median(wall[1:])), 4),
    'compile_seconds': round(compile_seconds, 2),
    'temporary_bytes': temporary,
    'frozen_bytes': sum(
      math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
      for x in parameters.held(plan).values()
    ),
    'peak_bytes': peak,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--family', default='t5_1_1')
  parser.add_argument('--size', default='small')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--inputs', type=int, default=128)
  parser.add_argument('--targets', type=int, default=16)
  parser.add_argument('--prompt_length', type=int, default=100)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--frozen_dtype')
  parser.add_argument('--steps', type=int, default=5)
  print(json.dumps(measure(parser.parse_args())))


if __name__ == '__main__':
  main()
