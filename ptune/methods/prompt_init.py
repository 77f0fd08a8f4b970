"""Where a soft prompt starts: at random, from the vocabulary, from a file.

An initialiser is a function `init(rng, shape, base) -> [prompt, embed]`
float32. It runs once, on the host, after the frozen weights are restored and
before the first step: `base` is what it may look at. The settings are those
of Lester et al. 2021, section 3.2, whose default is class labels.
"""

import dataclasses
import fnmatch
import math
import os
import tokenize
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from ptune.errors import UserError, nearest
from ptune.host import paths
from ptune.model import parameters


@dataclasses.dataclass(frozen=True)
class Base:
  """What an initialiser may look at.

  Attributes:
    embedding: Reads rows of the frozen model's token embedding:
      ids [n] -> [n, embed] float32.
    vocabulary: Makes the task's vocabulary, a seqio.Vocabulary: its `encode`
      turns a string into ids without EOS.
    labels: Makes the list of the task's class labels, as strings.
    sites: What leaves each site of the frozen model that reads a text: ids [n]
      -> arrays [1, n, ...] float32 by the site's path.
    path: Of the parameter that is initialised.
    read: Reads a saved prompt: [prompt, embed] float32.
  """

  embedding: Callable[[np.ndarray], np.ndarray]
  vocabulary: Callable[[], Any]
  labels: Callable[[], Sequence[str]]
  sites: Callable[[Sequence[int]], Mapping[str, np.ndarray]] | None = None
  path: str = ''
  read: Callable[[str | os.PathLike[str]], np.ndarray] | None = None


class Initializer(Protocol):
  """See the module."""

  def __call__(
    self, rng: np.random.Generator, shape: tuple[int, int], base: Base
  ) -> np.ndarray: ...


def initialize_adapters(
  plan: parameters.Plan, base: Base, seed: int
) -> dict[str, jax.Array]:
  """The first values of what the method added.

  Args:
    plan: The plan.
    base: What an initialiser may look at.
    seed: Seeds both kinds of initialisers.
  """
  hosted = {
    path: init
    for pattern, init in plan.method.initial.items()
    for path in fnmatch.filter(plan.params, pattern)
  }
  values = parameters.initialize(plan, plan.adapters - set(hosted), seed)
  for i, (path, init) in enumerate(hosted.items()):
    struct = plan.params[path]
    own = dataclasses.replace(base, path=path)
    value = init(np.random.default_rng([seed, i]), struct.shape, own)
    values[path] = parameters.place(value, struct)
  return values


def random_uniform(low: float = -0.5, high: float = 0.5) -> Initializer:
  """Uniform in [low, high).

  The paper says [-0.5, 0.5]; its implementation drew from [0, 0.5).
  """

  def init(rng, shape, base):
    del base
    return rng.uniform(low, high, shape).astype(np.float32)

  return init


def from_sampled_vocab(population: int = 5000) -> Initializer:
  """Embeddings of random tokens, each of the most common ones once.

  Args:
    population: How many of the vocabulary's first, most common, ids are drawn
      from; all, where the vocabulary has fewer (that of bytes). Drawn with
      replacement, and a warning, where the prompt is longer.
  """

  def init(rng, shape, base):
    # A vocabulary other than SeqIO's need not tell its size.
    size = min(population, getattr(base.vocabulary(), 'vocab_size', population))
    again = shape[0] > size
    if again:
      logging.warning(
        'a prompt of %d tokens is drawn from %d ids: some occur again',
        shape[0],
        size,
      )
    ids = rng.choice(size, shape[0], replace=again)
    return fit(base.embedding(ids), shape, 'the sampled vocabulary')

  return init


def from_class_labels(
  labels: Sequence[str] | None = None, fill: Initializer | None = None
) -> Initializer:
  """Embeddings of the class labels, one row each.

  A label of several pieces gives their mean. Rows beyond the labels come from
  `fill`; labels beyond the rows are left out, with a warning.

  Args:
    labels: Strings as they stand in the targets (CLASS_LABELS); the distinct
      targets of the training set if not given.
    fill: Initialises the other rows; the sampled vocabulary if not given.
  """
  if isinstance(labels, str):
    raise UserError(
      f'CLASS_LABELS is the string {labels!r}; it must be a list, such as'
      f' [{labels!r}]'
    )
  if wrong := [x for x in labels or () if not isinstance(x, str)]:
    raise UserError(
      f'CLASS_LABELS has {wrong}; it must be texts as they stand in the targets'
    )

  def init(rng, shape, base):
    names = list(base.labels() if labels is None else labels)
    if not names:
      raise UserError(
        "CLASS_LABELS is empty; name the labels, such as ['no', 'yes'], or"
        ' choose another file of prompts/'
      )
    prompt = (fill or from_sampled_vocab())(rng, shape, base)
    vocabulary = base.vocabulary()
    rows = [_mean_row(name, vocabulary, base) for name in names]
    if len(rows) > shape[0]:
      logging.warning(
        'the prompt has %d rows for %d class labels; these have none: %s',
        shape[0],
        len(rows),
        names[shape[0] :],
      )
    rows = rows[: shape[0]]
    prompt[: len(rows)] = fit(np.stack(rows), (len(rows), shape[1]), 'labels')
    return prompt

  return init


