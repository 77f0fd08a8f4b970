"""A bank of prompts for one frozen model: a batch can mix several prompts.

    bank = trained_model.load_bank(config, '/models/t5_1_1_base', 8)
    bank.add('sst2', '/runs/sst2')
    bank.add('rte', np.load('rte.npy'))
    tokens, scores = bank.predict(['sst2', 'rte'], encoder_input_tokens)

The devices hold the base once. All prompts are in one table, from which each
batch gathers its own; see `row_prompts.per_row`. Programs compile for the
shapes of the batch and the table, so adding or removing a prompt does not
recompile them.
"""

import functools
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptune.convert.prompts import (
  is_of_a_run,
  name_of,
  read_prompt,
  read_routed,
)
from ptune.errors import UserError, nearest
from ptune.methods.row_prompts import (
  ROWS,
  per_row,
  routed_parameters,
  row_parameters,
)
from ptune.methods.smop import Routed
from ptune.model import frozen_weights, parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import Batch, Decoding, EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving.predictor import Predictor, Trees

METHOD = Method('row_prompts', per_row(), trainable=(ROWS,))
# Methods that insert their prompts elsewhere, or mask them differently.
OTHER_METHODS = ('prompt/', 'decoder_prompt')
# The names a prompt may have: they are also part of paths and URLs.
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]{0,63}')


class UnknownPrompt(UserError):
  """No prompt has this name."""


def _check_name(name: Any) -> None:
  if not isinstance(name, str) or not name.strip() or not name.isprintable():
    raise UserError(f'the name of a prompt is {name!r:.80}; expected a text')


