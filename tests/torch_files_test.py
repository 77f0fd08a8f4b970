"""pytorch_model.bin is read without running code from it."""

import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from ptune.convert import open_checkpoint, torch_files
from ptune.errors import UserError

torch = pytest.importorskip('torch', reason='torch comes with extra interop')
# The oldest files need it.
pytestmark = pytest.mark.filterwarnings('ignore:.*TypedStorage.*')

from safetensors.torch import load_file  # noqa: E402  (needs torch)


@pytest.fixture
def model(numerics):
  return numerics / 'hf' / 't5_1_1'


def written(model, path, *, dtype=torch.float32, shards=1, **how):
  """Saves the same model with torch."""
  path.mkdir()
  shutil.copy(model / 'config.json', path)
  tensors = {
    k: v.to(dtype) for k, v in load_file(model / 'model.safetensors').items()
  }
  if shards == 1:
    torch.save(tensors, path / 'pytorch_model.bin', **how)
    return path
  weight_map = {}
  for i in range(shards):
    file = f'pytorch_model-{i + 1:05}-of-{shards:05}.bin'
    part = dict(list(tensors.items())[i::shards])
    torch.save(part, path / file)
    weight_map |= dict.fromkeys(part, file)
  (path / 'pytorch_model.bin.index.json').write_text(
    json.dumps({'weight_map': weight_map})
  )
  return path


@pytest.mark.parametrize(
  'how',
  [
    {},
    {'shards': 3},
    {'dtype': torch.float16},
    {'dtype': torch.bfloat16},
    # The format before torch 1.6, which cannot be mapped.
    {'_use_new_zipfile_serialization': False},
  ],
  ids=str,
)
def test_tensors_are_those_of_safetensors(model, tmp_path, how):
  source = open_checkpoint(written(model, tmp_path / 'm', **how))
  want = open_checkpoint(model)
  assert source.shapes == want.shapes
  dtype = str(how.get('dtype', torch.float32)).removeprefix('torch.')
  for path, leaf in source.leaves.items():
    assert leaf.dtype.name == dtype
    expected = want.leaves[path].read().astype(leaf.dtype)
    np.testing.assert_array_equal(leaf.read(), expected)
    part = tuple(slice(n // 3, n - n // 4) for n in leaf.shape)
    np.testing.assert_array_equal(leaf.read(part), expected[part])


class Bomb:
  """A pickle that writes a file when loaded."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.write_text, (self.path, 'it ran')


@pytest.mark.parametrize(
  ('save', 'what'),
  [('torch', 'Unsupported global: GLOBAL getattr'), ('pickle', '.*pickle')],
)
def test_no_code_of_a_file_is_run(model, tmp_path, save, what):
  path = written(model, tmp_path / 'm')
  trace = tmp_path / 'trace'
  if save == 'torch':
    torch.save({'shared.weight': Bomb(trace)}, path / 'pytorch_model.bin')
  else:
    content = pickle.dumps({'shared.weight': Bomb(trace)})
    (path / 'pytorch_model.bin').write_bytes(content)
  with pytest.raises(
    UserError, match=f'other than tensors.* refuses: .*{what}'
  ):
    open_checkpoint(path)
  assert not trace.exists()


def test_damaged_and_foreign_files_are_named(model, tmp_path):
  path = written(model, tmp_path / 'm')
  file = path / 'pytorch_model.bin'
  whole = file.read_bytes()
  file.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match=r'pytorch_model\.bin is damaged'):
    open_checkpoint(path)
  torch.save({'shared.weight': torch.zeros(3, dtype=torch.int8)}, file)
  with pytest.raises(UserError, match=r'shared\.weight: torch\.int8'):
    open_checkpoint(path)
  torch.save([torch.zeros(3)], file)
  with pytest.raises(UserError, match='holds a list'):
    open_checkpoint(path)


def test_safetensors_come_first(model, tmp_path):
  path = written(model, tmp_path / 'm')
  (path / 'pytorch_model.bin').write_text('damaged')
  shutil.copy(model / 'model.safetensors', path)
  assert open_checkpoint(path).shapes == open_checkpoint(model).shapes


def test_without_torch_the_error_says_both_ways_out(
  model, tmp_path, monkeypatch
):
  path = written(model, tmp_path / 'm')
  monkeypatch.setattr(torch_files, 'is_installed', lambda: False)
  with pytest.raises(UserError, match=r'(?s)pip install torch.*as safetensors'):
    open_checkpoint(path)
