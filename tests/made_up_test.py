"""A restarted run reads the same inputs that a model made up for it."""

import json
from unittest import mock

import pytest

from ptune.convert.pieces import Bytes
from ptune.errors import UserError
from ptune.model import parameters
from ptune.serving import made_up
from ptune.serving.trained_model import NOTHING
from ptune.tasks import files
from ptune.training.settings import Data
from tests import tiny
from tests.state_test import ONE

CONTEXT = (100, 101, 102)
REQUESTS = ('ask', 'say more')
TASK = files.from_rows({'train': [], 'validation': []}, vocabulary=Bytes())


def how(**changes):
  settings = {'count': 10, 'seed': 3, **changes}
  return made_up.MadeUp(REQUESTS, checkpoint_path=tiny.base(), **settings)


def data(batch_size=4):
  return Data(TASK, {'inputs': 5, 'targets': 4}, batch_size=batch_size)


def sample(batch_size=4, context=CONTEXT, **changes):
  plan = parameters.plan(tiny.CONFIG, NOTHING, ONE)
  return made_up.sample(how(**changes), context, data(batch_size), plan)


def make(directory, **changes):
  with tiny.one_device():
    made_up.make(how(**changes), CONTEXT, directory, data(), tiny.CONFIG)


def test_an_input_depends_on_its_number_the_text_and_the_seed():
  texts = sample()
  assert len(texts) == 10 and len(set(texts)) > 5
  assert sample(batch_size=3, count=7) == texts[:7]
  assert sample(seed=4) != texts
  # At a high temperature, random weights hardly depend on the text; a low
  # temperature shows the difference.
  cold = sample(temperature=0.1)
  assert cold != texts
  assert sample(temperature=0.1, context=(5, 250, 7, 9) * 5) != cold


def test_a_run_that_has_begun_keeps_its_inputs(tmp_path):
  texts = [f'{i % 40}' for i in range(80)] + ['']
  with mock.patch.object(made_up, 'sample', lambda *_: texts):
    make(tmp_path)
  read = made_up.task(tmp_path)
  # Duplicates are removed. An eighth, or at least a batch, is for validation,
  # and the rest for training.
  assert read.texts('validation')['inputs'] == texts[:5]
  assert read.texts('train')['inputs'] == texts[5:40]
  assert set(read.texts('train')['targets']) == {''}
  # Until the run begins, they are made again at each start.
  with mock.patch.object(made_up, 'sample', lambda *_: texts[::-1]):
    make(tmp_path)
  assert made_up.task(tmp_path).texts('validation')['inputs'][0] == '39'
  (tmp_path / 'run.json').write_text(json.dumps({'step': 1}))
  with mock.patch.object(made_up, 'sample', side_effect=AssertionError):
    make(tmp_path)
    with pytest.raises(UserError, match=r'TEMPERATURE: 1\.0 there, 0\.7 here'):
      make(tmp_path, temperature=0.7)


def test_what_cannot_be_made_up_is_refused(tmp_path):
  with (
    mock.patch.object(made_up, 'sample', lambda *_: ['a', 'b', 'a', '']),
    pytest.raises(UserError, match=r'of 4 inputs .*, 2 are different .*SIZE 4'),
  ):
    make(tmp_path)
  with pytest.raises(UserError, match=r'TEMPERATURE is 0; .* above 0'):
    how(temperature=0)
  for wrong in ('Ask.', ()):
    with pytest.raises(UserError, match=r'REQUESTS is .* a list of texts'):
      made_up.MadeUp(wrong)
  with pytest.raises(ValueError, match='MADE_UP_INPUTS'):
    how(count=0)
