"""Identifies a checkpoint's model: by name, by its sizes, by its weights."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from ptune.convert import t5gemma
from ptune.convert.layout import SIDE_BIAS, layout, shapes
from ptune.convert.source import (
  Freed,
  Index,
  Leaf,
  Source,
  is_finite,
  parts,
  sizes,
)
from ptune.errors import UserError
from ptune.host.columns import aligned
from ptune.model.sizes import SIZES, Config, T5Config
from ptune.model.t5gemma_sizes import T5GemmaConfig

# The fields of T5Config that differ between models; the others (dropout, dtype)
# are free.
FIELDS = (
  'vocab_size',
  'emb_dim',
  'num_heads',
  'head_dim',
  'mlp_dim',
  'num_encoder_layers',
  'num_decoder_layers',
  'mlp_activations',
  'logits_via_embedding',
  'scale_decoder_outputs',
  'decoder_embedding',
  'relative_attention_per_layer',
  'local_radius',
  'global_block_size',
  'ids',
  'relative_attention_num_buckets',
)


# T5X's checkpoints do not have these; the default is the published models'.
UNTOLD = {'scale_decoder_outputs', 'ids', 'local_radius', 'global_block_size'}
# The size in all published models with transient-global attention.
_TRANSIENT_GLOBAL = (127, 16)


def facts(source: Source) -> dict[str, Any]:
  """Returns the fields of T5Config, or T5GemmaConfig, that a checkpoint gives.

  T5X's files do not name the activation. Then mlp_activations has '?' for it,
  and says only whether the MLP is gated.
  """
  if source.config is not None:
    return t5gemma.told(source.config)
  if t5gemma.is_t5gemma(source.shapes):
    return t5gemma.facts(source.shapes)
  found = sizes(source.shapes)
  gated = found.pop('gated', None)
  if source.activations is not None:
    found['mlp_activations'] = source.activations
  elif gated is not None:
    found['mlp_activations'] = ('?', 'linear') if gated else ('?',)
  found |= {'scale_decoder_outputs': source.scaled, 'ids': source.ids}
  attention = source.attention
  if attention is None and SIDE_BIAS in source.shapes:
    attention = _TRANSIENT_GLOBAL
  if attention is not None:
    found['local_radius'], found['global_block_size'] = attention
  return {
    field: found[field] for field in FIELDS if found.get(field) is not None
  }


def names(found: Mapping[str, Any]) -> list[str]:
  """Returns the published models with these facts: ['t5_1_1_base', ...].

  There are several if one network has several names, and none if a fact is
  missing. If a checkpoint does not say whether attention is local, it is not
  taken for a LongT5.
  """

  def same(config: Config) -> bool:
    told = found
    if isinstance(config, T5Config):
      told = {'local_radius': 0, 'global_block_size': 0, **found}
    return set(_all(config)) - set(told) <= UNTOLD and not _differing(
      told, config
    )

  return [name for name, config in SIZES.items() if same(config)]


def config(source: Source, **changes: Any) -> Config:
  """Returns the configuration of the whole model in a checkpoint.

  Args:
    source: The checkpoint.
    **changes: Fields that it does not give, such as `dtype`. For T5X's files
      also mlp_activations; the default is the published models'.

  Raises:
    ValueError: The checkpoint has no whole model.
  """
  if source.config is not None:
    return dataclasses.replace(source.config, **changes)
  found = facts(source)
  missing = sorted(set(FIELDS) - set(found) - UNTOLD)
  if missing:
    raise UserError(
      f'The {source.describe()} is not a whole model: it lacks {missing}.'
    )
  # T5X's files lack some fields; published models of these sizes provide them.
  published = {
    (SIZES[name].mlp_activations, SIZES[name].ids) for name in names(found)
  }
  if len(published) == 1:
    activations, ids = published.pop()
    found = {'ids': ids, **found, 'mlp_activations': activations}
  if '?' in found['mlp_activations']:
    gated = len(found['mlp_activations']) == 2
    found['mlp_activations'] = ('gelu', 'linear') if gated else ('relu',)
  if found.get('scale_decoder_outputs') == found['logits_via_embedding']:
    del found['scale_decoder_outputs']  # As in T5.
  return T5Config(**{**found, **changes})


def from_checkpoint(path: str | None = None) -> Config:
  """Returns the configuration of a checkpoint's model; reads no weights.

  Args:
    path: INITIAL_CHECKPOINT_PATH or CHECKPOINT_PATH.

  Raises:
    FileNotFoundError: `path` does not exist.
    ValueError: `path` is not given, or has no whole model.
  """
  if path is None:
    raise UserError(
      'MODEL, the sizes of the network, is not set, and there is no checkpoint'
      ' to read them from; add a --gin_file of models/, such as'
      ' --gin_file=models/t5_1_1_small.gin, or give the base model:'
      ' INITIAL_CHECKPOINT_PATH to train, CHECKPOINT_PATH otherwise'
    )
  from ptune.convert import open_checkpoint

  return config(open_checkpoint(path))


def check_whole(source: Source, config: Config) -> None:
  """Raises ValueError if parameters are missing or have a wrong shape."""
  gemma = isinstance(config, T5GemmaConfig)
  expected = t5gemma.shapes(config) if gemma else shapes(config)
  got = {path: leaf.shape for path, leaf in base_leaves(source).items()}
  wrong = misshapen(got, expected)
  if wrong:
    raise UserError(
      f'The {source.describe()} is not a whole model:\n' + '\n'.join(wrong)
    )


def check_t5x(source: Source, config: Config) -> None:
  """Raises ValueError if T5X has no such network."""
  wrong = []
  if isinstance(config, T5GemmaConfig):
    wrong.append('it is a T5Gemma')
  elif config.decoder_embedding:
    wrong.append('its decoder has its own embedding')
  elif config.local_radius:
    wrong.append("its encoder's attention is local")
  if isinstance(config, T5Config) and (
    config.scales_outputs != config.logits_via_embedding
  ):
    scaled = 'are' if config.scales_outputs else 'are not'
    tied = 'tied to the embedding' if source.tied else 'not tied'
    wrong.append(f'its logits {scaled} scaled, and {tied}')
  if wrong:
    raise UserError(
      f'{source.path} cannot become a T5X checkpoint, because T5X has no such'
      f' network: {"; ".join(wrong)}'
    )


def misshapen(
  got: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> list[str]:
  """Returns a line for each missing, unexpected or misshapen parameter."""
  return [
    f'  {path}: {list(got[path]) if path in got else "missing"}, expected'
    f' {list(expected[path]) if path in expected else "none"}'
    for path in sorted(expected.keys() | got.keys())
    if got.get(path) != expected.get(path)
  ]


def check_config(source: Source, config: Config) -> None:
  """Raises ValueError if a checkpoint's model is not the configured one.

  The error shows both, and names the gin file to use. It also compares the
  activation, which the shapes of the parameters do not show.
  """
  found = facts(source)
  differing = _differing(found, config)
  if not differing:
    ids = source.config.ids if source.config is not None else source.ids
    if ids and ids.also_ends and not config.ids.also_ends:
      logging.warning(
        '%s: answers also end with the tokens %s there, but the model file does'
        ' not say so; models/from_checkpoint.gin reads them',
        source.path,
        [*ids.also_ends],
      )
    return
  theirs = names(found)
  ours = [name for name in SIZES if not _differing(_all(config), SIZES[name])]
  rows = [('', 'checkpoint', 'model')]
  rows += [(f, str(found[f]), str(_all(config).get(f, '-'))) for f in differing]
  table = '\n'.join(f'  {line}' for line in aligned(rows))
  advice = 'No published model matches this checkpoint; set sizes.t5 in your'
  advice += ' own gin file.'
  if theirs:
    advice = f'Use --gin_file=models/{theirs[0]}.gin.'
  raise UserError(
    'The checkpoint does not fit the model; nothing was restored.\n'
    f'checkpoint: {" or ".join(theirs) or "no published size"}\n'
    f'model: {" or ".join(ours) or "no published size"}\n'
    f'{table}\nGiven: {source.describe()}\n{advice}'
  )


def _all(config: Config) -> dict[str, Any]:
  if isinstance(config, T5GemmaConfig):
    return t5gemma.told(config)
  found = {field: getattr(config, field) for field in FIELDS}
  return found | {'scale_decoder_outputs': config.scales_outputs}


def _differing(found: Mapping[str, Any], config: Config) -> list[str]:
  ours = _all(config)

  def same(field: str) -> bool:
    got, expected = found[field], ours[field]
    if field != 'mlp_activations':
      return got == expected
    return len(got) == len(expected) and all(
      a in ('?', b) for a, b in zip(got, expected, strict=True)
    )

  return [field for field in found if field not in ours or not same(field)]


def base_leaves(source: Source) -> dict[str, Leaf]:
  """Returns the model's own parameters, without prompts and other adapters."""
  if t5gemma.is_t5gemma(source.shapes):
    kept = t5gemma.paths(source.shapes)
    return {path: leaf for path, leaf in source.leaves.items() if path in kept}
  found = sizes(source.shapes)
  table = layout(
    range(found.get('num_encoder_layers', 0)),
    range(found.get('num_decoder_layers', 0)),
    found.get('relative_attention_per_layer', False),
    found.get('decoder_embedding', False),
    'transient-global' if SIDE_BIAS in source.shapes else 'full',
  )
  return {path: leaf for path, leaf in source.leaves.items() if path in table}


