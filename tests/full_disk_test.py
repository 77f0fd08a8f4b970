"""A full disk: a clear error, and nothing half-written.

A limit on the size of files stands for the full disk: both refuse a write in
the middle of a file.
"""

import contextlib
import resource
import signal

import numpy as np
import pytest

import ptune
from ptune import infer
from ptune.convert import output
from ptune.errors import UserError
from ptune.host.files import check_writable, write_atomically, writing
from ptune.training import report


@contextlib.contextmanager
def small_files():
  """Lets files have 100 bytes, and no more."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def full(tmp_path):
  """Returns an empty directory in which files are small."""
  with small_files():
    yield tmp_path


def test_what_is_written_is_whole_or_absent_and_named(full):
  def in_directory():
    with output.new_directory(full / 'd') as temporary:
      (temporary / 'a').write_bytes(bytes(1000))

  def in_file():
    with output.new_file(full / 'e') as temporary:
      temporary.write_bytes(bytes(1000))

  for name, write in (
    ('a.npy', lambda: write_atomically(full / 'a.npy', bytes(1000))),
    ('d', in_directory),
    ('e', in_file),
    (
      'curves.png',
      lambda: report.plot(
        [{'step': 1, 'split': 'train', 'loss': 1.0}], full / 'curves.png'
      ),
    ),
  ):
    with pytest.raises(OSError, match=f'{full}/{name} cannot be written: File'):
      write()
    assert not list(full.iterdir()), name


def test_a_directory_that_is_refused_stays_empty(full):
  with pytest.raises(UserError, match=r'MODEL_DIR .* cannot be written'):
    check_writable('MODEL_DIR', full)
  assert not list(full.iterdir())


def test_predictions_are_whole_or_absent(full):
  chunks = iter([[None] * 50])
  answer = lambda chunk, first: [{'prediction': 'yes'} for _ in chunk]
  with pytest.raises(OSError, match=r'a-predict.jsonl cannot be written: File'):
    infer._write(full / 'a-predict.jsonl', chunks, answer)
  assert not list(full.iterdir())


def test_errors_about_inputs_are_not_taken_for_the_output(tmp_path):
  with pytest.raises(FileNotFoundError, match='nosuch'):
    with writing(tmp_path / 'out'):
      (tmp_path / 'nosuch').read_bytes()


def test_saving_from_python_says_what_cannot_be_written(tmp_path):
  np.save(tmp_path / 'a.npy', np.ones((5, 96), np.float32))
  tuned = ptune.load(tmp_path / 'a.npy', 'ptune://tiny')
  for write in (
    lambda: tuned.save(tmp_path / 'b.npy'),
    lambda: tuned.save(tmp_path / 'b.safetensors'),
    lambda: tuned.export(tmp_path / 'b'),
  ):
    with small_files(), pytest.raises(OSError, match=r'/b.* cannot be written'):
      write()
  assert [path.name for path in tmp_path.iterdir()] == ['a.npy']
