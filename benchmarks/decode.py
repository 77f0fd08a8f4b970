"""Measures greedy decoding: a batch, and an ensemble of prompts on one example.

    python -m benchmarks.decode --versus=peft
    python -m benchmarks.decode --prompts=5

Random weights seldom end an answer. So ptune decodes all --targets tokens, and
PEFT is set to do the same. With --prompts, each prompt answers one example: in
one batch in which each row has its own prompt (`together`), and in one pass per
prompt (`separate`).
"""

import dataclasses

import jax
import numpy as np

from benchmarks import peers
from ptune.model import parameters
from ptune.model.network import Transformer
from ptune.model.sizes import TokenIds
from ptune.serving.bank import PromptBank


def _endless(network: Transformer) -> Transformer:
  """Returns a network whose answers never end, like PEFT's here."""
  config = dataclasses.replace(network.config, ids=TokenIds(eos=-1))
  return network.clone(config=config)


def of_batch(args):
  """Measures `ours`, and with --versus `peft`."""
  ours = peers.ours(args)
  batch = peers.batch_of(ours.plan, args.batch, args.inputs, args.targets)
  model = peers.EncoderDecoderModel(_endless(ours.plan.network))
  predict = jax.jit(
    lambda trainable, frozen, tokens: model.predict(
      parameters.merge(trainable, frozen), tokens, args.targets
    )
  )
  tokens = batch['encoder_input_tokens']
  with ours.plan.scope():
    program = predict.lower(ours.trainable, ours.frozen, tokens).compile()
  calls = {'ours': lambda: program(ours.trainable, ours.frozen, tokens)}
  if args.versus == 'peft':
    import torch

    peft = peers.peft(args).eval()
    inputs = peers.torch_batch(batch)
    del inputs['labels']
    lengths = {'min_new_tokens': args.targets, 'max_new_tokens': args.targets}

    @torch.no_grad()
    def generate():
      how = {'num_beams': 1, 'do_sample': False, **lengths}
      return peft.generate(**inputs, **how).cpu()

    calls['peft'] = generate
  return peers.interleaved(calls, args.rounds)


def of_ensemble(args):
  """Measures several prompts on one example."""
  ours = peers.ours(args)
  base = parameters.initialize(ours.plan, ours.plan.base, seed=0)
  bank = PromptBank(
    _endless(ours.plan.network).config,
    base,
    args.targets,
    mesh=ours.plan.mesh,
  )
  rng = np.random.default_rng(0)
  names = [f'prompt{i}' for i in range(args.prompts)]
  for name in names:
    shape = (args.prompt_length, bank.embed)
    bank.add(name, rng.uniform(-0.5, 0.5, shape).astype(np.float32))
  batch = peers.batch_of(ours.plan, 1, args.inputs, args.targets)
  one = np.asarray(batch['encoder_input_tokens'])
  all_rows = np.repeat(one, args.prompts, axis=0)
  return peers.interleaved(
    {
      'together': lambda: bank.predict(names, all_rows),
      'separate': lambda: [bank.predict([name], one) for name in names],
    },
    args.rounds,
  )


def measure(args):
  return of_ensemble(args) if args.prompts else of_batch(args)


if __name__ == '__main__':
  flags = peers.parser(__doc__)
  flags.add_argument('--versus', choices=('peft',))
  flags.add_argument('--prompts', type=int, default=0)
  peers.run(flags, measure)
