"""Measures the start of `ptune train`: from a fresh process to a trained step.

    python -m benchmarks.startup
    python -m benchmarks.startup --model=t5_1_1_small --versus=peft

It runs the program for one step on a task of files, three times: with an empty
compilation cache (`cold`), and twice with the cache from that run (`warm` is
the second). The default model is `ptune://tiny`. For another model, it first
writes a checkpoint of random weights. `import_*` are processes that only import
that module. `peft` (--versus=peft) is a process that loads the same shapes from
a directory and takes a step of PEFT on a batch of token ids. It reads no task
and writes nothing.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import ptune
from benchmarks import peers
from ptune.model import sizes

IMPORTS = ('jax', 'seqio', 'ptune.train')
STARTS = ('cold', 'filled', 'warm')

# This process uses only PEFT. It saves a model of a config, or takes a step.
PEFT = """
import json, sys
import peft, torch, transformers
place, config = sys.argv[1], sys.argv[2]
if config:
  config = transformers.T5Config.from_dict(json.loads(config))
  transformers.T5ForConditionalGeneration(config).save_pretrained(place)
  sys.exit()
base = transformers.T5ForConditionalGeneration.from_pretrained(place)
model = peft.get_peft_model(base, peft.PromptTuningConfig(
  task_type=peft.TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=100))
optimizer = transformers.Adafactor(
  [p for p in model.parameters() if p.requires_grad],
  lr=0.3, relative_step=False, scale_parameter=False, warmup_init=False)
tokens, targets = (torch.ones((8, n), dtype=torch.long) for n in (32, 4))
model(input_ids=tokens, labels=targets).loss.backward()
optimizer.step()
"""


def process(*command, **environment):
  """Runs a process; returns its wall and CPU seconds."""
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  start = time.monotonic()
  subprocess.run(
    command,
    check=True,
    env={**os.environ, **environment},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = sum(
    getattr(after, field) - getattr(before, field)
    for field in ('ru_utime', 'ru_stime')
  )
  wall = time.monotonic() - start
  return {'wall_seconds': round(wall, 2), 'cpu_seconds': round(cpu, 2)}


def checkpoint_of(model, directory):
  """Writes random weights in the layout of a run; returns the directory."""
  import jax.numpy as jnp

  from ptune.methods import full
  from ptune.model import parameters, partitioning
  from ptune.training import checkpoints
  from ptune.training.state import TrainState

  plan = parameters.plan(sizes.t5(model), full.full(), partitioning.make_mesh())
  values = parameters.initialize(plan, plan.params, seed=0)
  with checkpoints.Checkpoints(directory / 'checkpoints', start=0) as saved:
    saved.save(TrainState(jnp.int32(1), parameters.unflatten(values), {}), {})
  return str(directory)


def measure(args):
  with tempfile.TemporaryDirectory() as temporary:
    place = pathlib.Path(temporary)
    rows = [f'a text of some words {i}\tyes\n' for i in range(64)]
    (place / 'train.tsv').write_text(''.join(['text\tlabel\n', *rows]))
    tiny = args.model == 'tiny'
    base = 'ptune://tiny' if tiny else checkpoint_of(args.model, place / 'base')
    macros = {
      'TASK_FILES': {'train': str(place / 'train.tsv')},
      'INPUTS': '{text}',
      'TARGETS': '{label}',
      'VOCABULARY': 'ptune://tiny',
      'INITIAL_CHECKPOINT_PATH': base,
      'TASK_FEATURE_LENGTHS': {'inputs': 32, 'targets': 4},
      'EVAL_SPLIT': None,
      'TRAIN_STEPS': 1,
      'BATCH_SIZE': 8,
    }

    def train(name):
      return process(
        *(sys.executable, '-m', 'ptune.train'),
        f'--gin_file=models/{args.model}.gin',
        '--gin_file=prompts/random_uniform.gin',
        '--gin_file=runs/train.gin',
        '--gin_file=tasks/from_files.gin',
        *(f'--gin.{k}={v!r}' for k, v in macros.items()),
        f'--gin.MODEL_DIR={str(place / name)!r}',
        JAX_COMPILATION_CACHE_DIR=str(place / 'cache'),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
      )

    result = {name: train(name) for name in STARTS}
    result.pop('filled', None)
    if args.versus == 'peft':
      if tiny:
        config = ptune.load(base).config
      else:
        config = sizes.t5(args.model)
      fields = peers.hugging_face_fields(config)
      own = str(place / 'peft')
      process(sys.executable, '-c', PEFT, own, json.dumps(fields))
      result['peft'] = process(sys.executable, '-c', PEFT, own, '')
    return result | {
      f'import_{name}': process(sys.executable, '-c', f'import {name}')
      for name in IMPORTS
    }


if __name__ == '__main__':
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--model', default='tiny')
  flags.add_argument('--versus', choices=('peft',))
  peers.run(flags, measure)
