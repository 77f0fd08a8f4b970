"""Measures a step's cost against model size, prompt length and input length.

    python -m benchmarks.cost --output=benchmarks/cost.png

The sweeps of prompt length and input length use --size. With --size=toy, each
sweep has two small points.

It draws and prints (one line of JSON) the FLOP of a compiled step as XLA counts
them, the seconds, and the analytic cost (`peers.analytic_flops`).
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import figure

from benchmarks import peers
from ptune.training import state as state_lib

SWEEPS = {
  'size': ('small_quarter', 'small_half', 't5_1_1_small', 't5_1_1_base'),
  'prompt_length': (1, 50, 100, 200),
  'inputs': (32, 128, 256, 512),
}


def cost(args):
  """Returns the counted FLOP, the calculated FLOP and the seconds of a step."""
  ours = peers.ours(args)
  plan = ours.plan
  batch = peers.batch_of(plan, args.batch, args.inputs, args.targets)
  step, _, tx, abstract = peers.compile_step(plan, batch)
  trainable = jax.tree.map(jnp.copy, ours.trainable)
  state = state_lib.first_state(tx, trainable, abstract)
  call = peers.repeated(step, state, ours.frozen, batch)
  taken = [peers.seconds_of(call) for _ in range(args.rounds + 1)]
  return {
    'gflops': step.cost_analysis()['flops'] / 1e9,
    'analytic_gflops': peers.analytic_flops(args) / 1e9,
    'seconds': float(np.median(taken[1:])),
    'parameters': sum(x.size for x in plan.select(plan.base).values()),
  }


def draw(sweeps, path):
  """Draws one panel per sweep: FLOP on the left axis, seconds on the right."""
  fig = figure.Figure(figsize=(12, 3.6), layout='constrained')
  for axes, (name, points) in zip(
    fig.subplots(1, len(sweeps)), sweeps.items(), strict=True
  ):
    x = [p['parameters'] if name == 'size' else p[name] for p in points]
    axes.plot(x, [p['analytic_gflops'] for p in points], 'k--', lw=1)
    axes.plot(x, [p['gflops'] for p in points], 'o', color='C0')
    axes.set_ylabel('GFLOP a step', color='C0')
    right = axes.twinx()
    right.plot(x, [p['seconds'] for p in points], 's-', color='C1', ms=4)
    right.set_ylabel(f'{peers.clock()} seconds a step', color='C1')
    axes.set_xlabel(
      {
        'size': 'parameters of the model',
        'prompt_length': 'prompt length, tokens',
        'inputs': 'input length, tokens',
      }[name]
    )
    if name == 'size':
      for each in (axes, right):
        each.set(xscale='log', yscale='log')
    else:
      for each in (axes, right):
        each.set_ylim(bottom=0)
  fig.legend(
    handles=[*fig.axes[0].lines, *fig.axes[len(sweeps)].lines],
    labels=['analytic', "XLA's count", f'{peers.clock()} seconds'],
    loc='outside lower center',
    ncols=3,
    fontsize='small',
  )
  fig.savefig(path, dpi=120)


def measure(args):
  found, sweeps = {}, {}
  for name, values in SWEEPS.items():
    if args.size == 'toy':
      values = ('toy',) if name == 'size' else (4, 8)
    sweeps[name] = []
    for value in values:
      one = argparse.Namespace(**{**vars(args), name: value})
      key = (one.size, one.prompt_length, one.inputs)
      if key not in found:
        found[key] = cost(one)
      sweeps[name].append({name: value, **found[key]})
  if args.output:
    draw(sweeps, args.output)
  return {'sweeps': sweeps}


if __name__ == '__main__':
  flags = peers.parser(__doc__, batch=2, rounds=3)
  flags.add_argument('--output', default='')
  peers.run(flags, measure)
