"""An opened checkpoint, and `restore`, which puts it on the devices.

A reader (`t5x`, `orbax_state`, `huggingface`) turns a directory into a
`Source`: leaves under T5X's parameter names, which are read slice by slice on
demand. Only `restore` turns them into arrays.
"""

import ctypes
import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptune.errors import UserError
from ptune.model import frozen_weights, parameters, scan
from ptune.model.sizes import TokenIds
from ptune.model.t5gemma_sizes import T5GemmaConfig

Index = tuple[slice, ...]
Shape = tuple[int, ...]

EMBEDDING = parameters.EMBEDDING
LOGITS = 'decoder/logits_dense/kernel'
DECODER_EMBEDDING = 'decoder_token_embedder/embedding'

# Values to process at once; this bounds the memory of temporaries.
_PART = 1 << 22
# Bytes to read before freed memory is returned to the system.
_WORTH = 1 << 24


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter in a file.

  Attributes:
    shape: Its shape, in T5X's orientation.
    dtype: Its dtype as stored.
    fetch: Reads the given slices; the reader of the format provides it.
  """

  shape: Shape
  dtype: np.dtype
  fetch: Callable[[Index], np.ndarray] = dataclasses.field(repr=False)

  def read(self, index: Index | None = None) -> np.ndarray:
    """Reads a block as stored, and nothing else.

    Args:
      index: One slice a dimension, of step 1; None reads everything.

    Returns:
      The block, of dtype `self.dtype`.
    """
    index = _bounds(index, self.shape)
    block = self.fetch(index)
    assert block.shape == tuple(s.stop - s.start for s in index), block.shape
    return block


@dataclasses.dataclass(frozen=True)
class Source:
  """The parameters of a checkpoint.

  Attributes:
    path: The checkpoint's path.
    kind: 't5x', 't5x_orbax', 'huggingface' or 'ptune'.
    step: The training step at which it was saved; None if there is none.
    leaves: The model's parameters, by T5X's path.
    activations: MLP activations, as in T5Config; None if the files do not say
      (the parameters' names still give `gated`).
    scaled: Whether the output layer's input is scaled; None if the files do not
      say.
    ids: The special tokens; None if the files do not say.
    attention: local_radius and global_block_size, as in T5Config; None if the
      files do not say.
    config: The whole configuration, for a T5Gemma whose files give it.
    ignored: The names of other contents, which are never read: optimizer state,
      second copies. With their bytes, or None if the files do not say.
  """

  path: str
  kind: str
  step: int | None
  leaves: Mapping[str, Leaf]
  activations: tuple[str, ...] | None = None
  scaled: bool | None = None
  ids: TokenIds | None = None
  attention: tuple[int, int] | None = None
  config: T5GemmaConfig | None = None
  ignored: Mapping[str, int | None] = dataclasses.field(default_factory=dict)

  @property
  def shapes(self) -> dict[str, Shape]:
    return {path: leaf.shape for path, leaf in self.leaves.items()}

  @property
  def tied(self) -> bool:
    """Whether the (scaled) embedding makes the logits: there is no kernel."""
    return EMBEDDING in self.leaves and LOGITS not in self.leaves

  @property
  def gated(self) -> bool | None:
    """Whether the MLP has two input kernels; None without any MLP."""
    return sizes(self.shapes).get('gated')

  @property
  def where(self) -> str:
    """'t5x checkpoint /models/base of step 1100000'."""
    step = '' if self.step is None else f' of step {self.step}'
    return f'{self.kind} checkpoint {self.path}{step}'

  def describe(self) -> str:
    """Describes its kind and size, on a line or two."""
    count = sum(math.prod(leaf.shape) for leaf in self.leaves.values())
    dtypes = sorted({leaf.dtype.name for leaf in self.leaves.values()})
    facts = [f'{len(self.leaves)} leaves, {count:,} values']
    facts += [' and '.join(dtypes)] if dtypes else []
    facts += [f'{k} {v}' for k, v in sizes(self.shapes).items()]
    if self.activations:
      facts.append(f'mlp_activations {self.activations}')
    return f'{self.where}: {", ".join(facts)}'


def sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Returns the sizes of a T5Config that its parameters' shapes give.

  Args:
    shapes: Shapes by T5X path: {'token_embedder/embedding': (128, 32), ...}.

  Returns:
    Those of vocab_size, emb_dim, num_heads, head_dim, mlp_dim, gated,
    num_encoder_layers, num_decoder_layers, relative_attention_num_buckets,
    relative_attention_per_layer, decoder_embedding and logits_via_embedding
    that the shapes give, under these names.
  """

  def matrix(pattern: str) -> Shape | None:
    found = (s for p, s in shapes.items() if fnmatch.fnmatchcase(p, pattern))
    return next((shape for shape in found if len(shape) == 2), None)

  def layers(stack: str) -> int:
    found = (re.match(rf'{stack}/layers_(\d+)/', path) for path in shapes)
    return len({match[1] for match in found if match})

  result: dict[str, Any] = {}
  if embedding := matrix(EMBEDDING):
    result['vocab_size'], result['emb_dim'] = embedding
  bias = matrix('*/relpos_bias/rel_embedding')  # [heads, buckets]
  query = matrix('*/layers_*/*attention/query/kernel')  # [embed, joined_kv]
  if bias:
    result['num_heads'] = bias[0]
    if query and bias[0]:
      result['head_dim'] = query[1] // bias[0]
    result['relative_attention_num_buckets'] = bias[1]
    result['relative_attention_per_layer'] = (
      matrix('*/layers_*/relpos_bias/rel_embedding') is not None
    )
  if mlp := matrix('*/layers_*/mlp/wi*/kernel'):
    result['mlp_dim'] = mlp[1]
    result['gated'] = matrix('*/layers_*/mlp/wi_1/kernel') is not None
  for stack in ('encoder', 'decoder'):
    if count := layers(stack):
      result[f'num_{stack}_layers'] = count
  if EMBEDDING in shapes:
    result['logits_via_embedding'] = LOGITS not in shapes
    result['decoder_embedding'] = DECODER_EMBEDDING in shapes
  return result


def with_rows(plan: parameters.Plan, source: Source) -> parameters.Plan:
  """Returns the plan with `rows`, which reads embedding rows of a checkpoint.

  The process that asks reads each row once, on the host.
  """

  @functools.lru_cache(maxsize=1)
  def read(ids):
    table = source.leaves[EMBEDDING]
    blocks = [table.read((slice(i, i + 1), slice(None))) for i in ids]
    return frozen_weights.rounded_rows(plan, np.concatenate(blocks))

  def rows(ids):
    return read(tuple(map(int, ids)))

  return dataclasses.replace(plan, rows=rows)


def restore(
  source: Source,
  abstract: Mapping[str, jax.ShapeDtypeStruct],
  *,
  dtype: Any = None,
  ignore: Callable[[str], bool] | Iterable[str] = (),
) -> dict[str, jax.Array]:
  """Reads the parameters of a model, all of them and no others.

  Each leaf goes straight into its sharding. This process reads the part that
  its devices hold, once, casts it on the host, and continues with the next
  leaf. The largest leaves come first, while the devices hold little. So the
  memory for reading and casting never exceeds the largest leaf by much.

  Args:
    source: From `open_checkpoint`.
    abstract: Shape, dtype and (optionally) sharding of each parameter, by path.
      Without a sharding it goes to the default device.
    dtype: Replaces the dtypes of `abstract`.
    ignore: Paths that the checkpoint may have beyond `abstract`: a predicate,
      or patterns in which `*` matches any text, including `/`.

  Returns:
    The arrays, by path, in the order of `abstract`.

  Raises:
    ValueError: Parameters are missing, unexpected or of another shape (the
      error lists all, before anything is read), or a value is NaN or infinite.
  """
  _check(source, abstract, _predicate(ignore))
  arrays, broken = {}, {}
  # Layers that share an array of the checkpoint are read consecutively.
  freed = Freed()
  order = lambda path: (-nbytes(source.leaves[path]), scan.of_all(path))
  for path in sorted(abstract, key=order):
    spec = abstract[path]
    cast = jnp.dtype(spec.dtype if dtype is None else dtype)
    arrays[path], finite = _place(source.leaves[path], spec, cast)
    freed.count(nbytes(source.leaves[path]))
    freed.give_back()
    if not finite:
      broken[path] = f'  {path} {_text(spec.shape)} as {cast.name}'
  if broken:
    raise UserError(
      f'{len(broken)} parameters have values that are NaN or infinite:\n'
      + '\n'.join(broken[path] for path in abstract if path in broken)
      + f'\nin the {source.describe()}\nThe checkpoint is damaged, or was '
      'written after its training diverged, or its values do not fit the '
      'dtype; use an earlier one or float32.'
    )
  return {path: arrays[path] for path in abstract}


def _bounds(index: Index | None, shape: Shape) -> Index:
  """Returns slices with start and stop: (slice(None), slice(2)) -> 0:n, 0:2."""
  if index is None:
    index = (slice(None),) * len(shape)
  assert len(index) == len(shape), (index, shape)
  found = [s.indices(n) for s, n in zip(index, shape, strict=True)]
  assert all(step == 1 for _, _, step in found), index
  return tuple(slice(start, max(start, stop)) for start, stop, _ in found)


def _predicate(
  ignore: Callable[[str], bool] | Iterable[str],
) -> Callable[[str], bool]:
  if callable(ignore):
    return ignore
  patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
  return lambda path: any(fnmatch.fnmatchcase(path, p) for p in patterns)


def _text(shape: Iterable[int]) -> str:
  return str(list(shape))


def _check(
  source: Source,
  abstract: Mapping[str, jax.ShapeDtypeStruct],
  ignore: Callable[[str], bool],
) -> None:
  """Compares names and shapes; raises one error with all differences."""
  expected = {path: tuple(spec.shape) for path, spec in abstract.items()}
  got = source.shapes
  groups = {
    'missing in the checkpoint': [
      f'{path} {_text(expected[path])}'
      for path in sorted(expected.keys() - got.keys())
    ],
    'unexpected in the checkpoint': [
      f'{path} {_text(got[path])}'
      for path in sorted(got.keys() - expected.keys())
      if not ignore(path)
    ],
    'of another shape': [
      f'{path}: got {_text(got[path])}, expected {_text(expected[path])}'
      for path in sorted(expected.keys() & got.keys())
      if expected[path] != got[path]
    ],
  }
  if not any(groups.values()):
    return
  lines = ['The checkpoint does not fit the model; nothing was restored.']
  for title, offenders in groups.items():
    if offenders:
      lines.append(f'{len(offenders)} {title}:')
      lines += [f'  {offender}' for offender in offenders]
  lines.append(f'Given: {source.describe()}')
  ours, theirs = sizes(expected), sizes(got)
  differing = [
    f'{key} is {theirs[key]}, in the model {ours[key]}'
    for key in ours
    if key in theirs and ours[key] != theirs[key]
  ]
  if differing:
    lines.append('Its ' + '; its '.join(differing) + '.')
  lines.append(
    'The gin file may be for another size or family; use the models/*.gin '
    'of this checkpoint.'
  )
  raise UserError('\n'.join(lines))


def _place(
  leaf: Leaf, spec: jax.ShapeDtypeStruct, dtype: np.dtype
) -> tuple[jax.Array, bool]:
  """Puts one leaf on its devices; returns also whether all of it is finite."""
  # On several hosts, read only the part that this host's devices cover.
  held = _cover(spec.sharding, leaf.shape)
  whole = leaf.read(held)
  blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
  finite = True

  def block(index: Index | None) -> np.ndarray:
    nonlocal finite
    index = _bounds(index, leaf.shape)
    # Slices are unhashable before Python 3.12.
    key = tuple((s.start, s.stop) for s in index)
    if key not in blocks:
      within = tuple(
        slice(s.start - h.start, s.stop - h.start)
        for s, h in zip(index, held, strict=True)
      )
      # A value too large for the dtype becomes infinite here. We report that
      # later, so numpy need not warn.
      with np.errstate(over='ignore', invalid='ignore'):
        blocks[key] = whole[within].astype(dtype, copy=False)
      finite = finite and is_finite(blocks[key])
    return blocks[key]

  if spec.sharding is None:
    array = jax.device_put(block(None))
  else:
    array = jax.make_array_from_callback(leaf.shape, spec.sharding, block)
  return array, finite


class Freed:
  """Counts memory that TensorStore's threads have freed, and gives it back.

  glibc keeps it for each thread. Over a whole checkpoint that would add up to
  more than the largest leaf. In a large process one call of malloc_trim takes
  tenths of a second, so it waits until enough has been read.
  """

  def __init__(self):
    self._bytes = 0

  def count(self, nbytes: int) -> None:
    """Notes that a leaf of `nbytes` was read."""
    self._bytes += nbytes

  def give_back(self) -> None:
    """Returns freed memory to the system after every 16 MiB of leaves."""
    if self._bytes < _WORTH:
      return
    self._bytes = 0
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
      trim(0)


def _cover(sharding: jax.sharding.Sharding | None, shape: Shape) -> Index:
  """Returns the smallest block that contains all of this process's parts."""
  if sharding is None:
    return _bounds(None, shape)
  indices = sharding.addressable_devices_indices_map(shape).values()
  blocks = [_bounds(index, shape) for index in indices]
  return tuple(
    slice(min(s.start for s in along), max(s.stop for s in along))
    for along in zip(*blocks, strict=True)
  )


def nbytes(leaf: Leaf) -> int:
  """Returns the bytes of a leaf, as stored."""
  return math.prod(leaf.shape) * leaf.dtype.itemsize


def is_finite(block: np.ndarray) -> bool:
  """Returns whether all values are finite; needs little memory of its own."""
  return all(bool(np.isfinite(part).all()) for part in parts(block))


def parts(block: np.ndarray) -> Iterator[np.ndarray]:
  """Cuts along the first dimension into parts of bounded size."""
  if block.ndim == 0:
    yield block
    return
  rows = max(1, _PART // max(1, math.prod(block.shape[1:])))
  for start in range(0, block.shape[0], rows):
    yield block[start : start + rows]
