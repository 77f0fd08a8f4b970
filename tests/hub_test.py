"""hf://org/name, with and without network and huggingface_hub."""

import sys
import types

import pytest

from ptune.convert import open_checkpoint
from ptune.convert.hub import download
from ptune.convert.inspection import inspect
from ptune.convert.prompts import read_prompt


@pytest.fixture
def hub(monkeypatch):
  """Stands in for huggingface_hub, which may not be installed."""
  module = types.ModuleType('huggingface_hub')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
  return module


def test_a_name_is_downloaded_and_opened(hub, numerics):
  calls = []

  def snapshot_download(repo, *, revision, allow_patterns):
    calls.append((repo, revision))
    # No pickle is even downloaded.
    assert set(allow_patterns) == {'*.json', '*.safetensors', '*.model'}
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
  with pytest.raises(ValueError, match='is no name on the Hub'):
    download(name)


def test_the_real_library_offline(monkeypatch, tmp_path):
  constants = pytest.importorskip(
    'huggingface_hub.constants',
    reason="huggingface_hub comes with pip install -e '.[interop]'",
  )
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  with pytest.raises(ValueError, match='Without network, give the path'):
    download('hf://google/flan-t5-base')
