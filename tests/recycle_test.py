"""Moving a prompt between models is exact if the models are related exactly."""

import json

import numpy as np
import pytest

from ptune import cli, pretrained
from ptune.analysis import recycle
from ptune.convert import open_checkpoint, safetensors_files
from ptune.convert.prompts import Prompt, read_prompt
from ptune.convert.source import EMBEDDING, Leaf

TOKENS, WIDTH = 300, 12
BASE = 'ptune://tiny'


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SOURCE = normal(TOKENS, WIDTH)
PROMPT = Prompt(normal(5, WIDTH, seed=1) * 4, 'p.npy', 'npy', {})


@pytest.mark.parametrize('width', [7, 12, 30])
@pytest.mark.parametrize('method', ['linear', 'lstsq'])
def test_a_target_that_is_a_linear_map_gets_the_mapped_prompt(method, width):
  weights = normal(WIDTH, width, seed=2)
  moved, errors = recycle.recycle(PROMPT, SOURCE, SOURCE @ weights, method)
  np.testing.assert_allclose(moved, PROMPT.array @ weights, atol=1e-4)
  assert moved.dtype == np.float32
  assert max(errors.values()) < 1e-5


@pytest.mark.parametrize('tokens', [TOKENS, 25])
def test_both_linear_methods_give_the_same_prompt(tokens):
  # This also holds with fewer tokens than dimensions, because both methods take
  # the solution of least norm.
  wide = normal(TOKENS, 40, seed=4)[:tokens]
  target = normal(TOKENS, 9, seed=3)[:tokens]
  prompt = Prompt(normal(5, 40, seed=5), 'p.npy', 'npy', {})
  first, _ = recycle.recycle(prompt, wide, target, 'linear')
  second, _ = recycle.recycle(prompt, wide, target, 'lstsq')
  np.testing.assert_allclose(first, second, atol=1e-5)
  expected = prompt.array @ np.linalg.pinv(wide.astype(np.float64)) @ target
  np.testing.assert_allclose(first, expected, atol=1e-4)


def test_an_embedding_without_full_rank_is_no_trouble():
  flat = np.concatenate([SOURCE, SOURCE[:, :3]], axis=1)
  weights = normal(WIDTH, 6, seed=2)
  array = np.concatenate([PROMPT.array, PROMPT.array[:, :3]], axis=1)
  prompt = Prompt(array, 'p.npy', 'npy', {})
  for method in ('linear', 'lstsq'):
    moved, _ = recycle.recycle(prompt, flat, SOURCE @ weights, method)
    np.testing.assert_allclose(moved, PROMPT.array @ weights, atol=1e-3)


def test_the_held_out_error_tells_what_cannot_be_mapped():
  noise = normal(TOKENS, WIDTH, seed=9)
  _, errors = recycle.recycle(PROMPT, SOURCE, noise, 'linear')
  assert errors['fit_error'] < 1 < errors['held_out_error']


def test_the_mlp_learns_what_no_linear_map_can(monkeypatch):
  # More epochs than in the paper, because there are few tokens.
  monkeypatch.setattr(recycle, 'EPOCHS', 100)
  monkeypatch.setattr(recycle, 'RATE', 1e-2)
  source = normal(TOKENS, 4)
  target = np.abs(source)
  prompt = Prompt(source[:3], 'p.npy', 'npy', {})
  line, linear = recycle.recycle(prompt, source, target, 'linear')
  moved, errors = recycle.recycle(prompt, source, target, 'mlp')
  assert errors['held_out_error'] < 0.4 < linear['held_out_error']
  off = lambda found: np.linalg.norm(found - target[:3])
  assert off(moved) < off(line) / 2
  again = recycle.mlp(source, target)(prompt.array)
  assert (again == moved).all()


# ---------------------------------------------------------------- of two models


