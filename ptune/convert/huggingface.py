"""Hugging Face directories of T5, mT5, UMT5, LongT5 and T5Gemma.

`t5_config` and `t5gemma_config` read config.json, `weight_files` the tensors;
`layout` and `t5gemma` know the names of the parameters.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from ptune.convert import (
  safetensors_files,
  t5_config,
  t5gemma,
  t5gemma_config,
  weight_files,
)
from ptune.convert.layout import EMBEDDINGS, HEAD, STRAY, layout
from ptune.convert.source import EMBEDDING, LOGITS, Leaf, Source, nbytes
from ptune.convert.storage import read_json
from ptune.convert.t5_config import CONFIG, GENERATION
from ptune.errors import UserError
from ptune.model.sizes import Config
from ptune.model.t5gemma_sizes import T5GemmaConfig

STEP = 'step'  # A key in the metadata of the weights.


def open_huggingface(path: epath.Path) -> Source:
  """Opens a directory with config.json and safetensors.

  Raises:
    ValueError: A file is damaged or missing, a tensor is unknown, config.json
      contradicts the tensors, or ptune does not have the network.
  """
  config = read_json(path / CONFIG)
  if str(config.get('model_type')) in t5gemma_config.MODEL_TYPES:
    return _open_t5gemma(path, config)
  activations = t5_config.activations(config, path / CONFIG)
  attention = t5_config.attention(config)
  ids = t5_config.token_ids(config, path)
  tensors, metadata = weight_files.tensors(path)
  blocks = {
    stack: sorted(
      {
        int(match[1])
        for name in tensors
        if (match := re.match(rf'{stack}\.block\.(\d{{1,6}})\.', name))
      }
    )
    for stack in ('encoder', 'decoder')
  }
  embedding, own = _embeddings(path, tensors)
  table = layout(
    blocks['encoder'],
    blocks['decoder'],
    config.get('model_type') == t5_config.PER_LAYER,
    own is not None,
    config.get('encoder_attention_type', 'local') if any(attention) else 'full',
  )
  table[EMBEDDING] = (embedding, False)
  leaves = {
    ours: _transposed(tensors[theirs]) if transposed else tensors[theirs]
    for ours, (theirs, transposed) in table.items()
    if theirs in tensors
  }
  tied, scaled = _output(config, tensors.get(embedding), tensors.get(HEAD))
  if tied:
    leaves.pop(LOGITS, None)
  if tied and own is not None and not _is_shared(tensors, embedding):
    raise UserError(
      f'{path}: the output layer is tied to {EMBEDDINGS[0]}, but the encoder'
      f" reads another embedding, {embedding}; ptune ties it to the encoder's"
    )
  used = {table[ours][0] for ours in leaves}
  ignored = set(tensors) - used
  _refuse_unknown(path, ignored - {*EMBEDDINGS, STRAY, HEAD})
  source = Source(
    path=str(path),
    kind='huggingface',
    step=_step(metadata),
    leaves=leaves,
    activations=activations,
    scaled=scaled,
    ids=ids,
    attention=attention,
    ignored={name: nbytes(tensors[name]) for name in sorted(ignored)},
  )
  t5_config.check_sizes(config, source)
  return source


def _open_t5gemma(path: epath.Path, said: Mapping[str, Any]) -> Source:
  """Opens a T5Gemma or T5Gemma 2, without the part that reads images."""
  ids = t5_config.token_ids(t5gemma_config.token_ids(said), path)
  config = t5gemma_config.read_config(said, ids, path / CONFIG)
  tensors, metadata = weight_files.tensors(path)
  # transformers uses this name in memory, and the shorter one in files.
  tensors = {k.replace('.text_model.', '.'): x for k, x in tensors.items()}
  leaves, used = {}, set()
  for ours, (theirs, transposed) in t5gemma.layout(config).items():
    # A shared tensor has several names; torch may save any of them.
    names = dict.fromkeys([theirs, *t5gemma.copies(config, ours)])
    found = [name for name in names if name in tensors]
    if found:
      leaf = tensors[found[0]]
      leaves[ours] = _transposed(leaf) if transposed else leaf
      used.update(found)
    if any(not _equal(tensors[found[0]], tensors[x]) for x in found[1:]):
      raise UserError(
        f'{path}: {CONFIG} says that {", ".join(found)} are one tensor'
        ' (tie_word_embeddings), but they differ'
      )
  left = set(tensors) - used
  vision = {name for name in left if name.startswith(t5gemma.VISION)}
  _refuse_unknown(path, left - vision)
  if vision:
    logging.info(
      '%s: left out the %d tensors that read images; ptune reads text only',
      path,
      len(vision),
    )
  expected = t5gemma.shapes(config)
  wrong = [
    f'  {ours} {list(leaf.shape)}, by {CONFIG} {list(expected[ours])}'
    for ours, leaf in leaves.items()
    if leaf.shape != expected[ours]
  ]
  if wrong:
    raise UserError(
      f'{path}: {CONFIG} does not describe these tensors:\n'
      + '\n'.join(wrong)
      + '\nThe files do not belong together; download them again.'
    )
  return Source(
    path=str(path),
    kind='huggingface',
    step=_step(metadata),
    leaves=leaves,
    config=config,
    ignored={name: nbytes(tensors[name]) for name in sorted(vision)},
  )


def write_huggingface(
  directory: epath.Path,
  leaves: Mapping[str, Leaf],
  config: Config,
  step: int | None = None,
) -> None:
  """Writes config.json, like that of published models, and model.safetensors.

  It holds one tensor at a time in memory, so the model can have any size.

  Args:
    directory: An empty directory.
    leaves: The parameters of the model, by T5X's path.
    config: The model.
    step: The training step, stored in the metadata of the weights.

  Raises:
    ValueError: Hugging Face has no name for the activation, or no such model.
  """
  if isinstance(config, T5GemmaConfig):
    said, table = t5gemma_config.config_json(config), t5gemma.layout(config)
  else:
    said = t5_config.config_json(config)
    table = layout(
      range(config.num_encoder_layers),
      range(config.num_decoder_layers),
      config.relative_attention_per_layer,
      config.decoder_embedding,
      config.encoder_attention,
    )
  text = json.dumps(said, indent=2, sort_keys=True)
  (directory / CONFIG).write_text(text + '\n')
  generation = {
    'decoder_start_token_id': config.ids.start,
    'eos_token_id': t5_config.eos_token_id(config.ids),
    'pad_token_id': config.ids.pad,
  }
  text = json.dumps(generation, indent=2, sort_keys=True)
  (directory / GENERATION).write_text(text + '\n')
  tensors = {}
  for ours, leaf in leaves.items():
    theirs, transposed = table[ours]
    tensors[theirs] = _transposed(leaf) if transposed else leaf
  metadata = {} if step is None else {STEP: str(step)}
  safetensors_files.write_file(
    directory / weight_files.WEIGHTS, tensors, metadata
  )


def _step(metadata: Mapping[str, str]) -> int | None:
  """Returns the training step that `write_huggingface` stored."""
  text = metadata.get(STEP, '')
  if not text.isdecimal() or len(text) > 15:
    return None
  step, most = int(text), np.iinfo(np.int32).max
  if step > most:
    raise UserError(
      f'the metadata of the weights has {STEP} {step}; expected at most {most}'
    )
  return step


def _transposed(leaf: Leaf) -> Leaf:
  """[out, in] -> [in, out], slice by slice."""
  return Leaf(
    leaf.shape[::-1],
    leaf.dtype,
    lambda index: np.ascontiguousarray(leaf.fetch(index[::-1]).T),
  )


def _embeddings(
  path: epath.Path, tensors: Mapping[str, Leaf]
) -> tuple[str, str | None]:
  """Returns the encoder's embedding, and the decoder's if it has its own.

  A shared tensor has several names, and torch may save any of them. If they
  differ, transformers reads each stack's tokens with the stack's own.
  """
  shared, encoder, decoder = EMBEDDINGS
  found = [name for name in (encoder, shared, decoder) if name in tensors]
  if not found:
    return shared, None
  reads = found[0]
  if shared in tensors and _equal(tensors[reads], tensors[shared]):
    reads = shared
  if decoder not in tensors or _equal(tensors[reads], tensors[decoder]):
    return reads, None
  logging.info('%s: the decoder has its own embedding', path)
  return reads, decoder


def _is_shared(tensors: Mapping[str, Leaf], embedding: str) -> bool:
  shared = tensors.get(EMBEDDINGS[0])
  return shared is None or _equal(shared, tensors[embedding])


def _output(
  config: Mapping[str, Any], embedding: Leaf | None, head: Leaf | None
) -> tuple[bool, bool]:
  """Returns whether the embedding makes the logits, and whether they scale.

  The tensors decide, because transformers 5 writes tie_word_embeddings true
  even if the head is distinct. If the head is a mere copy of the embedding, the
  tensors do not say whether logits are scaled; then the configuration decides.
  """
  scaled = config.get('scale_decoder_outputs')
  if scaled is None and config.get('model_type') == 'mt5':
    scaled = False  # transformers 5 never scales an mT5's logits.
  if head is None:
    if scaled is None and config.get('tie_word_embeddings') is False:
      logging.warning(
        '%s says tie_word_embeddings false, but there is no %s: the scaled'
        ' embedding makes the logits',
        CONFIG,
        HEAD,
      )
    return True, scaled is not False
  if embedding is None or not _equal(embedding, head):
    return False, bool(scaled)
  if scaled is None:
    scaled = config.get('tie_word_embeddings', True)
  return bool(scaled), bool(scaled)


def _equal(a: Leaf, b: Leaf) -> bool:
  """Compares matrices, even of NaN, by blocks of rows."""
  if a.shape != b.shape or a.dtype != b.dtype or len(a.shape) != 2:
    return False
  rows, columns = a.shape
  for start in range(0, rows, 1024):
    index = slice(start, min(start + 1024, rows)), slice(0, columns)
    if a.fetch(index).tobytes() != b.fetch(index).tobytes():
      return False
  return True


def _refuse_unknown(path: epath.Path, names: set[str]) -> None:
  if names:
    raise UserError(
      f'{path} has {len(names)} tensors that no T5 for conditional '
      'generation has:\n'
      + '\n'.join(f'  {name}' for name in sorted(names))
      + '\nMerge adapters into the model, or use the base model itself.'
    )
