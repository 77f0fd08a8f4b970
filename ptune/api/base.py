"""A frozen model that prompts are trained for."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax

from ptune.convert import identity, open_checkpoint
from ptune.convert.fingerprint import of_params
from ptune.convert.pieces import Vocabulary
from ptune.convert.vocabulary import open_vocabulary
from ptune.errors import UserError
from ptune.host import jax_setup, paths
from ptune.model.sizes import Config
from ptune.serving import trained_model


class Base:
  """A frozen model. Its weights are read once, at their first use.

  Attributes:
    path: The checkpoint, as it was given.
    config: The sizes of the network.
    vocabulary_path: The path of its vocabulary.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    vocabulary: str | os.PathLike[str] | None = None,
    dtype: str = 'float32',
  ):
    """Opens a checkpoint; see `ptune.load`."""
    jax_setup.cache_compiled_programs()
    jax_setup.configure_cpu()
    self.path = str(path)
    self.config: Config = identity.config(open_checkpoint(path), dtype=dtype)
    self.vocabulary_path = str(path)
    if vocabulary is not None:
      self.vocabulary_path = checked_path('vocabulary', vocabulary)

  def __repr__(self) -> str:
    names = identity.names(identity.facts(open_checkpoint(self.path)))
    size = f', {names[0]}' if names else ''
    return f'ptune.load({self.path!r})  # a base model{size}'

  @functools.cached_property
  def vocabulary(self) -> Vocabulary:
    """Texts to token ids and back.

    Raises:
      UserError: If the directory of the checkpoint has no vocabulary.
    """
    try:
      found = open_vocabulary(self.vocabulary_path)
    except ValueError as error:
      raise UserError(
        f'{error}\nGive it as ptune.load({self.path!r}, vocabulary=...)'
      ) from error
    if found.vocab_size > self.config.vocab_size:
      raise UserError(
        f'the vocabulary {self.vocabulary_path} has {found.vocab_size} ids, and'
        f' the base {self.path} {self.config.vocab_size}; give that of the base'
        ' as vocabulary='
      )
    return found

  @functools.cached_property
  def weights(self) -> Mapping[str, jax.Array]:
    """All parameters by path, on the devices."""
    return trained_model.load_base(self.config, self.path)

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hexadecimal digits that identify the base in runs and prompts."""
    return of_params(self.weights)


def checked_path(name: str, path: Any) -> str:
  """Returns a path as a string; raises UserError if it is none.

  Args:
    name: The name of the argument.
    path: The argument.
  """
  text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
  expected = 'a path' if text is None else paths.fault(text)
  if text is None or expected:
    raise UserError(f'{name} is {path!r:.80}; expected {expected}')
  return text


def as_base(
  base: 'Base | str | os.PathLike[str]',
  vocabulary: str | os.PathLike[str] | None = None,
  dtype: str = 'float32',
) -> Base:
  """Opens a base given by its path; see `ptune.load`.

  Raises:
    UserError: If it is something else.
  """
  if isinstance(base, Base):
    return base
  if not isinstance(base, str | os.PathLike):
    raise UserError(
      f'base is {type(base).__name__} {str(base)[:60]!r}; expected a base model'
      " from ptune.load, or its path, such as 'ptune://tiny'"
    )
  try:
    return Base(base, vocabulary, dtype)
  except (FileNotFoundError, UserError) as error:
    raise type(error)(f'base: {error}') from error
