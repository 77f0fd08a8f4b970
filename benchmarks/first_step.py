"""Times a fresh process up to its first step and answer: ptune.tune and PEFT.

    python -m benchmarks.first_step
    python -m benchmarks.first_step --model=t5_1_1_small --repeats=3

Two short programs do the same: they load the same shapes from a directory, take
one step of prompt tuning (20 vectors) on a batch of 8 texts, and answer a text.
They run in turns. `cold` is ours with an empty compilation cache, and `warm`
with the cache from that run; PEFT compiles nothing. PEFT's program writes
nothing, and ours writes a whole run. `lines` counts the lines of each program
without those that measure. `_cpu` are the CPU seconds of the process, which are
more reliable than wall seconds on a shared machine.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import peers
from benchmarks.startup import PEFT, checkpoint_of, process
from ptune import pretrained
from ptune.convert import identity, open_checkpoint
from ptune.model import sizes

ROWS = [('a text of some words', 'yes'), ('another text', 'no')] * 4

# Each program prints the seconds since START, after the step and the answer.
OURS = """
import ptune
rows = {rows}
base = ptune.load('{base}', vocabulary='ptune://tiny')
tuned = ptune.tune(base, rows, prompt_length=20, steps=1, batch_size=8)
MARK
tuned.predict('a text')
MARK
"""

THEIRS = """
import peft, sentencepiece, torch, transformers
torch.manual_seed(0)
rows = {rows}
tokenizer = sentencepiece.SentencePieceProcessor(model_file='{vocabulary}')
base = transformers.T5ForConditionalGeneration.from_pretrained('{base}')
model = peft.get_peft_model(base, peft.PromptTuningConfig(
  task_type=peft.TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=20))
optimizer = transformers.Adafactor(
  [p for p in model.parameters() if p.requires_grad],
  lr=0.3, relative_step=False, scale_parameter=False, warmup_init=False)
inputs, targets = (torch.nn.utils.rnn.pad_sequence(
  [torch.tensor(tokenizer.encode(row[i]) + [1]) for row in rows],
  batch_first=True) for i in (0, 1))
targets[targets == 0] = -100
model(input_ids=inputs, attention_mask=(inputs > 0) * 1, labels=targets
  ).loss.backward()
optimizer.step()
MARK
asked = torch.tensor([tokenizer.encode('a text') + [1]])
tokenizer.decode(model.generate(
  input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=32
  )[0].tolist())
MARK
"""
MARKER = (
  'import os, time; print("MARK", time.time() - float(os.environ["START"]),'
  ' time.process_time(), flush=True)'
)


def seconds(program, **environment):
  """Returns the wall and CPU seconds of a process at each of its marks."""
  code = program.replace('\nMARK\n', f'\n{MARKER}\n')
  done = subprocess.run(
    [sys.executable, '-c', code],
    check=True,
    env={**os.environ, 'START': str(time.time()), **environment},
    capture_output=True,
    text=True,
  )
  marks = [x for x in done.stdout.splitlines() if x.startswith('MARK')]
  return [tuple(map(float, mark.split()[1:])) for mark in marks]


def lines(program):
  """Counts the lines of a program, without the marks."""
  written = program.strip().splitlines()
  return sum(line.strip() != 'MARK' for line in written)


def measure(args):
  with tempfile.TemporaryDirectory() as temporary:
    place = pathlib.Path(temporary)
    if args.model == 'tiny':
      base = 'ptune://tiny'
      config = identity.config(open_checkpoint(base))
    else:
      base = checkpoint_of(args.model, place / 'base')
      config = sizes.t5(args.model)
    fields = json.dumps(peers.hugging_face_fields(config))
    process(sys.executable, '-c', PEFT, str(place / 'peft'), fields)
    named = {'rows': ROWS, 'vocabulary': pretrained.VOCABULARY}
    ours = OURS.format(base=base, **named)
    theirs = THEIRS.format(base=place / 'peft', **named)
    cache = {
      'JAX_COMPILATION_CACHE_DIR': str(place / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    runs = {'cold': [seconds(ours, **cache)], 'warm': [], 'peft': []}
    for _ in range(args.repeats):
      runs['peft'].append(seconds(theirs))
      runs['warm'].append(seconds(ours, **cache))
    found = {
      name: {
        f'{what}{unit}': round(statistics.median(r[i][k] for r in some), 2)
        for i, what in enumerate(('first_step', 'first_answer'))
        for k, unit in enumerate(('', '_cpu'))
      }
      for name, some in runs.items()
    }
    return found | {'lines': {'ptune': lines(ours), 'peft': lines(theirs)}}


if __name__ == '__main__':
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--model', default='tiny')
  flags.add_argument('--repeats', type=int, default=3)
  peers.run(flags, measure)