def from_string(text: str, fill: Initializer | None = None) -> Initializer:
  """Embeddings of a text's pieces, in order.

  Args:
    text: Cut where it has more pieces than the prompt has rows.
    fill: Initialises the rows beyond it; the sampled vocabulary if not given.
  """

  def init(rng, shape, base):
    ids = _encode(text, base.vocabulary(), 'the initial text')
    return from_ids(ids, fill)(rng, shape, base)

  return init


def from_ids(
  ids: Sequence[int], fill: Initializer | None = None
) -> Initializer:
  """Embeddings of tokens, in order: as `from_string`, of a text's pieces."""

  def init(rng, shape, base):
    if len(ids) > shape[0]:
      logging.warning(
        'the initial text has %d pieces; the prompt takes the first %d',
        len(ids),
        shape[0],
      )
    first = np.asarray(ids[: shape[0]])
    prompt = (fill or from_sampled_vocab())(rng, shape, base)
    prompt[: len(first)] = fit(
      base.embedding(first), (len(first), shape[1]), 'the text'
    )
    return prompt

  return init


def from_keys_and_values(ids: Sequence[int]) -> Initializer:
  """A prefix: the keys or values of a text's first tokens, at its attention.

  Eyuboglu et al. 2025, "Cartridges" (arXiv 2506.06266): the frozen model reads
  the text by itself. A prefix has no relative position bias, and the tokens
  had one, so that the model does not start as if it read them.

  Args:
    ids: Token ids of the text, without EOS.
  """

  def init(rng, shape, base):
    del rng
    if len(ids) < shape[0]:
      raise UserError(
        f'CONTEXT has {len(ids)} pieces, and the prefix {shape[0]} rows; lower'
        ' PROMPT_LENGTH'
      )
    assert base.sites is not None
    # encoder/layers_0/attention/keys_prefix/prefix -> .../keys
    site = base.path.removesuffix('_prefix/prefix')
    rows = base.sites(tuple(ids))[site][0, : shape[0]]
    return fit(rows.reshape(shape[0], -1), shape, f'{site} of the context')

  return init


def from_array(array: np.ndarray) -> Initializer:
  """A given [prompt, embed] array."""

  def init(rng, shape, base):
    del rng, base
    return fit(array, shape, 'the given array')

  return init


def from_file(path: str | os.PathLike[str]) -> Initializer:
  """A prompt saved by ptune or by the paper's implementation."""

  def init(rng, shape, base):
    del rng
    rows = (base.read or read)(path)
    return fit(rows, shape, f'prompt file {os.fspath(path)}')

  return init


def from_prompts(
  files: Sequence[str | os.PathLike[str]],
  weights: Sequence[float] | None = None,
) -> Initializer:
  """A saved prompt of another task, or a weighted mean of several.

  Vu et al. 2022, "SPoT" (arXiv 2110.07904): prompts of one or more source tasks
  start that of a target task.

  Args:
    files: As `read` takes them (SOURCE_PROMPTS); all of one shape.
    weights: One each (SOURCE_WEIGHTS), at least 0; divided by their sum. Equal
      if not given.
  """
  if isinstance(files, str | os.PathLike) or not files:
    raise UserError(
      f'SOURCE_PROMPTS is {files!r}; it must be a list of prompt files, such as'
      f' {[os.fspath(files)] if files else ["/runs/mnli/prompts/best.npy"]}'
    )
  given = [1.0] * len(files) if weights is None else list(weights)
  if len(given) != len(files):
    raise UserError(
      f'SOURCE_WEIGHTS has {len(given)} numbers for {len(files)}'
      ' SOURCE_PROMPTS; give one for each'
    )
  total = sum(given)
  if not all(w >= 0 for w in given) or not 0 < total < float('inf'):
    raise UserError(
      f'SOURCE_WEIGHTS is {given}; expected numbers of at least 0, and one'
      ' above it'
    )

  def init(rng, shape, base):
    del rng
    arrays = {os.fspath(f): (base.read or read)(f) for f in files}
    if wrong := {
      f: list(a.shape) for f, a in arrays.items() if a.shape != shape
    }:
      raise UserError(
        f'the prompt is {list(shape)} [PROMPT_LENGTH, d_model of the model],'
        ' and of SOURCE_PROMPTS these are not:\n'
        + '\n'.join(f'  {file} {found}' for file, found in wrong.items())
        + '\nChange PROMPT_LENGTH, or leave them out'
      )
    pairs = zip(given, files, strict=True)
    mean = sum(w / total * arrays[os.fspath(f)].astype(float) for w, f in pairs)
    return np.asarray(mean, np.float32)

  return init


