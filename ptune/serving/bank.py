"""One frozen model, many prompts: rows of several tasks share a batch.

    bank = trained_model.load_bank(config, '/models/t5_1_1_base', 8)
    bank.add('sst2', '/runs/sst2')
    bank.add('rte', np.load('rte.npy'))
    tokens, scores = bank.predict(['sst2', 'rte'], encoder_input_tokens)

The base lies on the devices once. The prompts lie beside it in one table, from
which each batch takes its own, see `row_prompts.per_row`: a program is
compiled for a shape of batch and of table, and stays as prompts come and go.
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
from jax.sharding import Mesh

from ptune.convert.prompts import is_of_a_run, name_of, read_prompt
from ptune.errors import UserError, nearest
from ptune.methods.row_prompts import ROWS, per_row, row_parameters
from ptune.model import parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import Batch, Decoding, EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving.predictor import Predictor, Trees

METHOD = Method('row_prompts', per_row(), trainable=(ROWS,))
# Methods whose prompts stand elsewhere, or are seen otherwise.
OTHER_METHODS = ('prompt/', 'decoder_prompt')
# What a prompt may be called: also a part of a path, and of an address.
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]{0,63}')


class UnknownPrompt(UserError):
  """There is no prompt of a name."""


class PromptBank:
  """Prompts by name, and one model that answers with all of them.

  Threads may share it: a batch has the prompts of the moment it was asked.
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
    """Puts the base on the devices; `trained_model.load_bank` reads it, too.

    Args:
      config: The network's sizes.
      base: Every parameter of the base, by path.
      max_decode_length: Most tokens of an answer, its EOS included.
      mesh: The devices; all of them if not given.
      model: The loss.
      decoding: How predictions are decoded.
      seed: For sampling.
      fingerprint: Of the base, with which that of a prompt's file is compared.
      prompt_length: The longest prompt that there is room for at first. A
        longer one makes room, and the model is compiled anew.

    Raises:
      ValueError: If the base lacks a parameter, or has one too many.
    """
    mesh = partitioning.make_mesh() if mesh is None else mesh
    self.plan = plan = parameters.plan(config, METHOD, mesh)
    if different := sorted(plan.base ^ set(base)):
      raise UserError(
        f'the base is not that of the config: {different[:20]} are in one of'
        ' the two only'
      )
    placed = {
      path: jax.device_put(base[path], struct.sharding)
      for path, struct in plan.select(plan.base).items()
    }
    self._base = parameters.unflatten(parameters.freeze(plan, placed))
    self.predictor = Predictor(
      plan, model(plan.network), max_decode_length, decoding, seed
    )
    self.embed = config.emb_dim
    self._fingerprint = fingerprint
    self._prompts: dict[str, np.ndarray] = {}
    self._slots: dict[str, int] = {}
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
    """How many tokens each prompt has."""
    with self._lock:
      return {name: len(self._prompts[name]) for name in sorted(self._prompts)}

  def add(self, name: str, prompt: np.ndarray | os.PathLike[str] | str) -> None:
    """Adds a prompt; one that has the name already is replaced.

    Args:
      name: By which it is asked.
      prompt: [prompt, embed], or whatever `convert.prompts` reads: a .npy
        file, the MODEL_DIR of a run, a PEFT adapter.

    Raises:
      ValueError: If it is no prompt for this model. One of another base is
        refused if it is given by its run, and told by a warning otherwise.
    """
    if not name:
      raise UserError('a prompt needs a name')
    if isinstance(prompt, str | os.PathLike):
      prompt = self._read(name, prompt)
    array = np.asarray(prompt)
    if array.ndim != 2 or not len(array) or array.shape[1] != self.embed:
      raise UserError(
        f'prompt {name!r} has shape {list(array.shape)}; for this model it must'
        f' be [prompt, {self.embed}]'
      )
    if array.dtype.kind not in 'fiu' and array.dtype != jnp.bfloat16:
      raise UserError(f'prompt {name!r} holds {array.dtype}, not numbers')
    with np.errstate(over='ignore'):  # What is too large is reported below.
      array = array.astype(np.float32)
    if not np.isfinite(array).all():
      raise UserError(f'prompt {name!r} holds NaN or infinity')
    with self._lock:
      slots = set(range(len(self._prompts) + 1)) - set(self._slots.values())
      slot = self._slots.get(name, min(slots))
      self._slots[name], self._prompts[name] = slot, array
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
    """Removes a prompt; its place is taken by the next that is added.

    Raises:
      UnknownPrompt: If there is none of this name.
    """
    with self._lock:
      self._slot(name)
      del self._prompts[name], self._slots[name]

  def _read(self, name: str, path: os.PathLike[str] | str) -> np.ndarray:
    read = read_prompt(path)
    method = read.facts.get('method', '')
    if method.startswith(OTHER_METHODS):
      raise UserError(
        f'prompt {name!r} ({read.path}) was trained with method {method!r};'
        ' those that share a batch stand at the start, and all of a prompt is'
        ' seen. Give METHOD and PROMPT_FILE, to use it alone'
      )
    base = read.facts.get('base', self._fingerprint)
    if self._fingerprint is not None and base != self._fingerprint:
      message = (
        f'prompt {name!r} ({read.path}) was trained on another base model'
        f' (fingerprint {base}) than this one ({self._fingerprint})'
      )
      if epath.Path(path).is_dir():
        raise UserError(f'{message}; give the base of that run')
      logging.warning('%s', message)
    return read.array

  def _slot(self, name: str) -> int:
    if name not in self._slots:
      raise UnknownPrompt(unknown(name, self._slots))
    return self._slots[name]

  def _grow(self, capacity: int, longest: int) -> None:
    """Makes the table anew: [capacity, longest, embed]."""
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
      names: [batch] the prompt of each row.

    Raises:
      UnknownPrompt: If there is no prompt of a name.
      ValueError: If the devices do not divide the batch.
    """
    devices = self.plan.mesh.shape['data']
    if not names or len(names) % devices:
      raise UserError(
        f'the batch has {len(names)} rows, which the {devices} devices along'
        ' the mesh axis data must divide'
      )
    with self._lock:
      ids = np.array([self._slot(name) for name in names], np.int32)
      table, lengths = self._table, self._lengths
    with self.plan.scope():
      return self._base, self._gather(table, lengths, ids)

  def predict(
    self,
    names: Sequence[str],
    tokens: np.ndarray | jax.Array,
    rows: np.ndarray | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Answers [batch, max_decode_length], and their scores [batch].

    Args:
      names: [batch] the prompt of each row.
      tokens: [batch, length] the encoder's input, padded.
      rows: [batch] a number of each row, from which its samples are drawn;
        0, 1, ... if not given.
    """
    rows = np.arange(len(names)) if rows is None else rows
    batch = {'encoder_input_tokens': tokens}
    answer = self.predictor.predict(self.trees(names), batch, rows)
    return jax.device_get(answer)

  def score(self, names: Sequence[str], batch: Batch) -> np.ndarray:
    """Log probabilities of the targets: [batch]."""
    return jax.device_get(self.predictor.score(self.trees(names), batch))


