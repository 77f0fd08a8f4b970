"""Compares one step of K prompts on one base model with K separate steps.

    python -m benchmarks.multi_prompt --runs=8 --batch=1 --versus=peft

--batch is the number of examples per prompt. Each prompt has its own optimizer
state. `times_separate` is the time of K steps divided by that of one step of
all prompts. Both keep the frozen weights in memory once; K processes would keep
them K times. --versus=peft adds K steps of PEFT, which has no step of several
prompts.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks import peers
from ptune.methods import prompt
from ptune.model.models import EncoderDecoderModel
from ptune.training import many, optim
from ptune.training import state as state_lib


def measure(args):
  ours = peers.ours(args)
  plan = ours.plan
  runs = {
    f'run{i}': many.Trial('', prompt.prompt(args.prompt_length), seed=i)
    for i in range(args.runs)
  }
  groups = many.group(runs, plan.network.config, plan.mesh)
  one = peers.batch_of(plan, args.batch, args.inputs, args.targets)
  rows = {k: jnp.tile(x, (args.runs, 1)) for k, x in one.items()}
  copy = lambda: jax.tree.map(jnp.copy, ours.trainable)
  state = many.first_state(
    optim.adafactor(learning_rate=0.0), {name: copy() for name in runs}, groups
  )
  update = many.compile_step(
    EncoderDecoderModel, optim.adafactor, 0, runs, groups
  )
  with plan.scope():
    together = update.lower(state, ours.frozen, rows).compile()
  step, _, tx, abstract = peers.compile_step(plan, one)
  alone = [
    peers.repeated(
      step, state_lib.first_state(tx, copy(), abstract), ours.frozen, one
    )
    for _ in runs
  ]
  flops = [p.cost_analysis()['flops'] for p in (together, step)]
  calls = {
    'together': peers.repeated(together, state, ours.frozen, rows),
    'separate': lambda: [call() for call in alone],
  }
  if args.versus == 'peft':
    peft = functools.partial(peers.peft_step(args), peers.torch_batch(one))
    calls['peft'] = lambda: [peft() for _ in runs]
  return {
    **peers.interleaved(calls, args.rounds),
    'flops_by_separate': round(flops[0] / flops[1] / args.runs, 4),
  }


if __name__ == '__main__':
  flags = peers.parser(__doc__, batch=1)
  flags.add_argument('--runs', type=int, default=8)
  flags.add_argument('--versus', choices=('peft',))
  peers.run(flags, measure)
