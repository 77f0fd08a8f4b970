"""`ptune inspect` describes every kind of file that ptune reads."""

import json

import numpy as np
import pytest
import safetensors.numpy

from ptune import cli
from ptune.convert import identity, open_checkpoint
from ptune.convert.inspection import inspect, text
from tests import layouts

FINGERPRINT = 'd70ea2f53564c132'


@pytest.mark.parametrize('kind', layouts.T5_1_1)
def test_models(numerics, kind):
  found = inspect(numerics / layouts.T5_1_1[kind], fingerprint=True)
  assert found['kind'] == f'{kind.split(",")[0]} checkpoint'
  assert (found['parameters'], found['arrays']) == (72416, 66)
  assert (found['dtypes'], found['bytes']) == (['float32'], 289664)
  assert found['config']['num_decoder_layers'] == 3
  assert found['base'] == FINGERPRINT
  holds = 'prompt' in kind or kind == 't5x_orbax'
  assert found.get('prompt') == ({'length': 5, 'width': 32} if holds else None)
  step = {'t5x': 1100000, 'huggingface': None}.get(kind, 1100010)
  assert found.get('step') == step


@pytest.mark.parametrize('family', layouts.FAMILIES)
def test_families(numerics, family):
  found = inspect(numerics / 'hf' / family)
  assert found['config']['logits_via_embedding'] == (family == 't5_1_0')
  assert found['config']['mlp_activations'] == (
    ['relu'] if family == 't5_1_0' else ['gelu', 'linear']
  )
  assert 'base' not in found  # The base is not read by default.
  assert ('ignored' in found) == (family == 't5_1_0')


def test_prompts(numerics, tmp_path):
  golden = layouts.load(numerics / 'prompt_encoder' / 'prompts.npz')
  np.save(tmp_path / 'p.npy', golden['prompt_p5'])
  facts = {'step': 3, 'task': 't', 'base': FINGERPRINT, 'seed': 0}
  (tmp_path / 'p.json').write_text(json.dumps(facts))
  for path, kind in (
    (tmp_path / 'p.npy', 'npy'),
    (tmp_path / 'p', 'npy'),
    (numerics / 'hf' / 'peft_p5', 'peft'),
    (numerics / 'checkpoints' / 'legacy_prompt', 'npy'),
  ):
    found = inspect(path)
    assert found['kind'] == f'prompt ({kind})'
    assert found['parameters'] == 160
    assert (found['prompt']['length'], found['prompt']['width']) == (5, 32)
  found = inspect(tmp_path / 'p')
  assert (found['step'], found['base']) == (3, FINGERPRINT)


def test_runs(numerics, tmp_path):
  (tmp_path / 'prompts').mkdir()
  for step in (10, 20):
    np.save(tmp_path / f'prompts/step_{step}.npy', np.ones((3, 4), 'f4'))
    (tmp_path / 'checkpoints' / str(step)).mkdir(parents=True)
  scores = {'sst2': {'accuracy': 91.25, 'loss': 0.5}}
  np.save(tmp_path / 'prompts/best.npy', np.ones((3, 4), 'f4'))
  facts = {'step': 10, 'scores': scores, 'base': FINGERPRINT}
  (tmp_path / 'prompts/best.json').write_text(json.dumps(facts))
  run = {'task': 'sst2', 'method': 'prompt', 'initial_checkpoint_path': '/b'}
  (tmp_path / 'run.json').write_text(json.dumps(run))
  found = inspect(tmp_path)
  assert found['kind'] == 'run of ptune'
  assert found['scores'] == scores
  assert (found['step'], found['checkpoints']) == (10, [10, 20])
  lines = text(found).splitlines()
  assert 'scores                   sst2: accuracy 91.25, loss 0.5' in lines
  assert 'checkpoints              10, 20' in lines
  assert 'initial_checkpoint_path  /b' in lines


def test_other_adapters_and_files(numerics, tmp_path):
  found = inspect(numerics / 'hf' / 'peft_ia3')
  assert found['kind'] == 'PEFT adapter (IA3)'
  assert (found['parameters'], found['base_model']) == (832, 't5_1_1')
  found = inspect(numerics / 'hf' / 't5_1_1' / 'model.safetensors')
  assert (found['kind'], found['parameters']) == ('safetensors', 72416)
  (tmp_path / 'checkpoint_5').mkdir()
  found = inspect(tmp_path)
  assert found['kind'] == 'directory of checkpoints'
  assert found['checkpoints'] == [5]


def test_multitask_adapters_say_how_many(tmp_path):
  config = {
    'peft_type': 'MULTITASK_PROMPT_TUNING',
    'num_virtual_tokens': 2,
    'token_dim': 4,
    'num_tasks': 3,
  }
  (tmp_path / 'adapter_config.json').write_text(json.dumps(config))
  rows = {'prompt_embeddings': np.ones((2, 4), 'f4')}
  safetensors.numpy.save_file(rows, tmp_path / 'adapter_model.safetensors')
  assert inspect(tmp_path)['prompt'] == {'length': 2, 'width': 4, 'tasks': 3}


def test_published_sizes_are_named(tmp_path):
  from ptune.convert.inspection import _model
  from ptune.convert.layout import shapes
  from ptune.convert.source import Leaf, Source
  from ptune.model import sizes

  def fetch(index):
    raise AssertionError('nothing is to be read')

  leaves = {
    path: Leaf(shape, np.dtype('float32'), fetch)
    for path, shape in shapes(sizes.SIZES['t5_1_1_xxl']).items()
  }
  found = _model(Source('/x', 't5x', 1, leaves), False)
  assert found['parameters'] == 11_135_332_352
  assert found['model'] == ['t5_1_1_xxl', 'flan_t5_xxl', 't0_11b']
  assert 'model       t5_1_1_xxl or flan_t5_xxl' in text(found)
  assert 'parameters  11,135,332,352' in text(found)


def test_json_and_text_say_the_same(numerics, capsys):
  path = numerics / 'hf' / 't5_1_1'
  layouts.run('inspect', path, '--json', '--fingerprint')
  found = json.loads(capsys.readouterr().out)
  assert found == inspect(path, fingerprint=True)
  assert found['base'] == identity.fingerprint(open_checkpoint(path))
  layouts.run('inspect', path)
  out = capsys.readouterr().out
  assert 'kind        huggingface checkpoint' in out
  assert 'model       no published size' in out


def test_the_command_line(numerics, tmp_path, capsys):
  assert cli.main(['inspect', str(numerics / 'hf' / 'peft_p5')]) == 0
  assert 'kind        prompt (peft)' in capsys.readouterr().out
  assert cli.main(['inspect', str(tmp_path / 'gone')]) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'ptune inspect: Nothing is at {tmp_path}/gone')


@pytest.mark.parametrize('content', [b'', b'\x80\x04K\x01.', b'text'])
def test_what_is_none_of_these_is_an_error(tmp_path, content):
  (tmp_path / 'f').write_bytes(content)
  with pytest.raises(ValueError, match='not a NumPy array file'):
    inspect(tmp_path / 'f')
  with pytest.raises(ValueError, match='is not a checkpoint'):
    inspect(tmp_path)
  with pytest.raises(FileNotFoundError):
    inspect(tmp_path / 'gone')
