"""Converting whole models between layouts changes none of their values."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from ptune.convert import identity, open_checkpoint
from ptune.convert.conversion import convert
from ptune.convert.huggingface import write_huggingface
from ptune.convert.layout import shapes
from ptune.convert.source import Leaf
from ptune.convert.t5x import write_t5x
from ptune.model.sizes import T5Config
from tests import layouts

LAYOUTS = ('t5x', 'huggingface')


def _leaves(arrays):
  return {
    name: Leaf(a.shape, a.dtype, a.__getitem__) for name, a in arrays.items()
  }


# ---- The reference's answers, through every layout --------------------------


@pytest.mark.parametrize('kind', layouts.T5_1_1)
@pytest.mark.parametrize('through', ['itself', *LAYOUTS])
def test_golden_logits_through_every_layout(numerics, tmp_path, kind, through):
  path = numerics / layouts.T5_1_1[kind]
  expected = layouts.load(numerics / 'prompt_encoder' / 'params.npz')
  if through != 'itself':
    convert(path, through, tmp_path / 'c', base_only=True)
    path = tmp_path / 'c'
    layouts.assert_same(layouts.read(path), expected)
  case = layouts.load(numerics / 'prompt_encoder' / 'case_p5.npz')
  rows = layouts.load(numerics / 'prompt_encoder' / 'prompts.npz')['prompt_p5']
  got = layouts.logits(path, case, rows)
  layouts.assert_logits(got, case['logits'], case)


@pytest.mark.parametrize('family', layouts.FAMILIES)
@pytest.mark.parametrize(
  'chain', [(), ('t5x',), ('huggingface',), ('t5x', 'huggingface')], ids=str
)
def test_golden_logits_of_every_family(numerics, tmp_path, family, chain):
  path = numerics / 'hf' / family
  case = layouts.load(path / 'case.npz')
  for i, layout in enumerate(chain):
    convert(path, layout, tmp_path / str(i))
    path = tmp_path / str(i)
  got = layouts.logits(path, case, case['prompt'])
  layouts.assert_logits(got, case['prompted_logits'], case)


def test_golden_logits_from_shards(numerics, tmp_path):
  path = layouts.shard(numerics / 'hf' / 't5_1_1', tmp_path / 'shards')
  case = layouts.load(numerics / 'prompt_encoder' / 'case_noprompt.npz')
  got = layouts.logits(path, case)
  layouts.assert_logits(got, case['logits'], case)


# ---- Round trips ------------------------------------------------------------


@pytest.mark.parametrize('family', ['t5_1_1', *layouts.FAMILIES])
def test_huggingface_to_t5x_and_back_is_the_same_file(
  numerics, tmp_path, family
):
  path = numerics / 'hf' / family
  convert(path, 't5x', tmp_path / 'a')
  convert(tmp_path / 'a', 'huggingface', tmp_path / 'b')
  before = safetensors.numpy.load_file(path / 'model.safetensors')
  after = safetensors.numpy.load_file(tmp_path / 'b' / 'model.safetensors')
  ignored = set(open_checkpoint(path).ignored)
  layouts.assert_same(
    after, {k: v for k, v in before.items() if k not in ignored}
  )
  said = json.loads((path / 'config.json').read_text())
  written = json.loads((tmp_path / 'b' / 'config.json').read_text())
  # These keys do not describe the weights.
  for key in ('n_positions', 'architectures', 'model_type'):
    said.pop(key, None)
  assert said.items() <= written.items()
  assert written['tie_word_embeddings'] == ('lm_head.weight' not in before)


def test_t5x_to_huggingface_and_back_is_the_same(numerics, tmp_path):
  path = numerics / layouts.T5_1_1['t5x']
  convert(path, 'huggingface', tmp_path / 'a')
  convert(tmp_path / 'a', 't5x', tmp_path / 'b')
  layouts.assert_same(layouts.read(tmp_path / 'b'), layouts.read(path))
  # Adafactor's decay depends on the step, so the step must be kept.
  assert open_checkpoint(tmp_path / 'b').step == 1100000


def test_bfloat16_and_zeros_are_copied_as_they_are(tmp_path):
  arrays = _tiny()
  arrays = {name: a.astype(jnp.bfloat16) for name, a in arrays.items()}
  arrays['encoder/encoder_norm/scale'][:] = 0
  arrays['token_embedder/embedding'][3:] = -0.0
  (tmp_path / 'a').mkdir()
  write_t5x(epath.Path(tmp_path / 'a'), _leaves(arrays), 3)
  convert(tmp_path / 'a', 'huggingface', tmp_path / 'b')
  convert(tmp_path / 'b', 't5x', tmp_path / 'c')
  for name in 'abc':
    layouts.assert_same(layouts.read(tmp_path / name), arrays)
  got = layouts.read(tmp_path / 'c')['token_embedder/embedding']
  assert np.signbit(got[3:].astype(np.float32)).all()


def test_published_mt5_is_written_as_mt5(tmp_path):
  config = T5Config(
    vocab_size=250112,
    emb_dim=1,
    num_heads=1,
    head_dim=1,
    mlp_dim=1,
    num_encoder_layers=1,
    num_decoder_layers=1,
  )
  # For a tied mT5, transformers does not scale the logits.
  for tied, kind in ((False, 'mt5'), (True, 't5')):
    config = dataclasses.replace(config, logits_via_embedding=tied)
    arrays = {k: np.zeros(v, np.float16) for k, v in shapes(config).items()}
    path = epath.Path(tmp_path / kind)
    path.mkdir()
    write_huggingface(path, _leaves(arrays), config)
    said = json.loads((path / 'config.json').read_text())
    assert said['model_type'] == kind
    assert said['architectures'] == [f'{kind.upper()}ForConditionalGeneration']
    assert said['tie_word_embeddings'] == tied
    assert identity.config(open_checkpoint(path)) == config


TINY = T5Config(
  vocab_size=6,
  emb_dim=4,
  num_heads=2,
  head_dim=5,
  mlp_dim=7,
  num_encoder_layers=1,
  num_decoder_layers=1,
)


def _tiny():
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in shapes(TINY).items()
  }


# ---- Activations ------------------------------------------------------------


def test_an_activation_that_t5x_does_not_say_is_given(tmp_path):
  (tmp_path / 'a').mkdir()
  write_t5x(epath.Path(tmp_path / 'a'), _leaves(_tiny()))
  lines = convert(tmp_path / 'a', 'huggingface', tmp_path / 'b')
  assert "took mlp_activations ('gelu', 'linear')" in '\n'.join(lines)
  silu = ('silu', 'linear')
  convert(tmp_path / 'a', 'huggingface', tmp_path / 'c', activations=silu)
  assert open_checkpoint(tmp_path / 'c').activations == silu
  with pytest.raises(ValueError, match='--activations=gelu,linear, but the hu'):
    gelu = ('gelu', 'linear')
    convert(tmp_path / 'c', 't5x', tmp_path / 'd', activations=gelu)
  for wrong, message in (
    (('relu',), r'mlp/wi_0/kernel: \[4, 7\], expected none'),
    (('tanh', 'linear'), "'tanh', 'linear'.*; they must be of"),
  ):
    with pytest.raises(ValueError, match=message):
      convert(tmp_path / 'a', 'huggingface', tmp_path / 'd', activations=wrong)
  assert not (tmp_path / 'd').exists()


# ---- Refusals ---------------------------------------------------------------


def test_adapters_have_no_place_in_the_other_layout(numerics, tmp_path):
  path = numerics / layouts.T5_1_1['t5x_orbax']
  with pytest.raises(ValueError, match='encoder/prompt/prompt/prompt\n'):
    convert(path, 'huggingface', tmp_path / 'c')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('layout', LAYOUTS)
def test_values_that_are_not_finite_leave_nothing_behind(tmp_path, layout):
  arrays = _tiny()
  arrays['decoder/layers_0/mlp/wo/kernel'][6, 3] = np.nan
  (tmp_path / 'a').mkdir()
  write_t5x(epath.Path(tmp_path / 'a'), _leaves(arrays))
  with pytest.raises(ValueError, match=r'decoder/layers_0/mlp/wo/kernel \[7, '):
    convert(tmp_path / 'a', layout, tmp_path / 'b')
  assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_a_part_of_a_model_is_refused(tmp_path):
  arrays = _tiny()
  del arrays['decoder/layers_0/mlp/wo/kernel']
  (tmp_path / 'a').mkdir()
  write_t5x(epath.Path(tmp_path / 'a'), _leaves(arrays))
  for layout in LAYOUTS:
    with pytest.raises(
      ValueError, match=r'mlp/wo/kernel: missing, expec.*7, 4'
    ):
      convert(tmp_path / 'a', layout, tmp_path / 'b')
  half = {k: v for k, v in arrays.items() if not k.startswith('encoder/')}
  (tmp_path / 'h').mkdir()
  write_t5x(epath.Path(tmp_path / 'h'), _leaves(half))
  with pytest.raises(
    ValueError, match=r"not a whole model.*'num_encoder_layers'"
  ):
    convert(tmp_path / 'h', 't5x', tmp_path / 'b')
  assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize('layout', LAYOUTS)
def test_an_output_is_replaced_only_when_asked(numerics, tmp_path, layout):
  path = numerics / 'hf' / 't5_1_0'
  layouts.run('convert', path, '--format', layout, '--output', tmp_path / 'c')
  before = layouts.read(tmp_path / 'c')
  other = numerics / 'hf' / 'mt5'
  argv = ('convert', other, '--format', layout, '--output', tmp_path / 'c')
  with pytest.raises(ValueError, match='exists already; nothing was written'):
    layouts.run(*argv)
  layouts.assert_same(layouts.read(tmp_path / 'c'), before)
  layouts.run(*argv, '--overwrite')
  layouts.assert_same(layouts.read(tmp_path / 'c'), layouts.read(other))
  assert [child.name for child in tmp_path.iterdir()] == ['c']
