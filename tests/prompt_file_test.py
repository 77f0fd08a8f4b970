"""PROMPT_FILE accepts every kind of prompt file."""

import json

import numpy as np
import pytest

from ptune.config import macros
from ptune.convert.export import export
from ptune.convert.prompts import read_prompt, read_rows
from ptune.methods import prompt, prompt_init
from ptune.model import parameters, partitioning
from ptune.serving import trained_model
from tests import tiny

LENGTH = 3
ROWS = np.arange(LENGTH * tiny.CONFIG.emb_dim, dtype=np.float32).reshape(
  LENGTH, tiny.CONFIG.emb_dim
)


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """Returns paths of the same prompt, by kind of file."""
  run = tmp_path_factory.mktemp('run')
  (run / 'prompts').mkdir()
  file = run / 'prompts' / 'best.npy'
  np.save(file, ROWS)
  file.with_suffix('.json').write_text(json.dumps({'step': 7}))
  found = {'npy': file, 'run': run, 'prompts': run / 'prompts'}
  for kind in ('peft', 'safetensors'):
    export(read_prompt(file), kind, run / kind)
    found[kind] = run / kind
  found['safetensors'] = run / 'safetensors.safetensors'
  return found


KINDS = ('npy', 'run', 'prompts', 'peft', 'safetensors')


@pytest.mark.parametrize('kind', KINDS)
def test_a_prompt_is_read_from_what_holds_it(kind, places):
  mesh = partitioning.make_mesh()
  plan = parameters.plan(tiny.CONFIG, prompt.prompt(LENGTH), mesh)
  values, facts = trained_model.read_prompt_file(plan, places[kind])
  np.testing.assert_array_equal(values[prompt.PATH], ROWS)
  assert facts['step'] == 7


@pytest.mark.parametrize('kind', KINDS)
def test_a_prompt_starts_from_what_holds_one(kind, places):
  base = prompt_init.Base(None, None, None, read=read_rows)
  for init in (
    prompt_init.from_file(places[kind]),
    prompt_init.from_prompts([places[kind], places['npy']]),
  ):
    np.testing.assert_allclose(init(None, ROWS.shape, base), ROWS)


def test_names_on_the_hub_are_prompt_files_too():
  macros.check({'PROMPT_FILE': 'hf://me/prompt'})
