"""The table of all parameters that a run writes to `model-info.txt`."""

import math

import jax

from ptune.host.columns import aligned
from ptune.model.frozen_weights import shapes, shapes_by_layer
from ptune.model.parameters import Plan


def table(plan: Plan) -> str:
  """One row for each parameter: name, shape, type, axes, bytes."""
  rows = [('name', 'shape', 'dtype', 'axes', '', 'bytes')]
  for path, x in (plan.select(plan.trainable) | shapes_by_layer(plan)).items():
    rows.append(
      (
        path,
        str(list(x.shape)),
        x.dtype.name,
        ', '.join(plan.axes.get(path, ())),
        'trainable' if path in plan.trainable else 'frozen',
        f'{nbytes(x):,}',
      )
    )
  return '\n'.join([summary(plan), '', *aligned(rows, right={5}), ''])


def summary(plan: Plan) -> str:
  """One line: counts and bytes of trained and frozen parameters; the mesh."""
  parts = []
  for name, paths in (
    ('trainable', plan.trainable),
    ('frozen', plan.frozen),
  ):
    count = sum(math.prod(x.shape) for x in plan.select(paths).values())
    kept = shapes(plan) if paths == plan.frozen else plan.select(paths)
    size = sum(map(nbytes, kept.values()))
    parts.append(f'{name} {count:,} parameters ({format_bytes(size)})')
  mesh = ' x '.join(f'{n} {axis}' for axis, n in plan.mesh.shape.items())
  return f'{plan.method.name}: {", ".join(parts)}, on a mesh of {mesh}'


def nbytes(x: jax.ShapeDtypeStruct) -> int:
  """Bytes of one copy of an array."""
  return math.prod(x.shape) * x.dtype.itemsize


def format_bytes(n: float) -> str:
  """204800 -> '204.8 kB'."""
  for unit in ('bytes', 'kB', 'MB', 'GB'):
    if n < 1000 or unit == 'GB':
      return f'{n:,.0f} {unit}' if unit == 'bytes' else f'{n:,.1f} {unit}'
    n /= 1000
  raise AssertionError