class PromptBank:
  """Prompts by name, and the model that uses them.

  Threads may share a bank: a batch uses the prompts at the time of the call.
  """

  def __init__(
    self,
    config: Config,
    base: Mapping[str, Any],
    max_decode_length: int,
    *,
    mesh: Mesh | None = None,
    model: Callable[..., EncoderDecoderModel] = EncoderDecoderModel,
    decoding: Decoding = Decoding(),
    seed: int = 0,
    fingerprint: str | None = None,
    prompt_length: int = 1,
  ):
    """Puts the base on the devices; `trained_model.load_bank` also restores it.

    Args:
      config: The network's sizes.
      base: Every parameter of the base, by path.
      max_decode_length: The most tokens of an answer, its EOS included.
      mesh: The devices; None for all of them.
      model: Makes the loss of a network.
      decoding: How to decode predictions.
      seed: For sampling.
      fingerprint: The base's fingerprint, which a prompt file's must equal.
      prompt_length: The longest prompt that the table has room for at first. A
        longer prompt grows the table, and the programs compile again.

    Raises:
      ValueError: If the base lacks a parameter or has one too many.
    """
    mesh = partitioning.make_mesh() if mesh is None else mesh
    self.plan = plan = parameters.plan(config, METHOD, mesh)
    if different := sorted(plan.base ^ set(base)):
      raise UserError(
        f'the base does not fit the config: only one of the two has'
        f' {different[:20]}'
      )
    placed = {
      path: jax.device_put(base[path], struct.sharding)
      for path, struct in plan.select(plan.base).items()
    }
    self._base = parameters.unflatten(frozen_weights.freeze(plan, placed))
    self.predictor = Predictor(
      plan, model(plan.network), max_decode_length, decoding, seed
    )
    self.embed = config.emb_dim
    self._fingerprint = fingerprint
    self._prompts: dict[str, np.ndarray] = {}
    self._slots: dict[str, int] = {}
    self._routed: dict[str, Routed] = {}
    self._lock = threading.RLock()
    shardings = {
      path: plan.params[path].sharding
      for path in row_parameters(jnp.zeros(()), jnp.zeros(()))
    }
    self._gather = jax.jit(
      lambda table, lengths, ids: parameters.unflatten(
        row_parameters(table[ids], lengths[ids])
      ),
      out_shardings=parameters.unflatten(shardings),
    )
    self._by_row = NamedSharding(mesh, PartitionSpec('data'))
    whole = partitioning.replicated(mesh)
    self._put = jax.jit(
      lambda table, lengths, slot, prompt, length: (
        table.at[slot].set(prompt),
        lengths.at[slot].set(length),
      ),
      out_shardings=(whole, whole),
    )
    self._place = functools.partial(jax.device_put, device=whole)
    self._grow(1, prompt_length)

  # -------------------------------------------------------------- the prompts

  @property
  def names(self) -> list[str]:
    """The names of all prompts, sorted."""
    with self._lock:
      return sorted(self._prompts)

  @property
  def lengths(self) -> dict[str, int]:
    """The number of tokens of each prompt, by name."""
    with self._lock:
      return {name: len(self._prompts[name]) for name in sorted(self._prompts)}

  def add(
    self, name: str, prompt: np.ndarray | Routed | os.PathLike[str] | str
  ) -> None:
    """Adds a prompt, or replaces the prompt of this name.

    Args:
      name: The name of the prompt.
      prompt: [prompt, embed], or anything that `convert.prompts` reads: a .npy
        file, the MODEL_DIR of a run, a PEFT adapter. Or several prompts with
        their router, such as a run of SMoP, which picks one for each row.

    Raises:
      ValueError: If it is not a prompt for this model, or if its run was
        trained on another base. For a file from another base, ptune only warns.
    """
    _check_name(name)
    if isinstance(prompt, str | os.PathLike):
      prompt = self._read(name, prompt)
    routed = None
    if isinstance(prompt, Routed):
      routed = Routed(*(np.asarray(x, np.float32) for x in prompt))
      if not all(np.isfinite(x).all() for x in routed):
        raise UserError(f'prompt {name!r} holds NaN or infinity')
      # The table knows its length; `trees` gives the prompts themselves.
      prompt = np.zeros(routed.prompts.shape[1:], np.float32)
    array = np.asarray(prompt)
    if array.ndim != 2 or not len(array) or array.shape[1] != self.embed:
      raise UserError(
        f'prompt {name!r} has shape {list(array.shape)}; for this model it must'
        f' be [prompt, {self.embed}]'
      )
    if array.dtype.kind not in 'fiu' and array.dtype != jnp.bfloat16:
      raise UserError(f'prompt {name!r} holds {array.dtype}, not numbers')
    with np.errstate(over='ignore'):  # Overflow is reported below.
      array = array.astype(np.float32)
    if not np.isfinite(array).all():
      raise UserError(f'prompt {name!r} holds NaN or infinity')
    with self._lock:
      slots = set(range(len(self._prompts) + 1)) - set(self._slots.values())
      slot = self._slots.get(name, min(slots))
      self._slots[name], self._prompts[name] = slot, array
      self._routed.pop(name, None)
      if routed is not None:
        self._routed[name] = routed
      capacity, longest, _ = self._table.shape
      if slot >= capacity or len(array) > longest:
        grown = capacity * 2 if slot >= capacity else capacity
        self._grow(grown, max(longest, len(array)))
      else:
        self._table, self._lengths = self._put(
          self._table,
          self._lengths,
          np.int32(slot),
          _padded(array, longest),
          np.int32(len(array)),
        )

  def remove(self, name: str) -> None:
    """Removes a prompt; the next one that is added takes its slot.

    Raises:
      UnknownPrompt: If no prompt has this name.
    """
    with self._lock:
      self._slot(name)
      del self._prompts[name], self._slots[name]
      self._routed.pop(name, None)

  def _read(
    self, name: str, path: os.PathLike[str] | str
  ) -> np.ndarray | Routed:
    routed = read_routed(path)
    if routed is not None:
      (found, facts), where = routed, os.fspath(path)
    else:
      read = read_prompt(path)
      found, facts, where = read.array, read.facts, read.path
    method = facts.get('method', '')
    if method.startswith(OTHER_METHODS):
      raise UserError(
        f'prompt {name!r} ({where}) was trained with method {method!r};'
        ' prompts that share a batch must be at the start of the input and'
        ' fully visible. To use this one alone, set METHOD and PROMPT_FILE'
      )
    base = facts.get('base', self._fingerprint)
    if self._fingerprint is not None and base != self._fingerprint:
      message = (
        f'prompt {name!r} ({where}) was trained on another base model'
        f' (fingerprint {base}) than this one ({self._fingerprint})'
      )
      if epath.Path(path).is_dir():
        raise UserError(f'{message}; use the base model of that run')
      logging.warning('%s', message)
    return found

  def _slot(self, name: str) -> int:
    _check_name(name)
    if name not in self._slots:
      raise UnknownPrompt(unknown(name, self._slots))
    return self._slots[name]

  def _grow(self, capacity: int, longest: int) -> None:
    """Builds a new table [capacity, longest, embed] from all prompts."""
    table = np.zeros((capacity, longest, self.embed), np.float32)
    lengths = np.zeros(capacity, np.int32)
    for name, slot in self._slots.items():
      table[slot] = _padded(self._prompts[name], longest)
      lengths[slot] = len(self._prompts[name])
    self._table, self._lengths = self._place(table), self._place(lengths)

  # -------------------------------------------------------------- the answers

  def trees(self, names: Sequence[str]) -> Trees:
    """The parameters for a batch, as `predictor.Predictor` takes them.

    Args:
      names: [batch] the name of each row's prompt.

    Raises:
      UnknownPrompt: If no prompt has one of these names.
      ValueError: If the devices cannot split the batch evenly.
    """
    devices = self.plan.mesh.shape['data']
    if not names or len(names) % devices:
      raise UserError(
        f'the batch has {len(names)} rows; expected a multiple of the {devices}'
        ' devices along the mesh axis data'
      )
    with self._lock:
      ids = np.array([self._slot(name) for name in names], np.int32)
      table, lengths = self._table, self._lengths
      rows = [self._routed.get(name) for name in names]
      choices = max((len(x.prompts) for x in self._routed.values()), default=0)
    with self.plan.scope():
      trees = self._base, self._gather(table, lengths, ids)
      if not any(rows):
        return trees
      added = routed_parameters(rows, choices, table.shape[1], self.embed)
      placed = jax.device_put(added, self._by_row)
      return *trees, parameters.unflatten(placed)

  def predict(
    self,
    names: Sequence[str],
    tokens: np.ndarray | jax.Array,
    rows: np.ndarray | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Predictions [batch, max_decode_length], and their scores [batch].

    Args:
      names: [batch] the name of each row's prompt.
      tokens: [batch, length] the encoder's input, padded.
      rows: [batch] the number of each row, which seeds its samples; None for
        0, 1, ...
    """
    rows = np.arange(len(names)) if rows is None else rows
    batch = {'encoder_input_tokens': tokens}
    answer = self.predictor.predict(self.trees(names), batch, rows)
    return jax.device_get(answer)

  def score(self, names: Sequence[str], batch: Batch) -> np.ndarray:
    """Log probabilities of the targets: [batch]."""
    return jax.device_get(self.predictor.score(self.trees(names), batch))


def _padded(prompt: np.ndarray, longest: int) -> np.ndarray:
  """[prompt, embed] -> [longest, embed], padded on the left."""
  return np.pad(prompt, ((longest - len(prompt), 0), (0, 0)))


def unknown(name: str, known: Mapping[str, Any]) -> str:
  """The message about a name that no prompt has."""
  return f'there is no prompt {name!r}{nearest(str(name), known)}'


def parse(prompts: str) -> dict[str, str]:
  """Parses PROMPTS: 'sst2=a.npy,b.npy' -> {'sst2': 'a.npy', 'b': 'b.npy'}.

  Args:
    prompts: NAME=PATH entries, separated by commas. An entry without a name is
      named after its file or directory. A directory of .npy files stands for
      all of them, but a run's `prompts/` stands for its best prompt.

  Raises:
    ValueError: If two prompts have the same name, a name does not match `NAME`,
      or there are no prompts.
  """
  found: list[tuple[str, str]] = []
  for part in filter(None, map(str.strip, prompts.split(','))):
    name, equals, path = part.partition('=')
    if equals and not epath.Path(part).exists():  # A path may contain '='.
      found.append((name.strip(), os.path.expanduser(path.strip())))
      continue
    place = epath.Path(os.path.expanduser(part))
    files = sorted(place.glob('*.npy')) if place.is_dir() else []
    if files and all(map(is_of_a_run, files)):
      found.append((place.absolute().parent.name, os.fspath(place)))
    else:
      found += [(name_of(x), os.fspath(x)) for x in files or [place]]
  names = [name for name, _ in found]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice or not all(map(all, found)) or not found:
    raise UserError(
      f'PROMPTS is {prompts!r}: '
      + (f'{twice} name several prompts' if twice else 'it names no prompts')
      + '; expected e.g. sst2=/runs/sst2,rte=rte.npy, or a directory of .npy'
      ' files'
    )
  if wrong := [name for name in names if not NAME.fullmatch(name)]:
    raise UserError(
      f'PROMPTS is {prompts!r}: {wrong} are not names; a name has up to 64 of'
      ' A-Z a-z 0-9 _ . - and begins with a letter or digit. Put a name before'
      ' the path, as in sst2=/runs/sst2'
    )
  return dict(found)
