"""Hugging Face directories of T5, T5 1.1, mT5, FLAN-T5 and ByT5.

`layout` says what each T5X parameter is called there and whether it lies
transposed (torch keeps a kernel as [out, in]); it serves both directions.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from ptune.convert.source import EMBEDDING, LOGITS, Index, Leaf, Source, sizes

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
HEAD = 'lm_head.weight'

# Beside these, mT5 and T5 are one network; umT5 has a position bias in every
# layer.
MODEL_TYPES = ('t5', 'mt5')

# feed_forward_proj -> mlp_activations. Its 'gated-gelu' is the tanh
# approximation, as is ptune's gelu; its plain 'gelu' is not, hence absent.
ACTIVATIONS = {
  'relu': ('relu',),
  'gelu_new': ('gelu',),
  'silu': ('silu',),
  'gated-relu': ('relu', 'linear'),
  'gated-gelu': ('gelu', 'linear'),
  'gated-gelu_new': ('gelu', 'linear'),
  'gated-silu': ('silu', 'linear'),
}

# The shared embedding under its other names: torch saves whichever of a shared
# tensor's names it likes.
EMBEDDINGS = (
  'shared.weight',
  'encoder.embed_tokens.weight',
  'decoder.embed_tokens.weight',
)

# In the published T5 1.0 files; no released code has used it.
STRAY = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'

DTYPES = {
  'F64': 'float64',
  'F32': 'float32',
  'F16': 'float16',
  'BF16': 'bfloat16',
}

# config.json's name for a size of T5Config, and the name that stands for it
# where that is absent.
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

ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
DENSE = {name: name for name in ('wi', 'wi_0', 'wi_1', 'wo')}
# Of a layer, in order: our module and its norm, their module, its kernels.
SUBLAYERS = {
  'encoder': (
    ('attention', 'pre_attention_layer_norm', 'SelfAttention', ATTENTION),
    ('mlp', 'pre_mlp_layer_norm', 'DenseReluDense', DENSE),
  ),
  'decoder': (
    (
      'self_attention',
      'pre_self_attention_layer_norm',
      'SelfAttention',
      ATTENTION,
    ),
    (
      'encoder_decoder_attention',
      'pre_cross_attention_layer_norm',
      'EncDecAttention',
      ATTENTION,
    ),
    ('mlp', 'pre_mlp_layer_norm', 'DenseReluDense', DENSE),
  ),
}


def layout(
  encoder_layers: Iterable[int], decoder_layers: Iterable[int]
) -> dict[str, tuple[str, bool]]:
  """Maps T5X parameters to (Hugging Face name, transposed).

  'encoder/layers_0/mlp/wo/kernel' ->
  ('encoder.block.0.layer.1.DenseReluDense.wo.weight', True)

  Args:
    encoder_layers: Numbers of the encoder's layers.
    decoder_layers: Numbers of the decoder's layers.

  Returns:
    Every parameter that one or another member of the family has: gated and
    plain MLPs, with and without an output kernel.
  """
  table = {EMBEDDING: (EMBEDDINGS[0], False), LOGITS: (HEAD, True)}
  for stack, layers in (
    ('encoder', encoder_layers),
    ('decoder', decoder_layers),
  ):
    bias = 'block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    table[f'{stack}/relpos_bias/rel_embedding'] = (f'{stack}.{bias}', True)
    norm = f'{stack}.final_layer_norm.weight'
    table[f'{stack}/{stack}_norm/scale'] = (norm, False)
    for i in layers:
      for j, (module, norm, theirs, kernels) in enumerate(SUBLAYERS[stack]):
        ours, block = f'{stack}/layers_{i}', f'{stack}.block.{i}.layer.{j}'
        table[f'{ours}/{norm}/scale'] = (f'{block}.layer_norm.weight', False)
        for kernel, short in kernels.items():
          weight = f'{block}.{theirs}.{short}.weight'
          table[f'{ours}/{module}/{kernel}/kernel'] = (weight, True)
  return table


def open_huggingface(path: epath.Path) -> Source:
  """Opens a directory with config.json and safetensors.

  Raises:
    ValueError: a file is damaged or missing, a tensor is unknown, config.json
      disagrees with the tensors, or the network is one that ptune has not.
  """
  if path.as_posix().startswith('gs://'):
    raise ValueError(
      f'{path}: safetensors are mapped into memory, which needs local '
      f'files. Copy it: gcloud storage cp -r {path} .'
    )
  config = _json(path / CONFIG)
  activations = _activations(config, path / CONFIG)
  tensors = _tensors(path)
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
  table = layout(blocks['encoder'], blocks['decoder'])
  embedding = next((n for n in EMBEDDINGS if n in tensors), EMBEDDINGS[0])
  table[EMBEDDING] = (embedding, False)
  leaves = {
    ours: _transposed(tensors[theirs]) if transposed else tensors[theirs]
    for ours, (theirs, transposed) in table.items()
    if theirs in tensors
  }
  if _tied(config, tensors.get(embedding), tensors.get(HEAD), path):
    leaves.pop(LOGITS, None)
  used = {table[ours][0] for ours in leaves}
  ignored = set(tensors) - used
  _refuse_unknown(path, ignored - {*EMBEDDINGS, STRAY, HEAD})
  source = Source(
    path=str(path),
    kind='huggingface',
    step=None,
    leaves=leaves,
    activations=activations,
    ignored=tuple(sorted(ignored)),
  )
  _check_config(config, source)
  return source


def _json(file: epath.Path) -> dict[str, Any]:
  if not file.exists():
    found = sorted(child.name for child in file.parent.iterdir())
    raise ValueError(f'{file} is missing. Found: {", ".join(found)}')
  try:
    value = json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f'{file} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{file} holds a {type(value).__name__}, not an object.')
  return value


def _activations(
  config: Mapping[str, Any], file: epath.Path
) -> tuple[str, ...]:
  """The MLP's activations; refuses networks other than T5's."""
  # Published T5 1.0 configurations have no feed_forward_proj.
  projection = config.get('feed_forward_proj', 'relu')
  wrong = []
  if config.get('model_type') not in MODEL_TYPES:
    wrong.append(
      f'model_type {config.get("model_type")!r}: expected one of {MODEL_TYPES}'
    )
  if projection not in ACTIVATIONS:
    wrong.append(
      f'feed_forward_proj {projection!r}: expected one of {tuple(ACTIVATIONS)}'
    )
  for key, value in (
    ('layer_norm_epsilon', 1e-6),
    ('relative_attention_max_distance', 128),
  ):
    if config.get(key, value) != value:
      wrong.append(f'{key} {config[key]}: expected {value}')
  if wrong:
    raise ValueError(
      f'{file} describes a network that ptune does not have:\n'
      + '\n'.join(f'  {line}' for line in wrong)
    )
  return ACTIVATIONS[projection]


@contextlib.contextmanager
def _opened(file: epath.Path) -> Iterator[Any]:
  """Maps a safetensors file, and says which file it was if that fails."""
  try:
    with safetensors.safe_open(str(file), framework='numpy') as tensors:
      yield tensors
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f'{file} is missing, damaged or cut short; download it again. {error}'
    ) from error


def _tensors(path: epath.Path) -> dict[str, Leaf]:
  """Every tensor of a directory, as it is stored."""
  if (path / WEIGHTS).exists():
    return _of_file(path / WEIGHTS)
  index = _json(path / INDEX)
  where = index.get('weight_map')
  if not isinstance(where, dict) or not all(
    isinstance(file, str) and epath.Path(file).name == file
    for file in where.values()
  ):
    raise ValueError(
      f'{path / INDEX} has no proper weight_map; expected one that maps '
      'tensors to files beside it.'
    )
  names = sorted(set(where.values()))
  missing = [file for file in names if not (path / file).exists()]
  if missing:
    raise ValueError(
      f'{path / INDEX} names {len(names)} files, of which are missing: '
      f'{", ".join(missing)}. Download them again.'
    )
  shards = {file: _of_file(path / file) for file in names}
  absent = [
    f'  {name} in {file}'
    for name, file in where.items()
    if name not in shards[file]
  ]
  if absent:
    raise ValueError(
      f'{path / INDEX} names tensors that their files do not have:\n'
      + '\n'.join(absent)
    )
  return {name: shards[file][name] for name, file in where.items()}


def _of_file(file: epath.Path) -> dict[str, Leaf]:
  found = {}
  with _opened(file) as tensors:
    for name in tensors.keys():
      view = tensors.get_slice(name)
      found[name] = tuple(view.get_shape()), view.get_dtype()
  unknown = [
    f'  {name}: {dtype}'
    for name, (_, dtype) in found.items()
    if dtype not in DTYPES
  ]
  if unknown:
    raise ValueError(
      f'{file} has tensors of a dtype that is not read (expected '
      f'{", ".join(DTYPES)}):\n' + '\n'.join(unknown)
    )

  def leaf(name: str, shape: tuple[int, ...], dtype: str) -> Leaf:
    def fetch(index: Index) -> np.ndarray:
      # Mapped anew for each read: pages of a mapping that stays open count as
      # this process's memory until the whole file is in it.
      with _opened(file) as tensors:
        return tensors.get_slice(name)[index]

    return Leaf(shape, jnp.dtype(DTYPES[dtype]), fetch)

  return {
    name: leaf(name, shape, dtype) for name, (shape, dtype) in found.items()
  }


def _transposed(leaf: Leaf) -> Leaf:
  """[out, in] -> [in, out], slice by slice."""
  return Leaf(
    leaf.shape[::-1],
    leaf.dtype,
    lambda index: np.ascontiguousarray(leaf.fetch(index[::-1]).T),
  )


def _tied(
  config: Mapping[str, Any],
  embedding: Leaf | None,
  head: Leaf | None,
  path: epath.Path,
) -> bool:
  """Whether the scaled embedding makes the logits.

  The tensors decide: transformers 5 writes tie_word_embeddings true even where
  the head is distinct. Only a head that is a mere copy of the embedding leaves
  open whether logits are scaled, and there the configuration is asked.
  """
  scaled = config.get('scale_decoder_outputs')
  if head is None:
    if scaled is False:
      raise ValueError(
        f'{path}: there is no {HEAD}, and {CONFIG} says '
        'scale_decoder_outputs false: logits made with the embedding, but '
        'not scaled. ptune has only the scaled form '
        '(logits_via_embedding); save the model with its own head: '
        f'{HEAD} as a copy of {EMBEDDINGS[0]}.'
      )
    return True
  if embedding is None or not _equal(embedding, head):
    return False
  if scaled is None:
    scaled = config.get('tie_word_embeddings', True)
  return bool(scaled)


def _equal(a: Leaf, b: Leaf) -> bool:
  """Compares matrices by blocks of rows, up to the first that differs."""
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
    raise ValueError(
      f'{path} has {len(names)} tensors that no T5 for conditional '
      'generation has:\n'
      + '\n'.join(f'  {name}' for name in sorted(names))
      + '\nMerge adapters into the model, or take the base model itself.'
    )


def _check_config(config: Mapping[str, Any], source: Source) -> None:
  """Raises where config.json and the tensors tell different sizes."""
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
    raise ValueError(
      f'{source.path}: {CONFIG} does not describe these tensors:\n'
      + '\n'.join(wrong)
      + '\nThe files do not belong together; download them again.'
    )
