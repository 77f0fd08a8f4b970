"""The power of scale, in miniature: prompts and full tuning over model sizes.

    python studies/scale.py --output_dir=/tmp/scale

pre-trains what is missing of ptune's models (each by `ptune.pretrained.make`,
into OUTPUT_DIR/models), tunes prompts and whole models on generated reviews,
and writes `results.jsonl`, `scale.png` (score against parameters, as Figure 1
of Lester et al. 2021) and `tables.md`. What is in results.jsonl is not done
again, so the command can be stopped and repeated. `--sizes` and `--seeds`
choose less; `--draw` only draws what was measured.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import figure

from ptune import demo, miniature, optim, pretrained, prompt_init
from ptune.methods import full, prompt
from ptune.tasks import generated_text

SIZES = ('nano', 'tiny', 'mini', 'midi')
STEPS = demo.STEPS
FULL_STEPS = STEPS // 3
ABLATED = 'tiny'
LENGTHS = (1, 5, 20, 100)
INITS = {
  'class labels': prompt_init.from_class_labels(
    fill=prompt_init.from_sampled_vocab(2000)
  ),
  'sampled vocabulary': prompt_init.from_sampled_vocab(2000),
  'random uniform': prompt_init.random_uniform(),
}
# What ABLATED is pre-trained on, and the mixture of that name.
OBJECTIVES = {
  'span corruption': 'generated_spans',
  '+ prefix LM': 'generated_text_only',
  '+ prefix tasks': 'generated_pretraining',
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One training: what is in a line of results.jsonl beside the scores."""

  size: str = ABLATED
  objective: str = '+ prefix tasks'
  method: str = 'prompt'
  length: int = demo.PROMPT_LENGTH
  init: str = 'class labels'
  seed: int = 0


def cases(sizes: Sequence[str], seeds: int) -> Iterator[Case]:
  """All trainings, those of the figure first."""
  for seed in range(seeds):
    for size in sizes:
      yield Case(size, seed=seed)
      yield Case(size, method='full', seed=seed)
  if ABLATED in sizes:
    for seed in range(seeds):
      yield from (Case(length=length, seed=seed) for length in LENGTHS)
      yield from (Case(init=init, seed=seed) for init in INITS)
    for seed in range(seeds):
      for objective in OBJECTIVES:
        yield Case(objective=objective, seed=seed)
        yield Case(objective=objective, method='full', seed=seed)


def model_directory(case: Case, models: pathlib.Path) -> pathlib.Path:
  """The base model of a case; made if it is not there."""
  usual = case.objective == '+ prefix tasks'
  if usual and case.size in pretrained.names():
    return pretrained.directory(case.size)
  name = case.size
  if not usual:
    name += '-' + OBJECTIVES[case.objective].removeprefix('generated_')
  directory = models / name
  if not (directory / 'config.json').exists():
    start = time.monotonic()
    subprocess.run(
      [
        *(sys.executable, '-m', 'ptune.pretrained.make'),
        f'--model={case.size}',
        f'--output={directory}',
        '--gin_bindings',
        f"MIXTURE_OR_TASK_NAME='{OBJECTIVES[case.objective]}'",
      ],
      check=True,
    )
    print(f'{name}: pre-trained in {time.monotonic() - start:.0f} seconds')
  return directory


def measure(case: Case, directory: pathlib.Path) -> dict[str, Any]:
  """Runs one training."""
  config, base = miniature.load(directory)
  if case.method == 'full':
    method, steps = full.full(), FULL_STEPS
    tx = miniature.full_optimizer(steps)
  else:
    method, steps = prompt.prompt(case.length, INITS[case.init]), STEPS
    tx = optim.adafactor(0, optim.schedule(0.3, 'linear', 0, steps))
  tuner = miniature.Tuner(config, base, method, tx, miniature.Pieces())
  cpu = time.process_time()
  rows = demo.splits(generated_text.reviews, case.seed)
  tuned = tuner('', rows, steps, case.seed)
  return dataclasses.asdict(case) | {
    'parameters': sum(x.size for x in base.values()),
    'trained': tuned.nbytes // 4,
    'untrained': tuned.untrained,
    'accuracy': tuned.accuracy,
    'cpu_seconds': round(time.process_time() - cpu, 1),
  }


def naive_bayes(train: Sequence[miniature.Row], test: Sequence[miniature.Row]):
  """The accuracy of naive Bayes over words, with add-one smoothing."""
  labels = sorted({label for _, label in train})
  words = {w: i for i, w in enumerate(sorted(_words(train)))}
  counts = np.ones((len(labels), len(words)))
  for text, label in train:
    for word in text.split():
      counts[labels.index(label), words[word]] += 1
  prior = [sum(found == label for _, found in train) for label in labels]
  likelihood = np.log(counts / counts.sum(1, keepdims=True))
  right = 0
  for text, label in test:
    known = [words[w] for w in text.split() if w in words]
    score = np.log(prior) + likelihood[:, known].sum(1)
    right += labels[int(np.argmax(score))] == label
  return right / len(test)