def read(path: str | os.PathLike[str]) -> np.ndarray:
  """Reads a prompt file.

  Args:
    path: NumPy's format, whatever the file's suffix. `.npy` may be left out.

  Returns:
    [prompt, embed] float32.

  Raises:
    FileNotFoundError: With the nearest names beside it.
    ValueError: If the file is none of NumPy's, holds pickled objects, or is
      not a finite two-dimensional array of numbers.
  """
  file = epath.Path(paths.check_file(path, 'prompt file'))
  if not file.exists():
    suffixed = epath.Path(f'{file}.npy')
    if not suffixed.is_file():
      raise FileNotFoundError(_missing(file))
    file = suffixed
  array = read_array(file)
  if array.ndim != 2 or array.dtype.kind not in 'fiu':
    raise UserError(
      f'prompt file {file} holds {array.dtype} {list(array.shape)}; a prompt'
      ' is [prompt, embed] floats'
    )
  with np.errstate(over='ignore'):  # What is too large is reported below.
    array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise UserError(f'prompt file {file} holds NaN or infinity')
  return array


# What NumPy raises at a damaged header.
_DAMAGED = (
  ValueError,
  EOFError,
  KeyError,
  TypeError,
  SyntaxError,
  RecursionError,
  MemoryError,
  OverflowError,
  tokenize.TokenError,
)


def read_array(file: epath.Path) -> np.ndarray:
  """Reads NumPy's format, whatever the file's suffix; never a pickle.

  Raises:
    UserError: If it is no such file, or damaged.
  """
  size = file.stat().length
  try:
    with file.open('rb') as f:
      version = np.lib.format.read_magic(f)
      read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
      }[version]
      shape, transposed, dtype = read_header(f)
      if dtype.hasobject:
        raise UserError('it holds pickled objects, which are not loaded')
      # Before room is made for as much as the header says.
      left = size - f.tell()
      if left != math.prod(shape) * dtype.itemsize:
        raise UserError(
          f'{left} bytes follow a header that says {list(shape)} {dtype}'
        )
      data = f.read()
    order = 'F' if transposed else 'C'
    if dtype == np.dtype('V2'):  # What NumPy's format makes of bfloat16.
      dtype = np.dtype(jnp.bfloat16)
    return np.frombuffer(data, dtype).reshape(shape, order=order)
  except _DAMAGED as error:
    said = str(error)
    said = said if len(said) < 200 else f'{said[:200]}...'
    raise UserError(
      f'prompt file {file} ({size} bytes) is no NumPy array file, or is damaged'
      f' or cut short: {said}'
    ) from error


def _missing(file: epath.Path) -> str:
  names = []
  if file.parent.is_dir():
    names = [child.name for child in file.parent.iterdir()]
  near = nearest(file.name, names, most=0, cutoff=0.4)
  return f'there is no prompt file {file}{near}'


def fit(array: np.ndarray, shape: tuple[int, int], what: str) -> np.ndarray:
  """Copies a prompt as float32, after checking its shape.

  Raises:
    ValueError: If it is not `shape`; `what` says where it came from.
  """
  array = np.array(array, np.float32)
  if array.shape != tuple(shape):
    raise UserError(
      f'{what} has shape {list(array.shape)}, and the prompt'
      f' {list(shape)} [PROMPT_LENGTH, d_model of the model]; change'
      ' PROMPT_LENGTH or the model file'
    )
  return array


def _encode(text: str, vocabulary: Any, what: str) -> list[int]:
  ids = list(vocabulary.encode(text))
  known = [i for i in ids if i != vocabulary.unk_id]
  # SentencePiece puts a space, which is known, before a word that is not.
  if not known or (
    len(known) < len(ids) and not vocabulary.decode(known).strip()
  ):
    raise UserError(
      f'{what} {text!r} cannot be encoded by the vocabulary: it gives'
      f' {ids or "no tokens"}' + (' (the unknown token)' if ids else '')
    )
  if len(known) < len(ids):
    logging.warning(
      '%s %r has pieces that the vocabulary does not know: %s', what, text, ids
    )
  return ids


def _mean_row(label: str, vocabulary: Any, base: Base) -> np.ndarray:
  ids = _encode(label, vocabulary, 'the class label')
  return np.mean(base.embedding(np.asarray(ids)), axis=0)
