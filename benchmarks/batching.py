"""Compares batches of similar lengths, packed batches, and padding.

    python -m benchmarks.batching --data=/data/sst2 --versus=peft
    python -m benchmarks.batching --data=/data/sst2 --checkpoint=ptune://tiny

--data is a directory with a train.tsv whose last column is the label; the other
columns are the inputs. The benchmark makes the batches of an epoch, or of
--steps of it, in each of these ways:

    bucketed  batches of similar lengths (ptune's way)
    longest   any rows, padded to the batch's longest
    full      any rows, padded to TASK_FEATURE_LENGTHS
    packed    rows as long as --pack of the longest examples, a --pack-th as
              many, each filled with examples (PACK)
    peft      with --versus=peft, the batches of `longest` by PEFT

The first two round lengths up to --bucket_multiple. The benchmark times one
step of each shape, in turns, for --rounds rounds. It counts each shape as often
as there are batches of it, which gives the time of an epoch without
compilation. Each way makes enough batches to see as many examples as the first.
Tokens come from ptune's vocabulary, unless PTUNE_VOCABULARY names another. With
--checkpoint, the model of this checkpoint trains on all batches, and `loss` is
the mean over them.
"""

import collections
import functools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import ptune
from benchmarks import peers
from ptune.methods import prompt
from ptune.model import parameters, partitioning
from ptune.model.models import EncoderDecoderModel
from ptune.tasks import files
from ptune.tasks.texts import TextTask
from ptune.training import optim
from ptune.training import state as state_lib


def task_of(data: pathlib.Path) -> TextTask:
  """Returns the task of a directory."""
  os.environ.setdefault('PTUNE_VOCABULARY', 'ptune://tiny')
  with (data / 'train.tsv').open() as f:
    *columns, label = f.readline().split()
  return files.from_files(
    {'train': str(data / 'train.tsv')},
    inputs=' '.join(f'{name}: {{{name}}}' for name in columns),
    targets=f'{{{label}}}',
    name=f'benchmark_{data.name}',
  )


def ours_of(args) -> peers.Ours:
  """Returns a model with random weights or of a checkpoint."""
  if not args.checkpoint:
    return peers.ours(args)
  base = ptune.load(args.checkpoint)
  method = prompt.prompt(args.prompt_length)
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(base.config, method, mesh)
  added = parameters.initialize(plan, plan.adapters, seed=0)
  return peers.Ours(
    plan, parameters.unflatten(added), parameters.unflatten(base.weights)
  )


def measure(args):
  from ptune.data import batches as data
  from ptune.data import device_feed, packing

  directory = pathlib.Path(args.data)
  if not (directory / 'train.tsv').exists():
    print(f'there is no {directory}/train.tsv: nothing is measured')
    sys.exit()
  if args.versus and args.checkpoint:
    sys.exit('--versus=peft is of random weights; leave --checkpoint out')
  ours = ours_of(args)
  task = task_of(directory)
  lengths = {'inputs': args.inputs, 'targets': args.targets}
  tx = optim.adafactor()
  abstract = state_lib.abstract_state(tx, ours.plan)
  packed = packing.model_of(EncoderDecoderModel, ours.plan)

  def steps(model):
    """Returns a function that takes the next step on a batch."""
    step = state_lib.compile_step(model, tx, ours.plan, abstract)
    trainable = jax.tree.map(jnp.copy, ours.trainable)
    state = state_lib.first_state(tx, trainable, abstract)
    return peers.repeated(step, state, ours.frozen)

  calls, counts, result = {}, {}, {}
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
    else:
      of_step = data.Batches(
        task,
        lengths,
        args.batch,
        seed=1,
        bucket_multiple=None if name == 'full' else args.bucket_multiple,
        **({'window': 1} if name == 'longest' else {}),
      )
    wanted = args.batch * min(args.steps, of_step.num_examples // args.batch)
    batches, examples = [], 0
    while examples < wanted:
      batches.append(of_step(len(batches)))
      examples += examples_of(batches[-1])
    # Counts prompts; packed rows already have them among their tokens.
    prompts = 0 if name == 'packed' else args.prompt_length
    tokens = [batch['encoder_input_tokens'] for batch in batches]
    real = sum(np.count_nonzero(x) + prompts * len(x) for x in tokens)
    positions = sum(x.size + prompts * len(x) for x in tokens)
    shapes = [tuple(x.shape for x in batch.values()) for batch in batches]
    counts[name] = collections.Counter(shapes)
    result[name] = {
      'examples': examples,
      'shapes': len(counts[name]),
      'steps': len(batches),
      'positions': round(positions / examples, 1),
      'padding': round(1 - real / positions, 3),
    }
    put = functools.partial(device_feed.device_put, mesh=ours.plan.mesh)
    take = steps(packed if name == 'packed' else ours.model)
    one_of = dict(zip(shapes, batches, strict=True))
    for shape, batch in one_of.items():
      calls[name, shape] = functools.partial(take, put(batch))
    if args.checkpoint:
      with ours.plan.scope():
        sums = [take(put(batch))[1] for batch in batches]
      loss, count = np.sum([(x['loss'], x['tokens']) for x in sums], axis=0)
      result[name]['loss'] = round(float(loss / count), 4)
    if name == 'longest' and args.versus == 'peft':
      update = peers.peft_step(args)
      counts['peft'] = counts[name]
      result['peft'] = dict(result[name])
      for shape, batch in one_of.items():
        inputs = peers.torch_batch(batch)
        calls['peft', shape] = functools.partial(update, inputs)
  with ours.plan.scope():
    taken = peers.in_turns(calls, args.rounds + 1)
  costs = {
    name: sum(n * np.array(taken[name, shape][1:]) for shape, n in many.items())
    / result[name]['examples']
    for name, many in counts.items()
  }
  for name, cost in costs.items():
    result[name]['examples_per_second'] = round(1 / np.median(cost), 2)
    if name != 'bucketed':
      ratios = cost / costs['bucketed']
      result[f'times_{name}'] = round(float(np.median(ratios)), 3)
      result[f'times_{name}_min'] = round(float(np.min(ratios)), 3)
  return result


def examples_of(batch):
  """Returns the number of examples in a batch."""
  if 'encoder_segment_ids' in batch:
    return int(batch['encoder_segment_ids'].max(axis=1).sum())
  return len(batch['encoder_input_tokens'])


if __name__ == '__main__':
  flags = peers.parser(__doc__, batch=32, targets=8, rounds=3)
  flags.add_argument('--data', required=True)
  flags.add_argument('--checkpoint', default='')
  flags.add_argument('--steps', type=int, default=10**9)
  flags.add_argument('--pack', type=int, default=4)
  flags.add_argument('--bucket_multiple', type=int, default=32)
  flags.add_argument('--versus', choices=('peft',))
  peers.run(flags, measure)
