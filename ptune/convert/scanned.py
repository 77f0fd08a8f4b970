"""Checkpoints of scanned layers, which have one array for a stack's layers.

T5X stacks the parameters of layers on axis 1, and some of its networks keep
attention heads on a separate axis:

    encoder/encoder/mlp/wo/kernel           [mlp, layers, embed]
    encoder/encoder/attention/query/kernel  [embed, layers, heads, kv]
    -> encoder/layers_0/mlp/wo/kernel         [mlp, embed]
       encoder/layers_0/attention/query/kernel  [embed, joined_kv]
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ptune.convert.source import Index, Leaf, Shape
from ptune.errors import UserError

# The paths at which T5X stacks the layers.
AXIS = 1
_STACKED = re.compile(r'(encoder|decoder)/(?!layers_\d)\w+/(.+)')


class _Block:
  """The last block that was read of a stacked array.

  Consecutive layers share it, so that a chunk with all layers is read once.
  """

  def __init__(self):
    self._key: Any = None
    self._block: np.ndarray | None = None

  def read(self, name: str, leaf: Leaf, index: Index) -> np.ndarray:
    key = name, tuple((s.start, s.stop) for s in index)
    if self._block is None or key != self._key:
      self._block = None  # Never hold two.
      self._block, self._key = leaf.fetch(index), key
    return self._block


def unrolled(path: Any, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
  """Gives each layer its own leaves; keeps the leaves of unscanned layers.

  Args:
    path: The checkpoint, for errors.
    leaves: Its parameters, by T5X's path.

  Raises:
    UserError: The stacked arrays differ in the number of layers.
  """
  block = _Block()
  found: dict[str, Leaf] = {}
  counts: dict[str, int] = {}
  scanned = _scanned(leaves)
  for name, leaf in leaves.items():
    match = _STACKED.fullmatch(name)
    if match is None or name.rsplit('/', name.count('/') - 1)[0] not in scanned:
      found[name] = _joined(name, leaf)
      continue
    count = counts[name] = leaf.shape[AXIS]
    for i in range(count):
      layer = _layer(block, name, leaf, i)
      own = f'{match[1]}/layers_{i}/{match[2]}'
      found[own] = _joined(own, layer)
  stacks: dict[str, set[int]] = {}
  for name, count in counts.items():
    stacks.setdefault(name.split('/')[0], set()).add(count)
  if any(len(different) > 1 for different in stacks.values()):
    raise UserError(
      f'{path} was trained with scanned layers, but its arrays differ in the'
      ' number of layers, on axis 1:\n'
      + '\n'.join(f'  {name} {list(leaves[name].shape)}' for name in counts)
    )
  return found


def _scanned(leaves: Mapping[str, Leaf]) -> set[str]:
  """Returns modules such as encoder/encoder that have stacked kernels."""
  return {
    '/'.join(name.split('/')[:2])
    for name, leaf in leaves.items()
    if _STACKED.fullmatch(name)
    and name.endswith('/kernel')
    and len(leaf.shape) > 2
  }


def _layer(block: _Block, name: str, leaf: Leaf, i: int) -> Leaf:
  """Returns one layer of a stacked leaf."""
  every = slice(0, leaf.shape[AXIS])

  def fetch(index: Index) -> np.ndarray:
    whole = (*index[:AXIS], every, *index[AXIS:])
    return block.read(name, leaf, whole)[(slice(None),) * AXIS + (i,)]

  return Leaf(_without(leaf.shape), leaf.dtype, fetch)


def _without(shape: Shape) -> Shape:
  return (*shape[:AXIS], *shape[AXIS + 1 :])


def _joined(name: str, leaf: Leaf) -> Leaf:
  """Returns an attention kernel with heads and head size on one axis."""
  kernel = re.search(r'attention/(query|key|value|out)/kernel$', name)
  if not kernel or len(leaf.shape) != 3:
    return leaf
  # [embed, heads, kv], or [heads, kv, embed].
  first = 0 if kernel[1] == 'out' else 1
  size = leaf.shape[first + 1]
  shape = list(leaf.shape)
  shape[first : first + 2] = [shape[first] * size]

  def fetch(index: Index) -> np.ndarray:
    """Reads whole heads, then cuts out the requested slices."""
    wanted = index[first]
    heads = slice(wanted.start // size, -(-wanted.stop // size))
    within = (*index[:first], heads, slice(0, size), *index[first + 1 :])
    part = leaf.fetch(within)
    rows = list(part.shape)
    rows[first : first + 2] = [-1]
    start = wanted.start - heads.start * size
    cut = [slice(None)] * 2
    cut[first] = slice(start, start + wanted.stop - wanted.start)
    return part.reshape(rows)[tuple(cut)]

  return Leaf(tuple(shape), leaf.dtype, fetch)
