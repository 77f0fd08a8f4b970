"""One golden model in every checkpoint layout, and its expected answers.

The tests of ptune.convert import this module.
"""

import argparse
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from ptune.convert import commands, identity, open_checkpoint, restore
from ptune.methods import prompt
from ptune.model.models import EncoderDecoderModel
from ptune.model.network import Transformer

# Directories of golden models for which there are recorded answers.
FAMILIES = ('t5_1_0', 'mt5', 'byt5')
T5_1_1 = {
  't5x': 'checkpoints/legacy_base/checkpoint_1100000',
  't5x, holds a prompt': 'checkpoints/legacy_prompt/checkpoint_1100010',
  't5x_orbax': 'checkpoints/orbax_prompt/checkpoint_1100010',
  'huggingface': 'hf/t5_1_1',
}


def run(*argv) -> None:
  """Runs a command in the same way as the `ptune` program."""
  parser = argparse.ArgumentParser()
  programs = parser.add_subparsers(dest='program', required=True)
  for name in commands.COMMANDS:
    commands.add_arguments(name, programs.add_parser(name))
  commands.run(parser.parse_args([str(arg) for arg in argv]))


def load(path) -> dict[str, np.ndarray]:
  with np.load(path) as arrays:
    return dict(arrays)


def read(path) -> dict[str, np.ndarray]:
  """Returns all parameters of a checkpoint in their stored form."""
  source = open_checkpoint(path)
  return {name: leaf.read() for name, leaf in source.leaves.items()}


def assert_same(got, expected) -> None:
  assert got.keys() == expected.keys()
  for name, array in expected.items():
    assert got[name].dtype == array.dtype, name
    np.testing.assert_array_equal(got[name], array, err_msg=name)


@functools.cache
def model(config, length: int = 0) -> EncoderDecoderModel:
  placements = prompt.prompt(length).placements if length else ()
  return EncoderDecoderModel(Transformer(config, placements))


@functools.cache
def _logits(config, length):
  return jax.jit(model(config, length).logits)


@functools.cache
def _greedy(config, length, steps):
  predict = model(config, length).predict
  return jax.jit(lambda params, tokens: predict(params, tokens, steps)[0])


def greedy(path, case, steps, rows=None) -> np.ndarray:
  """Returns ptune's greedy answers, one token a step: [batch, steps]."""
  config, arrays = restored(path)
  length = 0 if rows is None else len(rows)
  if length:
    arrays = {**arrays, prompt.PATH: jnp.asarray(rows)}
  inputs = jnp.asarray(case['encoder_input_tokens'])
  return np.asarray(_greedy(config, length, steps)(nested(arrays), inputs))


def restored(path) -> tuple:
  """Returns the configuration and the parameters of a checkpoint."""
  source = open_checkpoint(path)
  abstract = {
    name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    for name, leaf in identity.base_leaves(source).items()
  }
  arrays = restore(source, abstract, ignore=('*/prompt/*',))
  return identity.config(source), arrays


def logits(path, case, rows=None) -> np.ndarray:
  """Returns ptune's logits for a checkpoint's model with a prompt."""
  config, arrays = restored(path)
  length = 0
  if rows is not None:
    arrays = {**arrays, prompt.PATH: jnp.asarray(rows)}
    length = len(rows)
  batch = {
    key: jnp.asarray(case[key])
    for key in (
      'encoder_input_tokens',
      'decoder_input_tokens',
      'decoder_target_tokens',
    )
  }
  return np.asarray(_logits(config, length)(nested(arrays), batch))


def nested(arrays):
  return traverse_util.unflatten_dict(arrays, sep='/')


def assert_logits(got, expected, case, atol=5e-5) -> None:
  """Compares logits at positions that have a target."""
  real = case['decoder_loss_weights'] > 0
  np.testing.assert_allclose(got[real], expected[real], atol=atol)


def scanned(params, heads: int | None = None) -> dict[str, np.ndarray]:
  """Stacks layers as T5X does; `heads` gives the heads an axis of their own."""
  stacks: dict[str, list[np.ndarray]] = {}
  flat = {}
  for path, array in params.items():
    match = re.fullmatch(r'(encoder|decoder)/layers_\d+/(.+)', path)
    if not match:
      flat[path] = array
      continue
    if heads and 'attention/' in path and path.endswith('out/kernel'):
      array = array.reshape(heads, -1, array.shape[1])
    elif heads and 'attention/' in path and path.endswith('kernel'):
      array = array.reshape(array.shape[0], heads, -1)
    stacks.setdefault(f'{match[1]}/{match[1]}/{match[2]}', []).append(array)
  return flat | {name: np.stack(x, axis=1) for name, x in stacks.items()}


def shard(directory: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  """Splits a Hugging Face checkpoint into three shards with an index."""
  target.mkdir(parents=True)
  config = (directory / 'config.json').read_text()
  (target / 'config.json').write_text(config)
  tensors = safetensors.numpy.load_file(directory / 'model.safetensors')
  where = {}
  for i in range(3):
    name = f'model-{i + 1:05}-of-00003.safetensors'
    part = dict(list(tensors.items())[i::3])
    safetensors.numpy.save_file(part, target / name)
    where |= dict.fromkeys(part, name)
  index = {'metadata': {}, 'weight_map': where}
  (target / 'model.safetensors.index.json').write_text(json.dumps(index))
  return target
