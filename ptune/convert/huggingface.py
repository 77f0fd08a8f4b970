"""Hugging Face directories of T5, mT5, UMT5 and LongT5, in all their versions.

config.json        sizes, activation, whether the output layer is tied, ids
model.safetensors  or shards, and model.safetensors.index.json
pytorch_model.bin  or its shards, if there are no safetensors
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from ptune.convert import safetensors_files, t5gemma, torch_files
from ptune.convert.layout import (
  EMBEDDINGS,
  ENCODER_ATTENTION,
  HEAD,
  STRAY,
  layout,
)
from ptune.convert.source import (
  EMBEDDING,
  LOGITS,
  Leaf,
  Source,
  nbytes,
  sizes,
)
from ptune.errors import UserError
from ptune.host import paths
from ptune.model.sizes import Config, T5Config, TokenIds
from ptune.model.t5gemma_sizes import T5GemmaConfig

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
GENERATION = 'generation_config.json'
STEP = 'step'  # A key in the metadata of the weights.

# The number of embedding rows identifies these.
BYT5 = 384
MT5 = 250112

# mT5 and T5 have the same network; UMT5 has a position bias in every layer.
PER_LAYER = 'umt5'
LONG = 'longt5'
# model_type -> what transformers' classes begin with.
CLASSES = {'t5': 'T5', 'mt5': 'MT5', PER_LAYER: 'UMT5', LONG: 'LongT5'}

# feed_forward_proj -> mlp_activations. Its 'gated-gelu' is the tanh
# approximation, as is ptune's gelu; its plain 'gelu' is not, so it is absent.
ACTIVATIONS = {
  'relu': ('relu',),
  'gelu_new': ('gelu',),
  'silu': ('silu',),
  'gated-relu': ('relu', 'linear'),
  'gated-gelu': ('gelu', 'linear'),
  'gated-gelu_new': ('gelu', 'linear'),
  'gated-silu': ('silu', 'linear'),
}

# transformers' names for these activations, after it reads the above.
DENSE_ACT_FN = {'gelu': 'gelu_new'}

# The sizes of LongT5's encoder attention: their defaults in transformers.
LOCAL_RADIUS = 127
GLOBAL_BLOCK_SIZE = 16

# config.json's name for a size of T5Config, and the name to use if that is
# absent.
CONFIG_SIZES = {
  'vocab_size': ('vocab_size', None),
  'emb_dim': ('d_model', None),
  'num_heads': ('num_heads', None),
  'head_dim': ('d_kv', None),
  'mlp_dim': ('d_ff', None),
  'num_encoder_layers': ('num_layers', None),
  'num_decoder_layers': ('num_decoder_layers', 'num_layers'),
  'relative_attention_num_buckets': ('relative_attention_num_buckets', None),
}


def open_huggingface(path: epath.Path) -> Source:
  """Opens a directory with config.json and safetensors.

  Raises:
    ValueError: A file is damaged or missing, a tensor is unknown, config.json
      contradicts the tensors, or ptune does not have the network.
  """
  config = read_json(path / CONFIG)
  if config.get('model_type') in t5gemma.MODEL_TYPES:
    return _open_t5gemma(path, config)
  activations = _activations(config, path / CONFIG)
  attention = _attention(config)
  ids = _token_ids(config, path)
  tensors, metadata = _tensors(path)
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
    config.get('model_type') == PER_LAYER,
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
  _check_config(config, source)
  return source


def _open_t5gemma(path: epath.Path, said: Mapping[str, Any]) -> Source:
  """Opens a T5Gemma or T5Gemma 2, without the part that reads images."""
  ids = _token_ids(t5gemma.token_ids(said), path)
  config = t5gemma.read_config(said, ids, path / CONFIG)
  tensors, metadata = _tensors(path)
  # transformers uses this name in memory, and the shorter one in files.
  tensors = {k.replace('.text_model.', '.'): x for k, x in tensors.items()}
  leaves, used = {}, set()
  for ours, (theirs, transposed) in t5gemma.layout(config).items():
    # A shared tensor has several names; torch may save any of them.
    names = [theirs, *t5gemma.copies(config, ours)]
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
    said, table = t5gemma.config_json(config), t5gemma.layout(config)
  else:
    said = _config_json(config)
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
    'eos_token_id': config.ids.eos,
    'pad_token_id': config.ids.pad,
  }
  text = json.dumps(generation, indent=2, sort_keys=True)
  (directory / GENERATION).write_text(text + '\n')
  tensors = {}
  for ours, leaf in leaves.items():
    theirs, transposed = table[ours]
    tensors[theirs] = _transposed(leaf) if transposed else leaf
  metadata = {} if step is None else {STEP: str(step)}
  safetensors_files.write_file(directory / WEIGHTS, tensors, metadata)


def _config_json(config: T5Config) -> dict[str, Any]:
  """Returns the config.json of a T5, like that of published models."""
  if config.decoder_only:
    raise UserError(
      'Hugging Face has no model of a decoder alone; use --format=t5x'
    )
  projections = {names: text for text, names in reversed(ACTIVATIONS.items())}
  if config.mlp_activations not in projections:
    raise UserError(
      f'no feed_forward_proj means mlp_activations {config.mlp_activations}; '
      f'known: {sorted(projections)}'
    )
  tied, scaled = config.logits_via_embedding, config.scales_outputs
  kind = 't5'
  if config.local_radius:
    kind = LONG
  elif config.relative_attention_per_layer:
    kind = PER_LAYER
  elif config.vocab_size == MT5 and not scaled:  # transformers scales no mT5.
    kind = 'mt5'
  said: dict[str, Any] = {
    'architectures': [f'{CLASSES[kind]}ForConditionalGeneration'],
    'decoder_start_token_id': config.ids.start,
    'dropout_rate': 0.1,
    'eos_token_id': config.ids.eos,
    'feed_forward_proj': projections[config.mlp_activations],
    'initializer_factor': 1.0,
    'is_encoder_decoder': True,
    'layer_norm_epsilon': 1e-06,
    'model_type': kind,
    'output_past': True,
    'pad_token_id': config.ids.pad,
    'relative_attention_max_distance': 128,
    # transformers also reads this as "the logits are scaled".
    'tie_word_embeddings': tied,
    'use_cache': True,
    **{
      theirs: getattr(config, ours)
      for ours, (theirs, _) in CONFIG_SIZES.items()
    },
  }
  if config.local_radius:
    said |= {
      'encoder_attention_type': config.encoder_attention,
      'local_radius': config.local_radius,
    }
  if config.global_block_size:
    said['global_block_size'] = config.global_block_size
  if scaled != tied:
    said['scale_decoder_outputs'] = scaled
  if config.vocab_size == BYT5:
    said['tokenizer_class'] = 'ByT5Tokenizer'
  return said


def read_json(file: epath.Path) -> dict[str, Any]:
  """Reads a JSON object; raises ValueError if there is none."""
  if not file.exists():
    found = sorted(child.name for child in file.parent.iterdir())
    raise UserError(f'{file} is missing. Found: {", ".join(found)}')
  paths.check_file(file)
  try:
    value = json.loads(file.read_text())
  except (ValueError, RecursionError, OSError) as error:
    raise UserError(f'{file} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise UserError(f'{file} holds a {type(value).__name__}, not an object.')
  return value


def _activations(
  config: Mapping[str, Any], file: epath.Path
) -> tuple[str, ...]:
  """Returns the MLP's activations; refuses networks other than T5's."""
  # Published T5 1.0 configurations have no feed_forward_proj.
  plain = ('t5', LONG)
  default = 'relu' if config.get('model_type') in plain else 'gated-gelu'
  projection = str(config.get('feed_forward_proj', default))
  wrong = []
  if config.get('model_type') not in CLASSES:
    wrong.append(
      f'model_type {config.get("model_type")!r}: expected one of'
      f' {tuple(CLASSES)}'
    )
  wrong += _unknown_attention(config)
  if projection not in ACTIVATIONS:
    wrong.append(
      f'feed_forward_proj {projection!r}: expected one of {tuple(ACTIVATIONS)}'
    )
  activations = ACTIVATIONS.get(projection, ('?',))
  act = DENSE_ACT_FN.get(activations[0], activations[0])
  for key, value in (
    ('layer_norm_epsilon', 1e-6),
    ('relative_attention_max_distance', 128),
    # If these contradict feed_forward_proj, transformers uses these.
    ('dense_act_fn', act),
    ('is_gated_act', len(activations) > 1),
    ('tie_encoder_decoder', False),
    ('quantization_config', None),
  ):
    if config.get(key, value) != value and '?' not in activations:
      wrong.append(f'{key} {config[key]}: expected {value}')
  if wrong:
    raise UserError(
      f'{file} describes a network that ptune does not have:\n'
      + '\n'.join(f'  {line}' for line in wrong)
    )
  return ACTIVATIONS[projection]


def _unknown_attention(config: Mapping[str, Any]) -> list[str]:
  """What a LongT5's encoder attention has that ours has not."""
  if config.get('model_type') != LONG:
    return []
  wrong = []
  kind = config.get('encoder_attention_type', 'local')
  known = tuple(name for name in ENCODER_ATTENTION if name != 'full')
  if kind not in known:
    wrong.append(f'encoder_attention_type {kind!r}: expected one of {known}')
  for key in ('local_radius', 'global_block_size'):
    value = config.get(key, 1)
    if not isinstance(value, int) or value < 1:
      wrong.append(f'{key} {value!r}: expected a whole number from 1 on')
  return wrong


