"""Measures one training step of prompt tuning; prints one line of JSON.

    python -m benchmarks.step --versus=peft
    python -m benchmarks.step --dtype=bfloat16 --versus=reference

`flops_ratio` is XLA's count for the compiled step divided by that for a forward
pass of the same batch. A backward pass through the activations alone would give
2. The ratio and the bytes are deterministic; the seconds depend on the machine.

`matmul_share` is the step's FLOP per second divided by that of the fastest
matrix product of the same type: at the MLP's shapes, or on an accelerator a
large one. `model_share` uses the FLOP that papers count instead: 4 per weight
and token, plus attention (`peers.analytic_flops`). XLA's count leaves out fused
kernels.

    python -m benchmarks.step --size=t5_1_1_xl --dtype=bfloat16 --batch=32 \
      --inputs=512 --fused_attention --versus=peft  # on an accelerator

--versus=reference takes the step as the paper's program does, on our network. A
norm metric keeps the gradients of all parameters alive, the embedding
multiplies by one-hot rows, and inputs are padded to --reference_inputs.
"""

import functools
import math
import time

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks import peers
from ptune.model import frozen_weights, layers, parameters
from ptune.training import state as state_lib


def one_hot(next_method, args, kwargs, context):
  """Makes the embedding multiply by one-hot rows instead of looking rows up."""
  module = context.module
  if not isinstance(module, layers.Embed) or context.method_name != '__call__':
    return next_method(*args, **kwargs)
  rows = jax.nn.one_hot(args[0], module.vocab_size, dtype=module.dtype)
  return rows @ module.embedding.astype(module.dtype)


def reference_step(model, tx):
  """Returns the update with all gradients and one-hot rows."""

  def step(state, frozen, batch):
    def loss(params):
      with nn.intercept_methods(one_hot):
        return model.loss(params, batch)

    params = parameters.merge(state.trainable, frozen)
    grads, sums = jax.grad(loss, has_aux=True)(params)
    sums['gradient_norm'] = optax.tree_utils.tree_norm(grads)
    flat, ours = parameters.flatten(grads), parameters.flatten(state.trainable)
    grads = parameters.unflatten({path: flat[path] for path in ours})
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    return state_lib.TrainState(state.step + 1, trainable, opt_state), sums

  return jax.jit(step, donate_argnums=0)


def measure(args):
  """Runs the steps; returns the results to print."""
  ours = peers.ours(args)
  plan = ours.plan
  batch = peers.batch_of(plan, args.batch, args.inputs, args.targets)
  start = time.perf_counter()
  step, forward, tx, abstract = peers.compile_step(plan, batch)
  compile_seconds = time.perf_counter() - start
  # Steps donate their state, so each one needs its own copy.
  first = lambda: state_lib.first_state(
    tx, jax.tree.map(jnp.copy, ours.trainable), abstract
  )
  calls = {'ours': peers.repeated(step, first(), ours.frozen, batch)}
  result = {}
  if args.versus == 'peft':
    calls['peft'] = functools.partial(
      peers.peft_step(args), peers.torch_batch(batch)
    )
  elif args.versus == 'reference':
    longest = args.reference_inputs or args.inputs
    long = longest - args.inputs
    padded = {
      k: jnp.pad(x, ((0, 0), (0, long))) if k == 'encoder_input_tokens' else x
      for k, x in batch.items()
    }
    update = reference_step(ours.model, tx)
    with plan.scope():
      other = update.lower(first(), ours.frozen, padded).compile()
    calls['reference'] = peers.repeated(other, first(), ours.frozen, padded)
    result['reference_gflops'] = other.cost_analysis()['flops'] / 1e9
  result |= peers.interleaved(calls, args.rounds)
  flops = [program.cost_analysis()['flops'] for program in (step, forward)]
  seconds = result['seconds']['ours']
  rate = flops[0] / seconds
  best = peers.matmul_rate(args)
  model_flops = peers.analytic_flops(args)
  return {
    **result,
    'flops_ratio': round(flops[0] / flops[1], 4),
    'step_gflops': round(flops[0] / 1e9, 4),
    'gflops_per_second': round(rate / 1e9, 1),
    'matmul_gflops_per_second': round(best / 1e9, 1),
    'matmul_share': round(rate / best, 3),
    'model_gflops': round(model_flops / 1e9, 4),
    'model_share': round(model_flops / seconds / best, 3),
    'compile_seconds': round(compile_seconds, 2),
    'temporary_bytes': step.memory_analysis().temp_size_in_bytes,
    'frozen_bytes': sum(
      math.prod(x.shape) * x.dtype.itemsize
      for x in frozen_weights.shapes(plan).values()
    ),
  }


def main() -> None:
  parser = peers.parser(__doc__)
  parser.add_argument('--versus', choices=('peft', 'reference'))
  parser.add_argument('--reference_inputs', type=int)
  peers.run(parser, measure)


if __name__ == '__main__':
  main()
