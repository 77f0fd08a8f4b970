"""Compiles programs for an absent TPU, for `tpu_compiler_test`.

It reads one program a line from stdin, as JSON. For each, it writes one line
with the results of the compiler. One process compiles all programs of a worker
of pytest's, because importing libtpu takes as long as compiling.
It is a process of its own because the tests use fake CPU devices.
"""

import inspect
import json
import os
import re
import sys
import traceback

import jax

from ptune import methods
from ptune.model import parameters, partitioning, sizes
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.model.t5gemma_sizes import Stack, T5GemmaConfig
from ptune.tools import memory, tpu_compiler
from ptune.training import optim
from ptune.training.privacy import Privacy

# A small model, but large enough for the kernel: 170 positions, heads of 64.
LENGTHS, BATCH = {'inputs': 150, 'targets': 8}, 8
NETWORK = {'vocab_size': 512, 'dtype': 'bfloat16', 'dropout_rate': 0.1}
WIDTHS = {'emb_dim': 128, 'num_heads': 4, 'head_dim': 64, 'mlp_dim': 256}
# Small values for the arguments of methods.
SMALL = {'length': 20, 'size': 8, 'rank': 4, 'bottleneck': 4, 'tokens': 4}
SMALL |= {'vocab_size': 512, 'population': 100, 'prompts': 3, 'tasks': 9}


def method_of(name: str, settings):
  function = methods.functions()[name]
  known = inspect.signature(function).parameters
  small = {k: v for k, v in SMALL.items() if k in known and known[k].default}
  return function(**{**small, **settings})


def config_of(network):
  """Returns a config with one layer per stack, unless `network` differs."""
  network = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in {**NETWORK, **network}.items()
  }
  if 'version' in network:
    stack = Stack(num_layers=1, num_kv_heads=2, window=100, **WIDTHS)
    return T5GemmaConfig(encoder=stack, decoder=stack, eoi_id=3, **network)
  layers = {'num_encoder_layers': 1, 'num_decoder_layers': 1}
  return sizes.T5Config(**{**WIDTHS, **layers, **network})


def compiled(case):
  """Compiles a case; returns the program, the run and the plan."""
  config = config_of(case.get('network', {}))
  devices = tpu_compiler.devices(case['chip'], case['devices'])
  mesh = partitioning.make_mesh(case.get('model_parallel', 2), devices)
  method = method_of(case.get('method', 'prompt'), case.get('settings', {}))
  plan = parameters.plan(config, method, mesh)
  run = memory.Workload(
    config=config,
    method=plan.method,
    optimizer=optim.adafactor,
    model=EncoderDecoderModel,
    feature_lengths={**LENGTHS, **case.get('lengths', {})},
    batch_size=BATCH,
    microbatches=case.get('microbatches', 1),
    pack=case.get('pack', 0),
    privacy=Privacy() if case.get('private') else None,
  )
  if 'decoding' in case:
    how = Decoding(**case['decoding'])
    return memory.compile_decoding(run, plan, how), run, plan
  return memory.compile_step(run, plan), run, plan


def answer(case):
  """Returns the compiler's results for a case."""
  program, run, plan = compiled(case)
  text = program.as_text()
  found = tpu_compiler.estimate(text, case['chip'])
  # input_output_alias={ {0}: (0, {}, may-alias), ... }
  aliases = re.findall(r'(?:may|must)-alias\)', text.partition('\n')[0])
  return {
    'kernels': found.kernels,
    'collectives': {k: n for k, (n, _) in found.collectives.items()},
    'aliased': len(aliases),
    # Adafactor stores a placeholder of shape [1] for each moment that it does
    # not keep, and makes it anew in each update.
    'donated': sum(
      x.shape != (1,) for x in jax.tree.leaves(memory.state_of(run, plan))
    ),
    'seconds': found.seconds(case['chip']),
  }


def main() -> None:
  # libtpu may print to stdout, which would mix with the answers.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  for line in sys.stdin:
    try:
      found = answer({'chip': 'v5e', 'devices': 4, **json.loads(line)})
    except Exception:
      found = {'error': traceback.format_exc()}
    print(json.dumps(found), file=answers, flush=True)


if __name__ == '__main__':
  main()
