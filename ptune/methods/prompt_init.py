"""Initialisers of a soft prompt: random, from the vocabulary, from a file.

An initialiser is a function `init(rng, shape, base) -> [prompt, embed]`
float32. It runs once, on the host, after the frozen weights are restored and
before the first step. `base` gives it access to the base model and the task.
The settings are those of Lester et al. 2021, section 3.2, whose default is
class labels.
"""

import dataclasses
import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from ptune.errors import UserError, some
from ptune.methods import prompt_array
from ptune.methods.prompt_array import fit
from ptune.model import parameters

# Follows the path of a site in that of a prefix's rows there.
PREFIX = '_prefix/prefix'


@dataclasses.dataclass(frozen=True)
class Base:
  """The base model and the task, for initialisers.

  Attributes:
    embedding: Reads rows of the frozen model's token embedding:
      ids [n] -> [n, embed] float32.
    vocabulary: Returns the task's vocabulary, a seqio.Vocabulary. Its `encode`
      turns a string into ids without EOS; see also `pieces_of`.
    labels: Returns the task's class labels, as strings.
    sites: Runs the frozen model on a text and returns the values at each site:
      ids [n] -> arrays [1, n, ...] float32 by the path of the site.
    path: The path of the parameter that is initialised.
    read: Reads a saved prompt: file -> [prompt, embed] float32.
  """

  embedding: Callable[[np.ndarray], np.ndarray]
  vocabulary: Callable[[], Any]
  labels: Callable[[], Sequence[str]]
  sites: Callable[[Sequence[int]], Mapping[str, np.ndarray]] | None = None
  path: str = ''
  read: Callable[[str | os.PathLike[str]], np.ndarray] | None = None


class Initializer(Protocol):
  """Computes the first value of a prompt."""

  def __call__(
    self, rng: np.random.Generator, shape: tuple[int, int], base: Base
  ) -> np.ndarray: ...


def initialize_adapters(
  plan: parameters.Plan, base: Base, seed: int
) -> dict[str, jax.Array]:
  """Computes the first values of a method's own parameters, by path.

  Args:
    plan: The plan.
    base: The base model and the task.
    seed: Seeds these initialisers and Flax's.
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
  """Embeddings of random tokens, drawn from the most common ones.

  Args:
    population: Tokens are drawn from the ids below this, which are the most
      common tokens, or from all ids of a smaller vocabulary (such as bytes).
      They are drawn without replacement, or, if the prompt has more rows than
      there are ids, with replacement and a warning.
  """

  def init(rng, shape, base):
    # A vocabulary that is not SeqIO's may have no `vocab_size`.
    size = min(population, getattr(base.vocabulary(), 'vocab_size', population))
    again = shape[0] > size
    if again:
      logging.warning(
        'a prompt of %d tokens is drawn from %d ids, so some repeat',
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

  A label of several pieces gives the mean of their embeddings. `fill`
  initialises the rows after the labels. If there are more labels than rows, a
  warning lists the labels that are left out.

  Args:
    labels: The labels as in the targets (CLASS_LABELS); the distinct targets of
      the training set if not given.
    fill: Initialises the other rows; `from_sampled_vocab` if not given.
  """
  if isinstance(labels, str):
    raise UserError(
      f'CLASS_LABELS is the string {labels!r}; it must be a list, such as'
      f' [{labels!r}]'
    )
  if wrong := [x for x in labels or () if not isinstance(x, str)]:
    raise UserError(
      f'CLASS_LABELS has {wrong}; it must list the texts of the targets'
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
        'the prompt has %d rows for %d class labels; these get no row: %s',
        shape[0],
        len(rows),
        some([*map(repr, names[shape[0] :])]),
      )
    rows = rows[: shape[0]]
    prompt[: len(rows)] = fit(np.stack(rows), (len(rows), shape[1]), 'labels')
    return prompt

  return init


def from_string(text: str, fill: Initializer | None = None) -> Initializer:
  """Embeddings of a text's pieces, in order.

  Args:
    text: The text; pieces beyond the prompt's rows are not used.
    fill: Initialises the rows after the text; `from_sampled_vocab` if not
      given.
  """

  def init(rng, shape, base):
    ids = _encode(text, base.vocabulary(), 'the initial text')
    return from_ids(ids, fill)(rng, shape, base)

  return init


def from_ids(
  ids: Sequence[int], fill: Initializer | None = None
) -> Initializer:
  """Embeddings of tokens, in order; see `from_string`."""

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
  """A prefix from the keys or values of a text's first tokens.

  Eyuboglu et al. 2025, "Cartridges" (arXiv 2506.06266): the frozen model reads
  the text alone, and each prefix takes the keys or values of its attention. The
  model does not start as if it read the text, because a prefix has no relative
  position bias.

  Args:
    ids: Token ids of the text, without EOS.
  """

  def init(rng, shape, base):
    del rng
    if len(ids) < shape[0]:
      raise UserError(
        f'CONTEXT has {len(ids)} pieces, but the prefix has {shape[0]} rows;'
        ' lower PROMPT_LENGTH or give a longer CONTEXT'
      )
    assert base.sites is not None
    # encoder/layers_0/attention/keys_prefix/prefix -> .../keys
    site = base.path.removesuffix(PREFIX)
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
    rows = (base.read or prompt_array.read)(path)
    return fit(rows, shape, f'prompt file {os.fspath(path)}')

  return init


def from_prompts(
  files: Sequence[str | os.PathLike[str]],
  weights: Sequence[float] | None = None,
) -> Initializer:
  """A saved prompt of another task, or a weighted mean of several prompts.

  Vu et al. 2022, "SPoT" (arXiv 2110.07904), initialise the prompt of a target
  task with those of source tasks.

  Args:
    files: The prompts (SOURCE_PROMPTS), all of one shape.
    weights: One weight for each (SOURCE_WEIGHTS), at least 0; they are divided
      by their sum. Equal if not given.
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
      f'SOURCE_WEIGHTS is {given}; expected numbers of at least 0, and at'
      ' least one above 0'
    )

  def init(rng, shape, base):
    del rng
    arrays = {os.fspath(f): (base.read or prompt_array.read)(f) for f in files}
    if wrong := {
      f: list(a.shape) for f, a in arrays.items() if a.shape != shape
    }:
      raise UserError(
        f'the prompt is {list(shape)} [PROMPT_LENGTH, d_model of the model],'
        ' but these SOURCE_PROMPTS are not:\n'
        + '\n'.join(f'  {file} {found}' for file, found in wrong.items())
        + '\nChange PROMPT_LENGTH, or leave them out'
      )
    pairs = zip(given, files, strict=True)
    mean = sum(w / total * arrays[os.fspath(f)].astype(float) for w, f in pairs)
    return np.asarray(mean, np.float32)

  return init


def pieces_of(text: str, vocabulary: Any) -> list[int]:
  """Returns the ids of a text's own pieces.

  They are without EOS, and without the token that some vocabularies put before
  every text: Gemma's <bos>, CodeT5's <s>. The inputs after a prompt begin with
  it.
  """
  ids, begin = list(vocabulary.encode(text)), list(vocabulary.encode(''))
  return ids[len(begin) :] if ids[: len(begin)] == begin else ids


def _encode(text: str, vocabulary: Any, what: str) -> list[int]:
  ids = pieces_of(text, vocabulary)
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
