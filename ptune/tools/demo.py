"""`ptune demo`: prompt tuning in miniature, within a minute and offline.

It uses the T5 that comes with the package (1.1 million parameters). It trains a
prompt of 20 vectors to classify the sentiment of generated reviews, and
compares it with training the whole model. A second prompt learns the topics of
reports. Then one batch runs both tasks on the same frozen weights. It writes
these files to the output directory: `summary.json`, `curves.png`,
`sentiment.npy` and `topics.npy` (the prompts), and `words.txt` (the vocabulary
words nearest to them). So that you can go on with the reviews, it also writes
`train.tsv`, `dev.tsv`, `test.tsv` and `sentences.txt`.
"""

import argparse
import io
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text
from etils import epath

from ptune import pretrained
from ptune.errors import UserError
from ptune.host.files import write_atomically
from ptune.tasks import generated_text

# The others take seconds to import, when something can be read already.
if TYPE_CHECKING:
  from ptune.tools import miniature
  from ptune.tools.miniature import Row

MODEL = 'tiny'
PROMPT_LENGTH = 20
STEPS = 300
TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS, SHOWN = 2000, 200, 1000, 10


def demo(
  output_dir: str | pathlib.Path,
  seed: int = 0,
  steps: int = STEPS,
  console: rich.console.Console | None = None,
) -> dict[str, Any]:
  """Runs the demonstration.

  Args:
    output_dir: Where files go; they replace those of an earlier demo.
    seed: Seed of the reviews, the prompts' first values and the order of rows.
    steps: Training steps of each prompt. Full tuning takes a third of them.
    console: Where to print; the terminal if not given.

  Returns:
    The contents of summary.json.

  Raises:
    ValueError: steps is less than 1, or output_dir cannot be written.
  """
  start = time.monotonic()
  if steps < 1:
    raise UserError(f'--steps is {steps}; it must be at least 1')
  directory = pathlib.Path(output_dir)
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f'--output_dir {directory} cannot be written: {error}. Choose another'
    ) from error
  out = console or rich.console.Console(highlight=False)
  out.rule('[bold]one frozen T5')
  out.print('Loading JAX and the model ...')
  from ptune.methods import full, prompt
  from ptune.model import model_info
  from ptune.tools import miniature

  # ------------------------------------------------------- one frozen model
  pieces = miniature.Pieces()
  config, base = miniature.load(pretrained.directory(MODEL))
  weights = pretrained.directory(MODEL) / 'model.safetensors'
  model_bytes = weights.stat().st_size
  count = sum(x.size for x in base.values())
  bank = miniature.bank(config, base)
  out.print(
    f'ptune://{MODEL}: {count:,} parameters,'
    f' {model_info.format_bytes(model_bytes)}. It was pre-trained on generated'
    ' sentences. It has never seen a review, nor the words that it must'
    f' answer with: {", ".join(generated_text.SENTIMENT.values())}.\n'
  )

  # -------------------------------------------------------------- sentiment
  out.rule(f'[bold]a prompt of {PROMPT_LENGTH} vectors learns their sentiment')
  reviews = splits(generated_text.reviews, seed)
  train, _, test = reviews
  method = miniature.prompt_method(PROMPT_LENGTH)
  made = miniature.programs(config, method, miniature.prompt_optimizer(steps))
  sentiment = miniature.tune(
    'prompt', made, base, pieces, reviews, steps, seed, out, test_untrained=True
  )
  shown = test[:SHOWN]
  bank.add('untrained', sentiment.first[prompt.PATH])
  bank.add('sentiment', sentiment.prompt)
  before, after = (
    miniature.answer(bank, pieces, shown, [name] * SHOWN)
    for name in ('untrained', 'sentiment')
  )
  out.print(before_and_after(shown, before, after))

  # ------------------------------------------------- against tuning it all
  few = max(steps // 3, 1)
  whole = miniature.programs(config, full.full(), miniature.full_optimizer(few))
  everything = miniature.tune(
    'full tuning', whole, base, pieces, reviews, few, seed, out
  )
  majority = majority_share(train, test)
  out.print(comparison(rows_of(majority, sentiment, everything)))

  # ---------------------------------------- a second task, the same weights
  out.rule('[bold]the same frozen weights, a second prompt: topics of reports')
  rows = splits(generated_text.topics, seed)
  topics = miniature.tune('prompt', made, base, pieces, rows, steps, seed, out)
  half = SHOWN // 2
  mixed = [*test[:half], *rows[2][:half]]
  bank.add('topics', topics.prompt)
  names = ['sentiment'] * half + ['topics'] * half
  told = miniature.answer(bank, pieces, mixed, names)
  out.print(mixed_table(mixed, names, told))

  # ---------------------------------------------------------------- results
  prompts = {'sentiment': sentiment.prompt, 'topics': topics.prompt}
  words = {k: nearest_words(base, pieces, v) for k, v in prompts.items()}
  summary = {
    'untrained': sentiment.untrained,
    'prompt': sentiment.accuracy,
    'full': everything.accuracy,
    'majority': majority,
    'topics': topics.accuracy,
    'prompt_bytes': sentiment.nbytes,
    'model_bytes': model_bytes,
    'seconds': round(time.monotonic() - start, 2),
    'seconds_prompt': round(sentiment.seconds, 2),
    'seconds_full': round(everything.seconds, 2),
    'seconds_topics': round(topics.seconds, 2),
    'steps': steps,
    'seed': seed,
  }
  curves = {'prompt': sentiment.curve, 'full tuning': everything.curve}
  write(directory, reviews, prompts, words, curves, summary)
  out.rule('[bold]the costs')
  out.print(
    f'Each prompt has {sentiment.nbytes:,} bytes, the model {model_bytes:,}.'
    f' {summary["seconds"]:.0f} seconds in all.'
  )
  nearest = ', '.join(row[0] for row in words['sentiment'])
  out.print(f'Words nearest to the sentiment prompt: {nearest}.', markup=False)
  out.print(f'Written to {directory}: {", ".join(FILES)}.', markup=False)
  out.print(NEXT.format(directory=directory), markup=False, soft_wrap=True)
  return summary


FILES = (
  'summary.json',
  'curves.png',
  'sentiment.npy',
  'topics.npy',
  'words.txt',
  'train.tsv',
  'dev.tsv',
  'test.tsv',
  'sentences.txt',
)
NEXT = """
Train the sentiment prompt again, with the command that you use for your own rows:
  ptune train --base=ptune://tiny --train={directory}/train.tsv \\
    --validation={directory}/dev.tsv --inputs='{{sentence}}' --targets='{{label}}' \\
    --labels=negative,positive --prompt_length=20 --steps=600 --dropout_rate=0.0 \\
    --model_dir=runs/mine
  ptune infer runs/mine {directory}/sentences.txt
With a published T5, name it: --base=hf://google/flan-t5-base
"""  # noqa: E501


def splits(make, seed: int) -> 'tuple[list[Row], list[Row], list[Row]]':
  """Returns training, validation and test rows, each from a different seed."""
  return (
    make(f'demo {seed} train', TRAIN_ROWS),
    make(f'demo {seed} validation', VALIDATION_ROWS),
    make(f'demo {seed} test', TEST_ROWS),
  )


def majority_share(train: 'Sequence[Row]', test: 'Sequence[Row]') -> float:
  """Returns the accuracy of always answering the most common training label."""
  labels = [label for _, label in train]
  common = max(sorted(set(labels)), key=labels.count)
  return sum(label == common for _, label in test) / len(test)


def nearest_words(
  base: Mapping[str, Any], pieces: 'miniature.Pieces', vectors: np.ndarray
) -> list[list[str]]:
  """Returns the three vocabulary pieces nearest in direction to each vector.

  Args:
    base: The frozen parameters.
    pieces: The vocabulary.
    vectors: [prompt, embed].

  Returns:
    For each vector of the prompt, its pieces, the nearest first.
  """
  from ptune.analysis import neighbours

  texts = neighbours.piece_texts(pieces.processor)
  table = np.asarray(base['token_embedder/embedding'])
  best, _ = neighbours.nearest(vectors, [table], texts, 3)
  words = [(text or '').strip(neighbours.SPACE) for text in texts]
  return [[words[i] for i in row] for row in best]


# ---------------------------------------------------------------------- report


def before_and_after(
  rows: 'Sequence[Row]', before: Sequence[str], after: Sequence[str]
) -> rich.table.Table:
  """Returns the frozen model's answers without and with the prompt."""
  table = rich.table.Table(box=rich.box.SIMPLE)
  for title in ('review', 'label', 'untrained prompt', 'tuned prompt'):
    table.add_column(title)
  for (text, label), old, new in zip(rows, before, after, strict=True):
    table.add_row(text, label, _told(old, label), _told(new, label))
  return table


def mixed_table(
  rows: 'Sequence[Row]', names: Sequence[str], told: Sequence[str]
) -> rich.table.Table:
  """Returns a table of one batch with two tasks."""
  table = rich.table.Table(
    box=rich.box.SIMPLE, title='one batch, two prompts, the same weights'
  )
  for title in ('text', 'prompt', 'label', 'answer'):
    table.add_column(title)
  for (text, label), name, answer in zip(rows, names, told, strict=True):
    table.add_row(text, name, label, _told(answer, label))
  return table


def _told(answer: str, label: str) -> rich.text.Text:
  if not answer:
    return rich.text.Text('(nothing)', style='dim')
  # With an untrained prompt, the answer may be long.
  short = answer if len(answer) <= 24 else answer[:23] + '…'
  return rich.text.Text(short, style='green' if answer == label else 'red')


def rows_of(
  majority: float, sentiment: 'miniature.Tuned', everything: 'miniature.Tuned'
) -> list[tuple[str, float, int, float]]:
  """Returns the rows of `comparison`."""
  return [
    ('the most common label', majority, 0, 0.0),
    ('the frozen model, untrained prompt', sentiment.untrained, 0, 0.0),
    (
      'the frozen model, tuned prompt',
      sentiment.accuracy,
      sentiment.nbytes,
      sentiment.seconds,
    ),
    (
      'the whole model tuned',
      everything.accuracy,
      everything.nbytes,
      everything.seconds,
    ),
  ]


def comparison(rows: Sequence[tuple[str, float, int, float]]):
  """Returns a table of (name, accuracy, trained bytes, seconds)."""
  from ptune.model import model_info

  table = rich.table.Table(box=rich.box.SIMPLE)
  table.add_column('answers of')
  for title in ('test accuracy', 'trained', 'seconds'):
    table.add_column(title, justify='right')
  for what, accuracy, size, seconds in rows:
    table.add_row(
      what,
      f'{accuracy:.1%}',
      model_info.format_bytes(size) if size else '',
      f'{seconds:.1f}' if seconds else '',
    )
  return table


def write(
  directory: pathlib.Path,
  reviews: 'Sequence[Sequence[Row]]',
  prompts: Mapping[str, np.ndarray],
  words: Mapping[str, list[list[str]]],
  curves: Mapping[str, Sequence[tuple[int, float]]],
  summary: Mapping[str, Any],
) -> None:
  """Writes all files, each of them whole or not at all; the summary is last."""
  from ptune.convert.prompts import npy

  folder = epath.Path(directory)
  for name, rows in zip(('train', 'dev', 'test'), reviews, strict=True):
    table = [('sentence', 'label'), *rows]
    text = ''.join(f'{sentence}\t{label}\n' for sentence, label in table)
    write_atomically(folder / f'{name}.tsv', text)
  sentences = [sentence for sentence, _ in reviews[-1][:SHOWN]]
  write_atomically(folder / 'sentences.txt', '\n'.join([*sentences, '']))
  for name, values in prompts.items():
    write_atomically(folder / f'{name}.npy', npy(values))
  lines = [
    f'{name} {i}: {", ".join(row)}'
    for name, rows in words.items()
    for i, row in enumerate(rows)
  ]
  write_atomically(folder / 'words.txt', '\n'.join([*lines, '']))
  write_atomically(folder / 'curves.png', draw(curves, summary['majority']))
  write_atomically(
    folder / 'summary.json', json.dumps(summary, indent=2) + '\n'
  )


def draw(
  curves: Mapping[str, Sequence[tuple[int, float]]], majority: float
) -> bytes:
  """Plots the validation accuracy of each training by step, as a PNG."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(6, 3.4), layout='constrained')
  axes = fig.subplots()
  for name, points in curves.items():
    steps, accuracy = zip(*points, strict=True)
    axes.plot(steps, [100 * a for a in accuracy], marker='.', label=name)
  axes.axhline(100 * majority, color='grey', ls=':', label='majority class')
  axes.set(xlabel='step', ylabel='validation rows right, %', ylim=(-2, 102))
  axes.legend(loc='lower right')
  buffer = io.BytesIO()
  fig.savefig(buffer, format='png', dpi=120)
  return buffer.getvalue()


# ---------------------------------------------------------------- command line


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `ptune demo`."""
  del command
  parser.add_argument(
    '--output_dir',
    default='ptune-demo',
    help='directory for the prompts, the plot and summary.json (%(default)s)',
  )
  parser.add_argument(
    '--seed', type=int, default=0, help='of data and prompts (%(default)s)'
  )
  parser.add_argument(
    '--steps',
    type=int,
    default=STEPS,
    help='training steps of each prompt (%(default)s)',
  )


def run(args: argparse.Namespace) -> None:
  """Runs the command line."""
  demo(args.output_dir, args.seed, args.steps)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(prog='ptune demo', description=__doc__)
  add_arguments('demo', parser)
  args = parser.parse_args(argv)
  try:
    run(args)
  except ValueError as error:
    print(f'ptune demo: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('ptune demo: interrupted; nothing was written', file=sys.stderr)
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main())
