"""`ptune push`: ptune loads the published prompt, and its card describes it."""

import json
import shutil
import types

import numpy as np
import pytest

import ptune
from ptune import cli, pretrained
from ptune.convert import hub, publish
from ptune.convert.prompts import read_prompt

huggingface_hub = pytest.importorskip('huggingface_hub')
FACTS = {
  'step': 300,
  'task': 'my_sst2',
  'base': '0123456789abcdef',
  'method': 'prompt',
  'seed': 1,
  'scores': {'my_sst2': {'accuracy': 91.25, 'loss': 0.25}},
}
CONFIG = """
INPUTS = 'review: {text}'
TARGETS = '{label}'
LABEL_NAMES = ['negative', 'positive']
TASK_FILES = \\
    {'train': '/home/me/train.csv'}
"""


@pytest.fixture
def run(tmp_path):
  """Returns a run's directory with all that publishing a prompt reads."""
  folder = tmp_path / 'runs' / 'sst2' / 'prompts'
  folder.mkdir(parents=True)
  np.save(folder / 'best.npy', np.arange(8, dtype=np.float32).reshape(2, 4))
  (folder / 'best.json').write_text(json.dumps(FACTS))
  (folder.parent / 'config.gin').write_text(CONFIG)
  return folder.parent


@pytest.fixture
def repositories(tmp_path, monkeypatch):
  """Replaces the Hub by local folders, one for each repository."""
  root, calls = tmp_path / 'hub', []

  class Api:
    def create_repo(self, name, private, exist_ok):
      assert exist_ok
      calls.append((name, private))
      (root / name).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, repo_id, folder_path, commit_message):
      assert commit_message
      shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

  local = types.SimpleNamespace(
    HfApi=Api,
    ModelCardData=huggingface_hub.ModelCardData,
    EvalResult=huggingface_hub.EvalResult,
    snapshot_download=lambda name, **_: str(root / name),
  )
  for module in (hub, publish):
    monkeypatch.setattr(module, 'library', lambda *_: local)
  return root, calls


def test_a_prompt_is_pushed_and_read_again(run, repositories, capsys):
  root, calls = repositories
  status = cli.main(
    ['push', str(run), 'me/sst2', '--base_name=google/t5-v1_1-base']
    + ['--private']
  )
  assert status == 0
  assert capsys.readouterr().out.endswith('hf://me/sst2\n')
  assert calls == [('me/sst2', True)]
  prompt = read_prompt('hf://me/sst2')
  np.testing.assert_array_equal(prompt.array, np.arange(8).reshape(2, 4))
  assert prompt.facts['scores'] == FACTS['scores']
  np.testing.assert_array_equal(
    np.load(root / 'me/sst2/prompt.npy'), prompt.array
  )
  assert (root / 'me/sst2/config.gin').read_text() == CONFIG
  for file in (root / 'me/sst2').glob('*.json'):  # No local path.
    assert str(run) not in file.read_text()


def test_the_card_is_one_that_the_hub_understands(run, repositories):
  root, _ = repositories
  publish.push(run, 'me/sst2', base_name='google/t5-v1_1-base')
  text = (root / 'me/sst2/README.md').read_text()
  data = huggingface_hub.ModelCard(text).data
  assert data.base_model == 'google/t5-v1_1-base'
  assert data.library_name == 'peft'
  found = {r.metric_type: r.metric_value for r in data.eval_results}
  assert found == {'accuracy': 91.25, 'loss': 0.25}
  for told in (
    '| my_sst2 | accuracy | 91.25 |',
    '`0123456789abcdef`',
    "ptune.load('hf://me/sst2')",
    "PeftModel.from_pretrained(base, 'me/sst2')",
    'ptune train --gin_file=config.gin',
    '| inputs | `review: {text}` |',
    "| label names | `['negative', 'positive']` |",
    '| data | train: `train.csv` |',
    "tuned.predict(['review: {text}'])",
  ):
    assert told in text


def test_a_refusal_of_the_hub_is_one_line(run, repositories, monkeypatch):
  def refuse(*_, **__):
    raise OSError('401 Unauthorized')

  monkeypatch.setattr(publish.library('').HfApi, 'create_repo', refuse)
  with pytest.raises(ValueError, match=r'(?s)401 Unauthorized.*hf auth login'):
    publish.push(run, 'me/sst2', base_name='google/t5-v1_1-base')


def test_no_path_of_this_machine_is_pushed(repositories, tmp_path):
  root, _ = repositories
  tiny = pretrained.directory('ptune://tiny')
  np.save(tmp_path / 'mine.npy', np.zeros((2, 96), np.float32))
  for base, named, code in (
    ('ptune://tiny', 'ptune://tiny', "ptune.load('hf://me/mine')"),
    (str(tiny), 'tiny', "ptune.load('hf://me/mine', base='path/to/the/base')"),
  ):
    shutil.rmtree(root, ignore_errors=True)
    publish.push(tmp_path / 'mine.npy', 'me/mine', base=base)
    for file in (root / 'me/mine').iterdir():
      assert str(tiny.parent).encode() not in file.read_bytes(), file
      assert str(tmp_path).encode() not in file.read_bytes(), file
    config = json.loads((root / 'me/mine/adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == named
    card = (root / 'me/mine/README.md').read_text()
    assert code in card and "from_pretrained('path/to/the/base')" in card
  publish.push(tmp_path / 'mine.npy', 'me/other', base='ptune://tiny')
  assert ptune.load('hf://me/other').base.path == 'ptune://tiny'
