"""`ptune similarity`: compares prompts, and finds those to start from.

Vu et al. 2022, "SPoT" (arXiv 2110.07904), section 4, use a prompt as an
embedding of its task. They compare prompts A [m, embed] and B [n, embed], with
rows a_i and b_j, by two measures:

    average_tokens  cos(mean_i a_i, mean_j b_j)
    per_token       mean_ij cos(a_i, b_j)

A prompt of a similar task is a good start for a new one:
`prompts/from_prompts.gin` starts training from one prompt, or from the mean of
several.

    ptune similarity sentiment.npy topics.npy --output=alike
    ptune similarity runs/mine --directory=runs --top=3
"""

import argparse
import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table
from etils import epath

from ptune.analysis import figures
from ptune.analysis.neighbours import normalised
from ptune.convert.prompts import REFERENCE_FILE, find, name_of, read_prompt
from ptune.errors import UserError
from ptune.host.files import write_atomically

MEASURES = ('average_tokens', 'per_token')


def similarities(
  prompts: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Computes both measures for all pairs of prompts.

  Args:
    prompts: Prompts [prompt, embed] by name; their lengths may differ.

  Returns:
    A symmetric matrix [prompts, prompts] for each measure. The diagonal of
    average_tokens is 1. The diagonal of per_token is lower for prompts whose
    own rows differ more.

  Raises:
    ValueError: If the widths of the prompts differ.
  """
  widths = {name: array.shape[1] for name, array in prompts.items()}
  if len(set(widths.values())) > 1:
    raise UserError(
      'prompts can be compared only if their widths are equal:\n'
      + '\n'.join(f'  {name}: embed is {n}' for name, n in widths.items())
    )
  means = normalised(np.stack([p.mean(axis=0) for p in prompts.values()]))
  # The mean of the cosines of all pairs is the product of the mean directions.
  directions = np.stack([normalised(p).mean(axis=0) for p in prompts.values()])
  return {
    'average_tokens': means @ means.T,
    'per_token': directions @ directions.T,
  }


def read_all(paths: Sequence[str]) -> dict[str, np.ndarray]:
  """Reads prompts, and names each by a unique end of its path.

  runs/sst2/prompts/best.npy, runs/mnli -> {'sst2': ..., 'mnli': ...}
  """
  files = [str(find(path)) for path in paths]
  return {
    name: read_prompt(file).array
    for name, file in zip(names(files), files, strict=True)
  }


def names(files: Sequence[str]) -> list[str]:
  """Short names of files; all are different."""
  parts = []
  for file in files:
    path = epath.Path(os.path.abspath(file))
    if path.parent.name == 'prompts':  # The name of the run is more useful.
      step = [] if path.stem == 'best' else [path.stem]
      parts.append([*path.parent.parent.parts, *step])
    else:
      parts.append([*path.parent.parts, name_of(path)])
  for length in range(1, max(map(len, parts), default=0) + 1):
    short = ['/'.join(p[-length:]) for p in parts]
    if len(set(short)) == len(files):
      return short
  again = sorted({f for f in files if files.count(f) > 1})
  raise UserError(f'these prompts are named twice: {", ".join(again or files)}')


def library(directory: epath.PathLike) -> list[str]:
  """The prompts in a directory: its .npy files, and those of its runs.

  Raises:
    ValueError: If it is not a directory, or has no prompts.
  """
  place = epath.Path(directory)
  if not place.is_dir():
    raise UserError(f'--directory={directory} is not a directory')
  files = []
  for child in sorted(place.iterdir()):
    if child.name.startswith('.'):
      continue
    file = find(child)
    if file.suffix == '.npy' or file.name == REFERENCE_FILE:
      files.append(str(file))
  if not files:
    raise UserError(
      f'--directory={directory} has no prompts; expected .npy files or'
      ' directories of runs'
    )
  return files


def retrieve(
  target: str, directory: epath.PathLike, top: int, measure: str
) -> list[dict[str, Any]]:
  """The prompts of a directory that are most similar to a target.

  Leaves out prompts of another width, and the target itself.

  Returns:
    A dict for each, the most similar first: `prompt` (its file), and both
    measures.

  Raises:
    ValueError: If there are none.
  """
  place = find(target)
  own = read_prompt(place).array
  found = []
  for file in library(directory):
    if os.path.realpath(file) == os.path.realpath(place):
      continue
    array = read_prompt(file).array
    if array.shape[1] == own.shape[1]:
      both = similarities({'target': own, 'source': array})
      values = {m: float(matrix[0, 1]) for m, matrix in both.items()}
      found.append({'prompt': file, **values})
  if not found:
    raise UserError(
      f'--directory={directory} has no other prompt of width {own.shape[1]}'
    )
  return sorted(found, key=lambda source: -source[measure])[:top]


# ---------------------------------------------------------------------- output


def write(
  directory: epath.Path,
  named: Sequence[str],
  matrices: Mapping[str, np.ndarray],
) -> list[str]:
  """Writes similarity.json, .png and .svg, and a CSV of each measure.

  Returns:
    The names of the files.
  """
  directory.mkdir(parents=True, exist_ok=True)
  files = []
  for measure, matrix in matrices.items():
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['', *named])
    writer.writerows(
      [name, *(f'{x:.6f}' for x in row)]
      for name, row in zip(named, matrix, strict=True)
    )
    files.append(f'{measure}.csv')
    write_atomically(directory / files[-1], text.getvalue())
  files.append('similarity.json')
  write_atomically(
    directory / files[-1], json.dumps(as_json(named, matrices), indent=2) + '\n'
  )
  return files + figures.save(draw(named, matrices), directory, 'similarity')


def as_json(
  named: Sequence[str], matrices: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns {'prompts': names, 'average_tokens': rows of a matrix, ...}."""
  return {
    'prompts': list(named),
    **{m: matrix.astype(float).tolist() for m, matrix in matrices.items()},
  }


def draw(named: Sequence[str], matrices: Mapping[str, np.ndarray]):
  """Draws a heat map of each measure, with numbers if they fit in the cells."""
  from matplotlib import figure

  count = len(named)
  size = 2.2 + 0.55 * min(count, 24)
  fig = figure.Figure(
    figsize=(size * len(matrices) + 1, size), layout='constrained'
  )
  panels = fig.subplots(1, len(matrices), squeeze=False)[0]
  for axes, (measure, matrix) in zip(panels, matrices.items(), strict=True):
    image = axes.imshow(matrix, cmap='RdBu_r', vmin=-1, vmax=1)
    axes.set_title(measure.replace('_', ' '))
    axes.set_xticks(range(count), named, rotation=45, ha='right')
    axes.set_yticks(range(count), named)
    if count <= 16:
      for (i, j), value in np.ndenumerate(matrix):
        colour = 'white' if abs(value) > 0.6 else 'black'
        axes.text(
          j, i, f'{value:.2f}', ha='center', va='center', color=colour, size=8
        )
  fig.colorbar(image, ax=list(panels), shrink=0.8, label='cosine')
  return fig


def table(named: Sequence[str], matrix: np.ndarray, title: str):
  """Makes a table of a matrix, for the terminal."""
  shown = rich.table.Table(box=rich.box.SIMPLE, title=title)
  shown.add_column('')
  for i in range(len(named)):
    shown.add_column(str(i), justify='right')
  for i, (name, row) in enumerate(zip(named, matrix, strict=True)):
    shown.add_row(f'{i} {name}', *(f'{value:.3f}' for value in row))
  return shown


# ---------------------------------------------------------------- command line


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `ptune similarity`."""
  del command
  parser.add_argument(
    'prompt', nargs='+', help='two or more MODEL_DIRs or prompt files'
  )
  parser.add_argument(
    '--directory',
    help='a directory of prompts or runs; finds those most similar to the one'
    ' prompt',
  )
  parser.add_argument(
    '--top',
    type=int,
    default=5,
    help='the number of prompts to find (default: %(default)s)',
  )
  parser.add_argument(
    '--measure',
    choices=MEASURES,
    default='average_tokens',
    help='the measure to sort by',
  )
  parser.add_argument(
    '--output', help='a directory for CSV, JSON and the heat map (PNG, SVG)'
  )
  parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> None:
  """Runs the command line.

  Raises:
    ValueError, OSError: For errors that users can fix.
  """
  console = rich.console.Console(highlight=False, markup=False)
  if args.directory:
    if len(args.prompt) != 1 or args.output:
      raise UserError(
        '--directory takes one prompt and no --output; leave it out to compare'
        ' prompts with each other'
      )
    if args.top < 1:
      raise UserError(f'--top is {args.top}; expected at least 1')
    found = retrieve(args.prompt[0], args.directory, args.top, args.measure)
    if args.json:
      print(json.dumps(found))
    else:
      show_sources(found, console)
    return
  if len(args.prompt) < 2:
    raise UserError(
      'one prompt cannot be compared with itself; name another one, or a'
      ' --directory of prompts'
    )
  prompts = read_all(args.prompt)
  matrices = similarities(prompts)
  named = list(prompts)
  if args.json:
    print(json.dumps(as_json(named, matrices)))
  else:
    for measure, matrix in matrices.items():
      console.print(table(named, matrix, measure.replace('_', ' ')))
  if args.output:
    files = write(epath.Path(args.output), named, matrices)
    if not args.json:
      print(f'written to {args.output}: {", ".join(files)}')


def show_sources(
  found: Sequence[Mapping[str, Any]], console: rich.console.Console
) -> None:
  """Prints the result of `retrieve`, and the flags that start from it."""
  shown = rich.table.Table(box=rich.box.SIMPLE)
  shown.add_column('prompt', overflow='fold')
  for measure in MEASURES:
    shown.add_column(measure.replace('_', ' '), justify='right')
  for source in found:
    shown.add_row(
      source['prompt'], *(f'{source[measure]:.3f}' for measure in MEASURES)
    )
  console.print(shown)
  files = [source['prompt'] for source in found]
  console.print(
    'To start from their mean: --gin_file=prompts/from_prompts.gin'
    f' --gin.SOURCE_PROMPTS="{files}"',
    soft_wrap=True,
  )
