"""Models by hf://org/name, with and without network and huggingface_hub."""

import shutil
import sys
import types

import numpy as np
import pytest
import safetensors.numpy

from ptune.convert import open_checkpoint, torch_files
from ptune.convert.hub import download
from ptune.convert.inspection import inspect
from ptune.convert.prompts import read_prompt


@pytest.fixture
def hub(monkeypatch):
  """Replaces huggingface_hub, which may not be installed."""
  module = types.ModuleType('huggingface_hub')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
  return module


def test_a_name_is_downloaded_and_opened(hub, numerics):
  calls = []

  def snapshot_download(repo, *, revision, allow_patterns):
    calls.append((repo, revision))
    # Pickle files are not even downloaded.
    assert set(allow_patterns) == {
      '*.json',
      '*.safetensors',
      '*.model',
      'merges.txt',
    }
    name = 'peft_p5' if repo == 'me/prompt' else 't5_1_1'
    return str(numerics / 'hf' / name)

  hub.snapshot_download = snapshot_download
  assert open_checkpoint('hf://google/t5-v1_1-base').kind == 'huggingface'
  assert open_checkpoint('hf://t5-base@refs/pr/3').kind == 'huggingface'
  assert read_prompt('hf://me/prompt').kind == 'peft'
  assert inspect('hf://me/prompt')['prompt']['length'] == 5
  assert calls == [
    ('google/t5-v1_1-base', None),
    ('t5-base', 'refs/pr/3'),
    *[('me/prompt', None)] * (len(calls) - 2),
  ]


def test_without_network_the_error_says_what_to_do(hub):
  def snapshot_download(*args, **kwargs):
    raise OSError('no route to host')

  hub.snapshot_download = snapshot_download
  with pytest.raises(
    ValueError, match=r'(?s)not in the local cache: OSError: no'
  ):
    open_checkpoint('hf://google/flan-t5-base')


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r'pip install "ptune\[hub\]"'):
    open_checkpoint('hf://google/flan-t5-base')


@pytest.mark.parametrize(
  'name', ['hf://', 'hf://a/b/c', 'hf://a b', 'hf:///etc', 'hf://a/b@']
)
def test_what_is_no_name_is_refused(name):
  with pytest.raises(ValueError, match='is not a name on the Hub'):
    download(name)


def test_the_real_library_offline(monkeypatch, tmp_path):
  constants = pytest.importorskip(
    'huggingface_hub.constants',
    reason="huggingface_hub comes with pip install -e '.[interop]'",
  )
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  with pytest.raises(ValueError, match='Without a network, give the path'):
    download('hf://google/flan-t5-base')


# ------------------------------------------- models without safetensors on main


@pytest.fixture
def only_bin(hub, numerics, tmp_path):
  """A repository whose main branch has only config.json and torch's weights.

  Its pull request 3 has safetensors.
  """
  snapshots = tmp_path / 'snapshots'
  main, pull = snapshots / 'main', snapshots / 'pull'
  for path in (main, pull):
    path.mkdir(parents=True)
    shutil.copy(numerics / 'hf' / 't5_1_1' / 'config.json', path)
  weights = numerics / 'hf' / 't5_1_1' / 'model.safetensors'
  shutil.copy(weights, pull)
  hub.asked, hub.online = [], True

  def snapshot_download(
    repo, *, revision, allow_patterns, local_files_only=False
  ):
    assert repo == 'google/t5-v1_1-base'
    hub.asked.append(revision)
    if revision is None:
      if 'pytorch_model*.bin' in allow_patterns:
        torch = pytest.importorskip('torch')
        tensors = safetensors.numpy.load_file(weights)
        state = {k: torch.from_numpy(v) for k, v in tensors.items()}
        torch.save(state, main / 'pytorch_model.bin')
      return str(main)
    assert local_files_only != hub.online
    if revision != 'refs/pr/3':
      raise OSError('not there')
    return str(pull)

  class HfApi:
    def get_repo_discussions(self, repo, *, author, discussion_type):
      # The author matters, because anybody can open a pull request.
      assert (author, discussion_type) == ('SFconvertbot', 'pull_request')
      if not hub.online:
        raise OSError('no route to host')
      return [types.SimpleNamespace(num=num) for num in hub.requests]

  hub.snapshot_download, hub.HfApi = snapshot_download, HfApi
  hub.requests = [3]
  return numerics / 'hf' / 't5_1_1'


@pytest.mark.parametrize('online', [True, False])
def test_the_converter_s_pull_request_is_read(hub, only_bin, caplog, online):
  caplog.set_level('INFO')
  hub.online = online
  source = open_checkpoint('hf://google/t5-v1_1-base')
  assert source.path.endswith('pull')
  assert hub.asked[-1] == 'refs/pr/3'
  assert 'reading those of its pull request refs/pr/3' in caplog.text


def test_without_one_torch_reads_its_own_files(hub, only_bin):
  pytest.importorskip('torch', reason='torch comes with the extra interop')
  hub.requests = []
  source = open_checkpoint('hf://google/t5-v1_1-base')
  assert source.path.endswith('main')
  want = open_checkpoint(only_bin)
  assert source.shapes == want.shapes
  for path, leaf in want.leaves.items():
    np.testing.assert_array_equal(source.leaves[path].read(), leaf.read())


def test_without_torch_the_error_says_both_ways_out(hub, only_bin, monkeypatch):
  hub.requests = []
  monkeypatch.setattr(torch_files, 'is_installed', lambda: False)
  both = r'(?s)pip install torch.*as safetensors'
  with pytest.raises(ValueError, match=both):
    open_checkpoint('hf://google/t5-v1_1-base')