def _words(rows: Sequence[miniature.Row]) -> set[str]:
  return {word for text, _ in rows for word in text.split()}


# --------------------------------------------------------------------- results


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The measurements so far."""
  return [json.loads(x) for x in path.read_text().splitlines()]


def select(results, **wanted) -> list[dict[str, Any]]:
  """The results of cases with the given fields, the others as usual."""
  usual = dataclasses.asdict(Case()) | wanted
  usual.pop('seed')
  return [r for r in results if all(r[k] == v for k, v in usual.items())]


def told(results) -> str:
  """'94.4 (93.2-96.3, 3 seeds)', or a dash."""
  if not results:
    return '-'
  scores = [100 * r['accuracy'] for r in results]
  if len(scores) == 1:
    return f'{scores[0]:.1f} (1 seed)'
  return (
    f'{np.mean(scores):.1f} ({min(scores):.1f}-{max(scores):.1f},'
    f' {len(scores)} seeds)'
  )


def tables(results) -> str:
  """Everything that was measured, in Markdown."""
  bayes = [
    naive_bayes(rows[0], rows[2])
    for rows in (demo.splits(generated_text.reviews, seed) for seed in range(3))
  ]
  lines = ['| model | parameters | prompt | full tuning |', '|---|---|---|---|']
  for size in SIZES:
    prompts = select(results, size=size)
    if prompts:
      everything = select(results, size=size, method='full')
      lines.append(
        f'| {size} | {prompts[0]["parameters"]:,} | {told(prompts)}'
        f' | {told(everything)} |'
      )
  lines += [
    '',
    f'Naive Bayes {100 * np.mean(bayes):.1f}, majority 50.0.',
    '',
    f'| {ABLATED}: what differs | prompt | full tuning |',
    '|---|---|---|',
  ]
  for length in LENGTHS:
    lines.append(
      f'| prompt length {length} | {told(select(results, length=length))} | |'
    )
  for init in INITS:
    lines.append(f'| starts as {init} | {told(select(results, init=init))} | |')
  for objective in OBJECTIVES:
    prompts = select(results, objective=objective)
    everything = select(results, objective=objective, method='full')
    lines.append(
      f'| pre-trained on {objective} | {told(prompts)} | {told(everything)} |'
    )
  return '\n'.join([*lines, ''])


def draw(results, path: pathlib.Path) -> None:
  """Score against parameters, mean and spread over the seeds."""
  fig = figure.Figure(figsize=(5.5, 3.6), layout='constrained')
  axes = fig.subplots()
  for method, label in (('full', 'full tuning'), ('prompt', 'prompt')):
    found = [select(results, size=size, method=method) for size in SIZES]
    found = [group for group in found if group]
    x = [group[0]['parameters'] for group in found]
    scores = [[100 * r['accuracy'] for r in group] for group in found]
    mean = np.array([np.mean(s) for s in scores])
    spread = np.array(
      [mean - [min(s) for s in scores], [max(s) for s in scores] - mean]
    )
    axes.errorbar(x, mean, spread, marker='o', capsize=3, label=label)
  axes.axhline(50, color='grey', ls=':', label='majority class')
  axes.set(
    xscale='log',
    xlabel='parameters of the model',
    ylabel='test accuracy, %',
    ylim=(40, 102),
  )
  axes.legend(loc='lower right')
  fig.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--output_dir', required=True)
  parser.add_argument('--sizes', nargs='+', default=SIZES, choices=SIZES)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--draw', action='store_true', help='measure nothing')
  args = parser.parse_args(argv)
  directory = pathlib.Path(args.output_dir)
  directory.mkdir(parents=True, exist_ok=True)
  records = directory / 'results.jsonl'
  records.touch()
  done = read(records)
  for case in [] if args.draw else cases(args.sizes, args.seeds):
    if any(dataclasses.asdict(case).items() <= r.items() for r in done):
      continue
    base = model_directory(case, directory / 'models')
    done.append(measure(case, base))
    print(json.dumps(done[-1]), flush=True)
    with records.open('a') as file:
      file.write(json.dumps(done[-1]) + '\n')
  draw(done, directory / 'scale.png')
  (directory / 'tables.md').write_text(tables(done))
  print(tables(done))
  return 0


if __name__ == '__main__':
  sys.exit(main())
