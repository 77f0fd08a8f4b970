"""Batches of like lengths, and packed ones, beside padding.

    python -m benchmarks.batching --data=/data/sst2 --versus=peft
    python -m benchmarks.batching --data=/data/sst2 --checkpoint=ptune://tiny

--data is a directory with a train.tsv whose last column is the label; the other
columns are the inputs. --steps of an epoch are trained in each way:

    bucketed  batches of like lengths (what ptune does)
    longest   any rows, padded to the batch's longest
    full      any rows, padded to TASK_FEATURE_LENGTHS
    packed    rows as long as --pack of the longest examples, a --pack-th as
              many, each filled with examples (PACK)
    peft      with --versus=peft, the batches of `longest` by PEFT

Lengths of the first two are rounded up to --bucket_multiple. Each is trained
until it has seen as many examples as the first has in --steps. Tokens are those
of ptune's vocabulary, unless PTUNE_VOCABULARY names another. `loss` is the mean
over these steps; with --checkpoint, of a model that has learned something.
Compilation is not counted; `shapes` is how many there are.
"""

import functools
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
from ptune.models import EncoderDecoderModel


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
  from ptune import data, packing, seqio_task

  directory = pathlib.Path(args.data)
  if not (directory / 'train.tsv').exists():
    print(f'there is no {directory}/train.tsv: nothing is measured')
    sys.exit()
  if args.versus and args.checkpoint:
    sys.exit('--versus=peft is of random weights; leave --checkpoint out')
  ours = ours_of(args)
  task = seqio_task.load(register(directory))
  lengths = {'inputs': args.inputs, 'targets': args.targets}
  tx = optim.adafactor()
  like = state_lib.abstract_state(tx, ours.plan)
  packed = packing.model_of(EncoderDecoderModel, ours.plan)
  step, packed_step = (
    state_lib.compile_step(model, tx, ours.plan, like)
    for model in (ours.model, packed)
  )

  def train(step, batches):
    """One pass over the batches, from the start."""
    trainable = jax.tree.map(jnp.copy, ours.trainable)
    state, pairs = state_lib.first_state(tx, trainable, like), []
    with ours.plan.scope():
      for batch in batches:
        batch = data.device_put(batch, ours.plan.mesh)
        state, sums = step(state, ours.frozen, batch)
        pairs.append((sums['loss'], sums['tokens']))
    return pairs

  calls, result = {}, {}
  for name in ('bucketed', 'longest', 'full', 'packed'):
    if name == 'packed':
      of_step = packing.PackedBatches(
        task,
        lengths,
        max(1, args.batch // args.pack),
        ours.plan.method,
        args.pack,
        seed=1,
      )
      run = functools.partial(train, packed_step)
    else:
      of_step = data.Batches(
        task,
        lengths,
        args.batch,
        seed=1,
        bucket_multiple=None if name == 'full' else args.bucket_multiple,
        **({'window': 1} if name == 'longest' else {}),
      )
      run = functools.partial(train, step)
    wanted = args.batch * min(args.steps, of_step.num_examples // args.batch)
    batches, examples = [], 0
    while examples < wanted:
      batches.append(of_step(len(batches)))
      examples += examples_of(batches[-1])
    tokens = [batch['encoder_input_tokens'] for batch in batches]
    shapes = {
      tuple(x.shape for x in batch.values()): batch for batch in batches
    }
    run(shapes.values())  # Compiles.
    loss, count = np.sum(np.array(run(batches)), axis=0)
    # With the prompts, which packed rows have among their tokens.
    prompts = 0 if name == 'packed' else args.prompt_length
    real = sum(np.count_nonzero(x) + prompts * len(x) for x in tokens)
    positions = sum(x.size + prompts * len(x) for x in tokens)
    result[name] = {
      'examples': examples,
      'loss': round(float(loss / count), 4),
      'shapes': len(shapes),
      'steps': len(batches),
      'padding': round(1 - real / positions, 3),
    }
    calls[name] = functools.partial(run, batches)
    if name == 'longest' and args.versus == 'peft':
      inputs = [peers.torch_batch(batch) for batch in batches]
      calls['peft'] = functools.partial(each, peers.peft_step(args), inputs)
      result['peft'] = {'examples': examples, 'steps': len(batches)}
  taken = peers.in_turns(calls, args.rounds)
  first = np.array(taken['bucketed']) / result['bucketed']['examples']
  for name, seconds in taken.items():
    cost = np.array(seconds) / result[name]['examples']
    result[name]['examples_per_cpu_second'] = round(1 / np.median(cost), 2)
    if name != 'bucketed':
      ratios = cost / first
      result[f'times_{name}'] = round(float(np.median(ratios)), 3)
      result[f'times_{name}_min'] = round(float(np.min(ratios)), 3)
  return result


def each(update, inputs):
  """Takes a step with each of the inputs."""
  return [update(x) for x in inputs]


def examples_of(batch):
  """How many examples a batch holds."""
  if 'encoder_segment_ids' in batch:
    return int(batch['encoder_segment_ids'].max(axis=1).sum())
  return len(batch['encoder_input_tokens'])


if __name__ == '__main__':
  flags = peers.parser(__doc__, batch=32, targets=8, rounds=1)
  flags.add_argument('--data', required=True)
  flags.add_argument('--checkpoint', default='')
  flags.add_argument('--steps', type=int, default=10**9)
  flags.add_argument('--pack', type=int, default=4)
  flags.add_argument('--bucket_multiple', type=int, default=32)
  flags.add_argument('--versus', choices=('peft',))
  peers.run(flags, measure)