def _attention(config: Mapping[str, Any]) -> tuple[int, int]:
  """local_radius and global_block_size, as T5Config has them."""
  if config.get('model_type') != LONG:
    return 0, 0
  radius = config.get('local_radius', LOCAL_RADIUS)
  if config.get('encoder_attention_type', 'local') == 'local':
    return radius, 0
  return radius, config.get('global_block_size', GLOBAL_BLOCK_SIZE)


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


def _tensors(path: epath.Path) -> tuple[dict[str, Leaf], dict[str, str]]:
  """Returns every tensor of a directory, as stored, and the files' metadata."""
  tensors, metadata = _read_tensors(path)
  if not tensors:
    raise UserError(f'{path} has weights without a single tensor')
  return tensors, metadata


def _read_tensors(
  path: epath.Path,
) -> tuple[dict[str, Leaf], dict[str, str]]:
  names = {child.name for child in path.iterdir()}
  for reader, whole, parts in (
    (safetensors_files.open_file, WEIGHTS, INDEX),
    (torch_files.open_file, torch_files.WEIGHTS, torch_files.INDEX),
  ):
    if whole in names:
      return reader(path / whole)
    if parts in names:
      return _shards(path, path / parts, reader)
  read_json(path / INDEX)  # Raises the error that it is missing.
  raise AssertionError(path)


