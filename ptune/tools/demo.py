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
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text
from etils import epath

import ptune
from ptune import pretrained
from ptune.errors import UserError
from ptune.host.files import check_writable, write_atomically
from ptune.tasks import generated_text

MODEL = 'tiny'
PROMPT_LENGTH = 20
STEPS = 160  # Of the first prompt.
EVALUATIONS = 4  # Points of a curve.
LENGTHS = {'inputs': 32, 'targets': 8}
TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS, SHOWN = 2000, 100, 300, 10
# The paper's recipe; here the rate decays to 0.
PROMPT = {
  'method': 'from_class_labels',
  'prompt_length': PROMPT_LENGTH,
  'bindings': ["optim.schedule.decay = 'linear'"],
}
# The optimizer of the model's pre-training, at a fifth of the rate.
FULL = {
  'method': 'full',
  'learning_rate': 0.003,
  'bindings': [
    'OPTIMIZER = @optim.relative_adam',
    "optim.schedule.decay = 'linear'",
  ],
}
# The labels of reviews differ in length; each other shape would compile anew.
ONE_SHAPE = {'bucket_multiple': None}

Row = tuple[str, str]  # A text and its label.
Splits = tuple[Sequence[Row], Sequence[Row], Sequence[Row]]


class Learned(NamedTuple):
  """A trained model and its results.

  Attributes:
    tuned: The trained model.
    accuracy: The share of the test rows that it answers correctly.
    seconds: Time of the training, with compilation and validation.
  """

  tuned: 'ptune.Tuned'
  accuracy: float
  seconds: float

  def curve(self) -> list[tuple[int, float]]:
    """Returns (step, accuracy on the validation rows in percent)."""
    return [
      (record['step'], record['accuracy'])
      for record in self.tuned.history
      if record['split'] == 'validation'  # Those of training count tokens.
    ]


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
    steps: Training steps of the first prompt. The second takes a quarter more,
      and full tuning half of them.
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
  check_writable('--output_dir', epath.Path(directory))
  out = console or rich.console.Console(highlight=False)
  out.rule('[bold]one frozen T5')
  out.print('Loading JAX and the model ...')
  from ptune.model import model_info

  # ------------------------------------------------------- one frozen model
  base = ptune.load(f'ptune://{MODEL}')
  weights = pretrained.directory(MODEL) / 'model.safetensors'
  model_bytes = weights.stat().st_size
  count = sum(x.size for x in base.weights.values())
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
  sentiment = learn(base, reviews, seed, steps, out, **PROMPT, **ONE_SHAPE)
  bank = ptune.bank(
    base,
    lengths=LENGTHS,
    untrained=random_prompt(base, seed),
    sentiment=sentiment.tuned,
  )
  texts, labels = zip(*test, strict=True)
  before = bank.predict(texts, 'untrained')
  after = bank.predict(texts[:SHOWN], 'sentiment')
  out.print(before_and_after(test[:SHOWN], before[:SHOWN], after))

  # ------------------------------------------------- against tuning it all
  out.rule('[bold]the same, by training all parameters')
  few = max(steps // 2, 1)
  everything = learn(base, reviews, seed, few, out, **FULL, **ONE_SHAPE)
  majority = majority_share(train, test)
  untrained = sum(map(str.__eq__, before, labels)) / len(labels)
  prompt_bytes = sentiment.tuned.prompt.nbytes
  others = {
    'the most common label': majority,
    'the frozen model, untrained prompt': untrained,
  }
  trained = {
    'the frozen model, tuned prompt': (prompt_bytes, sentiment),
    'the whole model tuned': (4 * count, everything),
  }
  out.print(comparison(others, trained))

  # ---------------------------------------- a second task, the same weights
  out.rule('[bold]the same frozen weights, a second prompt: topics of reports')
  two_topics = splits(reports, seed)
  more = steps * 5 // 4
  topics = learn(base, two_topics, seed, more, out, curve=False, **PROMPT)
  bank.add('topics', topics.tuned)
  half = SHOWN // 2
  mixed = [*test[:half], *two_topics[2][:half]]
  names = ['sentiment'] * half + ['topics'] * half
  told = bank.predict([text for text, _ in mixed], names)
  out.print(mixed_table(mixed, names, told))

  # ---------------------------------------------------------------- results
  prompts = {'sentiment': sentiment.tuned, 'topics': topics.tuned}
  words = {name: nearest_words(x.prompt) for name, x in prompts.items()}
  summary = {
    'untrained': untrained,
    'prompt': sentiment.accuracy,
    'full': everything.accuracy,
    'majority': majority,
    'topics': topics.accuracy,
    'prompt_bytes': prompt_bytes,
    'model_bytes': model_bytes,
    'seconds': round(time.monotonic() - start, 2),
    'seconds_prompt': round(sentiment.seconds, 2),
    'seconds_full': round(everything.seconds, 2),
    'seconds_topics': round(topics.seconds, 2),
    'steps': steps,
    'seed': seed,
  }
  curves = {'prompt': sentiment.curve(), 'full tuning': everything.curve()}
  write(directory, reviews, prompts, words, curves, summary)
  out.rule('[bold]the costs')
  out.print(
    f'Each prompt has {prompt_bytes:,} bytes, the model {model_bytes:,}.'
    f' {summary["seconds"]:.0f} seconds in all.'
  )
  nearest = ', '.join(row[0] for row in words['sentiment'])
  out.print(f'Words nearest to the sentiment prompt: {nearest}.', markup=False)
  out.print(f'Written to {directory}: {", ".join(FILES)}.', markup=False)
  out.print(NEXT.format(directory=directory), markup=False, soft_wrap=True)
  return summary


def learn(
  base: 'ptune.Base',
  rows: Splits,
  seed: int,
  steps: int,
  out: rich.console.Console,
  curve: bool = True,
  **settings: Any,
) -> Learned:
  """Trains on the rows of the first split, and tests on those of the last.

  Args:
    base: The model.
    rows: Rows for training, validation and test.
    seed: Seed of the first values and of the order of rows.
    steps: Training steps.
    out: Where to print the accuracy.
    curve: Whether to evaluate on the validation rows during the training.
    **settings: Other arguments of `ptune.tune`.

  Raises:
    KeyboardInterrupt: Ctrl-C stopped the training.
  """
  train, validation, test = rows
  evaluation = {
    'validation': validation,
    'eval_period': max(steps // EVALUATIONS, 1),
  }
  start = time.monotonic()
  tuned = ptune.tune(
    base,
    train,
    labels=sorted({label for _, label in train}),
    steps=steps,
    seed=seed,
    task_feature_lengths=LENGTHS,
    dropout_rate=0.0,
    **(evaluation if curve else {}),
    **settings,
  )
  seconds = time.monotonic() - start
  if tuned.history[-1]['step'] < steps:
    raise KeyboardInterrupt
  accuracy = tuned.evaluate(test)['accuracy'] / 100
  out.print(
    f'{steps} steps in {seconds:.0f} seconds;'
    f' {accuracy:.1%} of {len(test)} test rows are correct.'
  )
  return Learned(tuned, accuracy, seconds)


def random_prompt(base: 'ptune.Base', seed: int) -> np.ndarray:
  """Returns the embeddings of random tokens: [prompt, embed] float32."""
  table = np.asarray(base.weights['token_embedder/embedding'])
  return np.random.default_rng(seed).choice(table, PROMPT_LENGTH)


FILES = (
  'summary.json',
  'curves.png',
  'sentiment.npy',
  'sentiment.json',
  'topics.npy',
  'topics.json',
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


def splits(make, seed: int) -> Splits:
  """Returns training, validation and test rows, each from a different seed."""
  return (
    make(f'demo {seed} train', TRAIN_ROWS),
    make(f'demo {seed} validation', VALIDATION_ROWS),
    make(f'demo {seed} test', TEST_ROWS),
  )


def reports(seed: str, count: int) -> list[Row]:
  """Returns reports of two topics, because four take twice as many steps."""
  rows = generated_text.topics(seed, 2 * count)
  return [row for row in rows if row[1] in ('audio', 'cuisine')]


def majority_share(train: Sequence[Row], test: Sequence[Row]) -> float:
  """Returns the accuracy of always answering the most common training label."""
  labels = [label for _, label in train]
  common = max(sorted(set(labels)), key=labels.count)
  return sum(label == common for _, label in test) / len(test)


def nearest_words(vectors: np.ndarray) -> list[list[str]]:
  """Returns the three vocabulary pieces nearest in direction to each vector.

  Args:
    vectors: [prompt, embed].

  Returns:
    For each vector of the prompt, its pieces, the nearest first.
  """
  from ptune.analysis import neighbours
  from ptune.convert.prompts import Prompt

  prompt = Prompt(vectors, '', 'npy', {})
  found = neighbours.neighbours(prompt, f'ptune://{MODEL}', top=3)
  return [
    [near['piece'].strip(neighbours.SPACE) for near in row['neighbours']]
    for row in found['rows']
  ]


# ---------------------------------------------------------------------- report


def before_and_after(
  rows: Sequence[Row], before: Sequence[str], after: Sequence[str]
) -> rich.table.Table:
  """Returns the frozen model's answers without and with the prompt."""
  table = rich.table.Table(box=rich.box.SIMPLE)
  for title in ('review', 'label', 'untrained prompt', 'tuned prompt'):
    table.add_column(title)
  for (text, label), old, new in zip(rows, before, after, strict=True):
    table.add_row(text, label, _told(old, label), _told(new, label))
  return table


def mixed_table(
  rows: Sequence[Row], names: Sequence[str], told: Sequence[str]
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


def comparison(
  others: Mapping[str, float], trained: Mapping[str, tuple[int, Learned]]
) -> rich.table.Table:
  """Returns a table of accuracies.

  Args:
    others: The accuracy of answers that need no training, by their title.
    trained: The bytes that were trained, and the results.
  """
  from ptune.model import model_info

  table = rich.table.Table(box=rich.box.SIMPLE)
  table.add_column('answers of')
  for title in ('test accuracy', 'trained', 'seconds'):
    table.add_column(title, justify='right')
  for title, accuracy in others.items():
    table.add_row(title, f'{accuracy:.1%}', '', '')
  for title, (size, learned) in trained.items():
    table.add_row(
      title,
      f'{learned.accuracy:.1%}',
      model_info.format_bytes(size),
      f'{learned.seconds:.1f}',
    )
  return table


def write(
  directory: pathlib.Path,
  reviews: Splits,
  prompts: Mapping[str, 'ptune.Tuned'],
  words: Mapping[str, list[list[str]]],
  curves: Mapping[str, Sequence[tuple[int, float]]],
  summary: Mapping[str, Any],
) -> None:
  """Writes all files, each of them whole or not at all; the summary is last."""
  folder = epath.Path(directory)
  for name, rows in zip(('train', 'dev', 'test'), reviews, strict=True):
    table = [('sentence', 'label'), *rows]
    text = ''.join(f'{sentence}\t{label}\n' for sentence, label in table)
    write_atomically(folder / f'{name}.tsv', text)
  sentences = [sentence for sentence, _ in reviews[-1][:SHOWN]]
  write_atomically(folder / 'sentences.txt', '\n'.join([*sentences, '']))
  for name, tuned in prompts.items():
    tuned.save(directory / f'{name}.npy')
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
    axes.plot(steps, accuracy, marker='.', label=name)
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
    help='training steps of the first prompt (%(default)s)',
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
