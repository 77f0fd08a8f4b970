"""Batches of like lengths, beside padding to each batch's longest, or to all.

    python -m benchmarks.batching --data=/data/sst2
    python -m benchmarks.batching --data=/data/sst2 --checkpoint=ptune://tiny

--data is a directory with a train.tsv whose last column is the label; the other
columns are the inputs. --steps of an epoch are trained in each way:

    bucketed  batches of like lengths, rounded up to 32 (what ptune does)
    longest   any rows, padded to the batch's longest, rounded up to 32
    full      any rows, padded to TASK_FEATURE_LENGTHS

Tokens are those of ptune's vocabulary, unless PTUNE_VOCABULARY names another.
`loss` is the mean over these steps; with --checkpoint, of a model that has
learned something. Compilation is not counted; `shapes` is how many there are.
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from ptune import miniature, optim, parameters, pretrained
from ptune import state as state_lib
from ptune.methods import prompt

WAYS = {
  'bucketed': {},
  'longest': {'window': 1},
  'full': {'bucket_multiple': None},
}


def register(data: pathlib.Path) -> str:
  """Registers the task of a directory; returns its name."""
  os.environ.setdefault('PTUNE_VOCABULARY', 'ptune://tiny')
  from ptune.tasks import files

  with (data / 'train.tsv').open() as f:
    *columns, label = f.readline().split()
  return files.from_files(
    {'train': str(data / 'train.tsv')},
    inputs=' '.join(f'{name}: {{{name}}}' for name in columns),
    targets=f'{{{label}}}',
    name=f'benchmark_{data.name}',
  )


def ours_of(args) -> peers.Ours:
  """A model of random weights, or of a checkpoint."""
  if not args.checkpoint:
    return peers.ours(args)
  config, base = miniature.load(pretrained.directory(args.checkpoint))
  method = prompt.prompt(args.prompt_length)
  plan = parameters.plan(config, method, miniature.one_device())
  added = parameters.initialize(plan, plan.adapters, seed=0)
  return peers.Ours(
    plan, parameters.unflatten(added), parameters.unflatten(base)
  )


def measure(args):
  from ptune import data, seqio_task

  directory = pathlib.Path(args.data)
  if not (directory / 'train.tsv').exists():
    print(f'there is no {directory}/train.tsv: nothing is measured')
    sys.exit()
  ours = ours_of(args)
  task = seqio_task.load(register(directory))
  lengths = {'inputs': args.inputs, 'targets': args.targets}
  tx = optim.adafactor()
  like = state_lib.abstract_state(tx, ours.plan)
  step = state_lib.compile_step(ours.model, tx, ours.plan, like)

  def train(batches):
    """One pass over the batches, from the start."""
    trainable = jax.tree.map(jnp.copy, ours.trainable)
    state, pairs = state_lib.first_state(tx, trainable, like), []
    with ours.plan.scope():
      for batch in batches:
        batch = data.device_put(batch, ours.plan.mesh)
        state, sums = step(state, ours.frozen, batch)
        pairs.append((sums['loss'], sums['tokens']))
    return pairs

  result = {}
  for name, how in WAYS.items():
    of_step = data.Batches(task, lengths, args.batch, seed=1, **how)
    steps = min(args.steps, of_step.num_examples // args.batch)
    batches = [of_step(i) for i in range(steps)]
    tokens = [batch['encoder_input_tokens'] for batch in batches]
    shapes = {
      tuple(x.shape for x in batch.values()): batch for batch in batches
    }
    train(shapes.values())  # Compiles.
    pairs = train(batches)
    seconds = min(
      peers.cpu_seconds(lambda batches=batches: train(batches))
      for _ in range(args.rounds)
    )
    loss, count = np.sum(np.array(pairs), axis=0)
    real = sum(np.count_nonzero(x) for x in tokens)
    result[name] = {
      'examples_per_cpu_second': round(steps * args.batch / seconds, 2),
      'loss': round(float(loss / count), 4),
      'shapes': len(shapes),
      'steps': steps,
      'padding': round(1 - real / sum(x.size for x in tokens), 3),
    }
  rate = {k: v['examples_per_cpu_second'] for k, v in result.items()}
  for name in ('longest', 'full'):
    result[f'times_{name}'] = round(rate['bucketed'] / rate[name], 3)
  return result


if __name__ == '__main__':
  flags = peers.parser(__doc__, batch=32, targets=8, rounds=1)
  flags.add_argument('--data', required=True)
  flags.add_argument('--checkpoint', default='')
  flags.add_argument('--steps', type=int, default=10**9)
  peers.run(flags, measure)