@pytest.fixture
def other(tmp_path):
  """A model with the same vocabulary; its embedding is a map of the base's."""
  leaves = open_checkpoint(BASE).leaves
  table = leaves[EMBEDDING].read().astype(np.float32)
  weights = normal(96, 32, seed=6) / 10
  folder = tmp_path / 'other'
  folder.mkdir()
  config = json.loads(
    (pretrained.directory('tiny') / 'config.json').read_text()
  )
  (folder / 'config.json').write_text(json.dumps({**config, 'd_model': 32}))
  made = table @ weights
  tensors = {'shared.weight': Leaf(made.shape, made.dtype, made.__getitem__)}
  safetensors_files.write_file(folder / 'model.safetensors', tensors, {})
  return folder, weights


@pytest.fixture
def prompt(tmp_path):
  np.save(tmp_path / 'p.npy', normal(4, 96, seed=7))
  return str(tmp_path / 'p.npy')


def test_a_prompt_is_recycled_between_models(other, prompt, tmp_path, capsys):
  folder, weights = other
  output = tmp_path / 'moved.npy'
  flags = [f'--source={BASE}', f'--target={folder}', f'--output={output}']
  words = f'--target_vocabulary={pretrained.VOCABULARY}'
  assert cli.main(['recycle', prompt, *flags, words]) == 0
  assert 'linear map fitted to' in capsys.readouterr().out
  moved = read_prompt(output)
  np.testing.assert_allclose(moved.array, np.load(prompt) @ weights, atol=1e-4)
  facts = moved.facts['recycled']
  assert facts['by'] == 'linear' and facts['fit_error'] < 1e-4
  assert 2000 < facts['tokens'] < 3000  # Without control marks and bytes.
  assert cli.main(['recycle', prompt, *flags]) == 2
  assert 'exists already' in capsys.readouterr().err
  flags += ['--overwrite', '--method=lstsq', '--tokens=500', '--skip=300']
  assert cli.main(['recycle', prompt, *flags]) == 0
  again = read_prompt(output)
  assert again.facts['recycled']['tokens'] == 500
  np.testing.assert_allclose(again.array, moved.array, atol=1e-3)


def test_tokens_are_matched_by_their_text(monkeypatch):
  texts = {'a': [None, 'x', 'y', 'z'], 'b': [None, None, 'z', 'w', 'x', 'y']}
  monkeypatch.setattr(
    recycle, 'read_vocabulary', lambda path: (texts[path], None)
  )
  sides = recycle.Side('a'), recycle.Side('b')
  ids, same = recycle.shared_tokens(sides, (4, 5))  # 'y' has no row.
  assert ids.tolist() == [1, 3] and same.tolist() == [4, 2]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--target={other}', '--tokens=5'], '5 tokens are too few'),
    (['--target={other}', '--skip=-1'], '--skip=-1'),
    (['--target=/nowhere'], 'Nothing is at /nowhere'),
    (['--target={other}', '--source={other}'], 'embed is 32'),
    (['--target={short}'], 'only the vocabularies say'),
  ],
)
def test_bad_input_is_told(flags, message, other, prompt, tmp_path, capsys):
  short = tmp_path / 'short'
  short.mkdir()
  config = json.loads((other[0] / 'config.json').read_text())
  (short / 'config.json').write_text(json.dumps({**config, 'vocab_size': 100}))
  table = normal(100, 32)
  tensors = {'shared.weight': Leaf(table.shape, table.dtype, table.__getitem__)}
  safetensors_files.write_file(short / 'model.safetensors', tensors, {})
  given = [f'--source={BASE}', f'--output={tmp_path}/out.npy']
  given += [flag.format(other=other[0], short=short) for flag in flags]
  assert cli.main(['recycle', prompt, *given]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'out.npy').exists()


def test_a_prompt_of_another_base_is_refused(other, prompt, tmp_path, capsys):
  facts = {'base': '0123456789abcdef', 'step': 3}
  (tmp_path / 'p.json').write_text(json.dumps(facts))
  flags = [f'--source={BASE}', f'--target={other[0]}', f'--output={tmp_path}/o']
  assert cli.main(['recycle', prompt, *flags]) == 2
  assert 'was trained on a model of fingerprint 0123' in capsys.readouterr().err