def fingerprint(source: Source) -> str:
  """Returns `fingerprint.of_params` of the base; holds one leaf at a time.

  Raises:
    ValueError: A value is NaN or infinite.
  """
  checksums = Checksums()
  for path, leaf in base_leaves(source).items():
    checksums.reading(path, leaf).read()
  return checksums.digest()


class Checksums:
  """Computes a fingerprint of parameters while something else reads them.

  It has the sums of `fingerprint.of_params`, computed by NumPy in blocks. It
  needs neither a device nor the whole model in memory.
  """

  def __init__(self):
    self._lines: dict[str, str] = {}
    self._freed = Freed()

  def reading(self, path: str, leaf: Leaf) -> Leaf:
    """Returns the leaf; a whole read adds it to the fingerprint.

    A read raises ValueError if a value is NaN or infinite.
    """

    def fetch(index: Index) -> np.ndarray:
      self._freed.give_back()  # The memory of the previous leaves.
      array = leaf.fetch(index)
      self._freed.count(array.nbytes)
      if not is_finite(array):
        raise UserError(
          f'{path} {list(leaf.shape)} has values that are NaN or infinite; the'
          ' checkpoint is damaged, or was written after its training diverged'
        )
      if array.shape == leaf.shape:
        self._lines[path] = f'{path} {array.shape} {checksum(array)}\n'
      return array

    return Leaf(leaf.shape, leaf.dtype, fetch)

  def digest(self) -> str:
    """Returns 16 hexadecimal digits for everything read so far."""
    text = ''.join(self._lines[path] for path in sorted(self._lines))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def spread(position: Any) -> Any:
  """Returns a uint32 weight for each position (jax or numpy), well mixed.

  It is the finaliser of MurmurHash3 (Appleby 2011), a bijection of uint32.
  """
  w = position + np.uint32(1)
  w = (w ^ (w >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  w = (w ^ (w >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return w ^ (w >> np.uint32(16))


def checksum(array: np.ndarray) -> int:
  """Returns the sum of values as bfloat16 bits, weighted by their position."""
  total = 0
  first = 0
  for part in parts(array):
    half = part.astype(np.float32, copy=False).astype(jnp.bfloat16)
    bits = half.view(np.uint16).astype(np.uint32)
    position = np.arange(first, first + bits.size).astype(np.uint32)
    total += int(np.sum(bits.ravel() * spread(position), dtype=np.uint32))
    first += bits.size
  return total % 2**32
