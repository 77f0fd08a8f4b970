"""Paths of users: errors name a wrong path, and no pipe or device is read."""

import argparse
import os

import numpy as np
import pytest
from etils import epath

from ptune.convert import open_checkpoint, output, storage
from ptune.convert.hub import locate
from ptune.convert.prompts import read_prompt
from ptune.convert.storage import read_json
from ptune.convert.trained import facts_beside
from ptune.errors import UserError
from ptune.host import paths
from ptune.host.files import absolute, check_writable
from ptune.methods import prompt_array
from ptune.serving import serve
from ptune.training import run_file


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('a\0b', 'a path without NUL characters'),
    ('', 'not an empty text'),
    ('foo://a', 'begins with gs://'),
    ('http://a/b', 'begins with gs://'),
    ('file://a', 'file:///...'),
    ('/\udcff', 'a path in UTF-8'),
  ],
)
def test_what_is_no_path_is_said_by_whoever_opens_it(path, message):
  for opens in (
    open_checkpoint,
    read_prompt,
    prompt_array.read,
    absolute,
  ):
    with pytest.raises(UserError, match=message):
      opens(path)


def test_a_directory_that_cannot_be_made_is_named_and_leaves_nothing(
  tmp_path, monkeypatch
):
  long = epath.Path(tmp_path, 'a', 'b', 'c' * 300)
  with pytest.raises(UserError, match=r'MODEL_DIR .* cannot be written'):
    with paths.nothing_left():
      check_writable('MODEL_DIR', long)
  assert not list(tmp_path.iterdir())

  def unreachable(directory):
    raise KeyError(f'as TensorFlow raises for {directory}')

  monkeypatch.setattr(paths, 'make_directory', unreachable)
  with pytest.raises(UserError, match=r'gs://x/y cannot be written: .*as Tens'):
    check_writable('MODEL_DIR', epath.Path('gs://x/y'))
  with pytest.raises(KeyError):
    check_writable('MODEL_DIR', long)


@pytest.mark.parametrize('make', [output.new_directory, output.new_file])
def test_an_output_that_cannot_be_made_is_named(make, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='file/x cannot be written: '):
    with make(epath.Path(tmp_path, 'file', 'x')):
      pass


def test_file_urls_are_local_files(tmp_path):
  np.save(tmp_path / 'p.npy', np.ones((2, 3), np.float32))
  url = f'file://{tmp_path}'
  assert prompt_array.read(f'{url}/p.npy').shape == (2, 3)
  assert read_prompt(f'{url}/p.npy').array.shape == (2, 3)
  assert os.fspath(absolute(f'{url}/run')) == f'{tmp_path}/run'
  assert os.fspath(locate(url)) == str(tmp_path)
  assert os.fspath(locate('gs://bucket/a')) == 'gs://bucket/a'
  assert paths.local('~/a') == os.path.expanduser('~/a')


@pytest.fixture(params=['a pipe', 'a device'])
def endless(request, tmp_path):
  """Makes a file whose reading would never end; returns it and its kind."""
  file = tmp_path / 'model.safetensors'
  if request.param == 'a pipe':
    os.mkfifo(file)
  else:
    file.symlink_to('/dev/zero')
  return file, request.param


def test_a_pipe_or_device_is_never_read(endless, tmp_path):
  file, what = endless
  for name in ('x.npy', 'x.json', 'config.json', 'checkpoint', 'run.json'):
    (tmp_path / name).symlink_to(file)
  t5x = tmp_path / 't5x'
  t5x.mkdir()
  (t5x / 'checkpoint').symlink_to(file)
  token = argparse.Namespace(token_file=str(file))
  for read in (
    lambda: prompt_array.read(tmp_path / 'x.npy'),
    lambda: read_prompt(tmp_path / 'x.npy'),
    lambda: read_prompt(file),
    lambda: read_json(tmp_path / 'config.json'),
    lambda: facts_beside(locate(tmp_path / 'x.npy')),
    lambda: open_checkpoint(t5x),
    lambda: run_file.read(tmp_path),
    lambda: storage.read_bytes(file, 'TASK_FILES'),
    lambda: serve._read_token(token.token_file),
  ):
    with pytest.raises(UserError, match=f'which is {what}; expected a file'):
      read()


def test_a_damaged_file_beside_a_prompt_is_named(tmp_path):
  np.save(tmp_path / 'p.npy', np.ones((2, 3), np.float32))
  for facts, message in (
    (b'[1]', 'holds a list, not an object'),
    (b'\xff\xfe{}', 'is not JSON'),
    (b'[' * 100_000, 'is not JSON'),
    (b'{"method": 3, "step": "x"}', 'method is 3, expected str; step is'),
  ):
    (tmp_path / 'p.json').write_bytes(facts)
    with pytest.raises(UserError, match=message):
      read_prompt(tmp_path / 'p.npy')