def _padded(prompt: np.ndarray, longest: int) -> np.ndarray:
  """[prompt, embed] -> [longest, embed], on the left."""
  return np.pad(prompt, ((longest - len(prompt), 0), (0, 0)))


def unknown(name: str, known: Mapping[str, Any]) -> str:
  """What is said of a name that no prompt has."""
  return f'there is no prompt {name!r}{nearest(name, known)}'


def parse(prompts: str) -> dict[str, str]:
  """What PROMPTS means: 'sst2=a.npy,b.npy' -> {'sst2': 'a.npy', 'b': 'b.npy'}.

  Args:
    prompts: NAME=PATH, with commas between them. Without a name, it is the
      file's or the directory's own. A directory of .npy files is each of them,
      but a run's `prompts/` its best one.

  Raises:
    ValueError: If two have one name, it is none (`NAME`), or there is none.
  """
  found: list[tuple[str, str]] = []
  for part in filter(None, map(str.strip, prompts.split(','))):
    name, equals, path = part.partition('=')
    if equals and not epath.Path(part).exists():  # Paths may have one too.
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
      f'PROMPTS is {prompts!r}: {wrong} are no names, which have up to 64 of'
      ' A-Z a-z 0-9 _ . - and begin with a letter or digit; put one before'
      ' the path, as in sst2=/runs/sst2'
    )
  return dict(found)