def _shards(
  path: epath.Path,
  index_file: epath.Path,
  open_file: Callable[[epath.Path], tuple[dict[str, Leaf], dict[str, str]]],
) -> tuple[dict[str, Leaf], dict[str, str]]:
  """Returns the tensors of all files that an index names."""
  index = read_json(index_file)
  where = index.get('weight_map')
  if not isinstance(where, dict) or not all(
    isinstance(file, str) and epath.Path(file).name == file
    for file in where.values()
  ):
    raise UserError(
      f'{index_file} has no valid weight_map; expected one that maps '
      'tensors to files beside it.'
    )
  names = sorted(set(where.values()))
  missing = [file for file in names if not (path / file).exists()]
  if missing:
    raise UserError(
      f'{index_file} names {len(names)} files, and these are missing: '
      f'{", ".join(missing)}. Download them again.'
    )
  opened = {file: open_file(path / file) for file in names}
  shards = {file: tensors for file, (tensors, _) in opened.items()}
  absent = [
    f'  {name} in {file}'
    for name, file in where.items()
    if name not in shards[file]
  ]
  if absent:
    raise UserError(
      f'{index_file} names tensors that their files do not have:\n'
      + '\n'.join(absent)
    )
  metadata = {k: v for _, found in opened.values() for k, v in found.items()}
  return {name: shards[file][name] for name, file in where.items()}, metadata


def _transposed(leaf: Leaf) -> Leaf:
  """[out, in] -> [in, out], slice by slice."""
  return Leaf(
    leaf.shape[::-1],
    leaf.dtype,
    lambda index: np.ascontiguousarray(leaf.fetch(index[::-1]).T),
  )


def _token_ids(config: Mapping[str, Any], path: epath.Path) -> TokenIds:
  """Returns the special tokens that transformers would use.

  For generation, generation_config.json takes precedence if it exists.
  """
  generation = path / GENERATION
  told = read_json(generation) if generation.exists() else {}
  said = {
    key: told.get(key, config.get(key, default))
    for key, default in (
      ('pad_token_id', 0),
      ('eos_token_id', 1),
      ('decoder_start_token_id', None),
    )
  }
  eos = said['eos_token_id']
  if isinstance(eos, list) and eos:
    if len(eos) > 1:
      logging.warning(
        '%s: answers end with any of the tokens %s, but ptune ends them only'
        ' with %s',
        path,
        eos,
        eos[0],
      )
    said['eos_token_id'] = eos[0]
  if said['decoder_start_token_id'] is None:
    said['decoder_start_token_id'] = said['pad_token_id']
  wrong = {
    key: value
    for key, value in said.items()
    if not isinstance(value, int) or isinstance(value, bool) or value < 0
  }
  if wrong:
    raise UserError(
      f'{path / CONFIG} describes a model whose special tokens ptune cannot'
      f' use: {wrong}; expected the id of a token for each'
    )
  return TokenIds(
    pad=said['pad_token_id'],
    eos=said['eos_token_id'],
    start=said['decoder_start_token_id'],
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
  """Compares matrices by blocks of rows, up to the first difference."""
  if a.shape != b.shape or a.dtype != b.dtype or len(a.shape) != 2:
    return False
  rows, columns = a.shape
  for start in range(0, rows, 1024):
    index = slice(start, min(start + 1024, rows)), slice(0, columns)
    if not np.array_equal(a.fetch(index), b.fetch(index)):
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


def _check_config(config: Mapping[str, Any], source: Source) -> None:
  """Raises an error if config.json and the tensors give different sizes."""
  found = sizes(source.shapes)
  wrong = []
  for ours, (key, other) in CONFIG_SIZES.items():
    said = config.get(key)
    said = config.get(other) if said is None and other else said
    if said is not None and ours in found and said != found[ours]:
      wrong.append(f'  {key} is {said}, in the tensors {found[ours]}')
  gated = len(source.activations or ()) == 2
  if found.get('gated', gated) != gated:
    wrong.append(
      f'  feed_forward_proj is {config.get("feed_forward_proj")!r}, but the '
      f'tensors are {"wi_0 and wi_1" if found["gated"] else "wi"}'
    )
  if wrong:
    raise UserError(
      f'{source.path}: {CONFIG} does not describe these tensors:\n'
      + '\n'.join(wrong)
      + '\nThe files do not belong together; download them again.'
    )
