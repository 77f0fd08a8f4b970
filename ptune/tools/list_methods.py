"""`ptune methods`: the methods, and how many parameters each trains.

    ptune methods --size=t5_1_1_base --size=t5_1_1_xl

It counts with each method's default settings. It builds no model: it traces the
shapes of a network with one encoder and one decoder layer, and multiplies by
the number of layers.
"""

import argparse
from collections.abc import Iterable

from ptune import methods
from ptune.errors import UserError
from ptune.host.columns import aligned
from ptune.model.counts import counts
from ptune.model.sizes import SIZES, t5

DEFAULT = 't5_1_1_base'


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `ptune methods`."""
  del command
  parser.add_argument('name', nargs='*', help='a method (default: all of them)')
  parser.add_argument(
    '--size',
    action='append',
    default=[],
    help=f'{", ".join(SIZES)}, or all; may be repeated ({DEFAULT})',
  )


def run(args: argparse.Namespace) -> None:
  """Prints a table: a row for each method, a column for each size.

  Raises:
    ValueError: If a size or a method is unknown.
  """
  sizes = args.size or [DEFAULT]
  if 'all' in sizes:
    sizes = list(SIZES)
  known = methods.functions()
  unknown = sorted(set(args.name) - set(known))
  if unknown:
    raise UserError(f'no method {unknown}; there are {sorted(known)}')
  print(table(args.name or known, sizes))


def table(names: Iterable[str], sizes: Iterable[str]) -> str:
  """Returns a line for each method: '51,200 0.07%' for each size."""
  configs = {size: t5(size) for size in sizes}
  rows = [('method', *configs)]
  for name in names:
    method = methods.functions()[name]()
    row = []
    for config in configs.values():
      trained, whole = counts(config, method)
      row.append(f'{trained:,} {100 * trained / whole:.3g}%')
    rows.append((name, *row))
  return '\n'.join(aligned(rows, right=range(1, len(rows[0]))))
