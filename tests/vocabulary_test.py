"""The vocabulary in a model's directory."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import seqio

from ptune.convert.pieces import Pieces
from ptune.convert.vocabulary import open_vocabulary, vocabulary_of

TEXT = ['soft prompts steer a frozen model', 'a prompt is a few vectors']


@pytest.fixture(scope='module')
def spiece():
  """Returns a small SentencePiece model without sentinels, like T5's."""

  def train(symbols=()):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXT * 20),
      model_writer=model,
      vocab_size=40,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      user_defined_symbols=list(symbols),
      hard_vocab_limit=False,
      minloglevel=2,
    )
    return model.getvalue()

  return train


def _write(path, **files):
  path.mkdir(exist_ok=True)
  for name, content in files.items():
    data = content if isinstance(content, bytes) else json.dumps(content)
    name = name.replace('__', '.')
    write = (path / name).write_bytes if data is content else None
    write(data) if write else (path / name).write_text(data)
  return path


def test_sentencepiece_of_a_directory_and_of_a_file(tmp_path, spiece):
  path = _write(tmp_path / 'm', spiece__model=spiece(), config__json={})
  for place in (path, path / 'spiece.model'):
    vocabulary = vocabulary_of(place)
    assert vocabulary.decode(vocabulary.encode(TEXT[0])) == TEXT[0]
    assert (vocabulary.pad_id, vocabulary.eos_id) == (0, 1)
    # Hugging Face's files do not include T5's 100 sentinels.
    assert vocabulary.extra_ids == 100
    last = vocabulary.vocab_size - 1
    assert vocabulary.tokenizer.IdToPiece(last) == '▁<extra_id_0>'


def test_sentinels_that_the_file_has_are_not_added(tmp_path, spiece):
  data = spiece([f'<extra_id_{i}>' for i in range(3)])
  path = _write(tmp_path / 'm', spiece__model=data)
  assert vocabulary_of(path).extra_ids == 0


@pytest.mark.parametrize(
  'files',
  [
    {'tokenizer_config__json': {'tokenizer_class': 'ByT5Tokenizer'}},
    {'config__json': {'tokenizer_class': 'ByT5Tokenizer', 'vocab_size': 384}},
    {'config__json': {'vocab_size': 384}},
  ],
)
def test_byt5_reads_bytes(tmp_path, files):
  vocabulary = vocabulary_of(_write(tmp_path / 'm', **files))
  # Hugging Face's ByT5Tokenizer encodes it in the same way.
  assert vocabulary.encode('hi é') == [107, 108, 35, 198, 172]
  assert vocabulary.vocab_size == 384


def test_no_sentinels_beyond_the_embedding(tmp_path, spiece):
  pieces = vocabulary_of(_write(tmp_path / 'a', spiece__model=spiece()))
  rows = pieces.vocab_size - 93
  path = _write(
    tmp_path / 'b', spiece__model=spiece(), config__json={'vocab_size': rows}
  )
  assert vocabulary_of(path).extra_ids == 7
  assert vocabulary_of(path).vocab_size == rows


def test_our_own_model_has_its_vocabulary():
  vocabulary = vocabulary_of('ptune://tiny')
  assert (vocabulary.vocab_size, vocabulary.extra_ids) == (3000, 20)


def test_byt5_of_the_golden_data(numerics):
  assert vocabulary_of(numerics / 'hf' / 'byt5').encode('a') == [100]


@pytest.mark.parametrize(
  'files, message',
  [
    (
      {'config__json': {'vocab_size': 32128}},
      'holds no vocabulary. Found: con',
    ),
    ({'config__json': {}, 'merges__txt': ''}, 'holds no vocabulary'),
    (
      {'spiece__model': b'garbage'},
      'spiece.model is not a SentencePiece model',
    ),
    ({'spiece__model': b''}, 'spiece.model is not a SentencePiece model'),
    ({'config__json': ['x']}, 'holds a list, not an object'),
  ],
)
def test_no_vocabulary_is_an_error(tmp_path, files, message):
  with pytest.raises(ValueError, match=message):
    vocabulary_of(_write(tmp_path / 'm', **files))


@pytest.mark.parametrize('rows', [None, 50])
def test_without_tensorflow_a_vocabulary_has_the_same_ids(
  tmp_path, spiece, rows
):
  path = _write(
    tmp_path / 'm', spiece__model=spiece(), config__json={'vocab_size': rows}
  )
  byt5 = _write(tmp_path / 'b', config__json={'vocab_size': 384})
  texts = ['', *TEXT, 'zz é €', 'a <extra_id_0> prompt <extra_id_1>', ' a  b ']
  for place in (path, path / 'spiece.model', byt5, 'ptune://tiny'):
    theirs, ours = vocabulary_of(place), open_vocabulary(place)
    assert not isinstance(ours, seqio.Vocabulary)
    for name in ('vocab_size', 'pad_id', 'eos_id', 'unk_id'):
      assert getattr(ours, name) == getattr(theirs, name)
    for text in texts:
      ids = theirs.encode(text)
      assert ours.encode(text) == ids
      ids = np.array([*ids, 0, 1, *ids, 5])
      assert ours.decode(ids) == theirs.decode(ids.tolist())
      ids[1:2] = ours.vocab_size + 3  # Has a row but no piece.
      assert ours.decode(ids) == theirs.decode(ids.tolist())


def test_a_vocabulary_that_cannot_be_read_is_named(tmp_path):
  pieces = Pieces(tmp_path / 'gone.model')  # Not read yet.
  with pytest.raises(
    ValueError, match=r'VOCABULARY names .*gone.model.*not exist'
  ):
    pieces.encode('a')


def test_nothing_there_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError, match='Nothing is at'):
    vocabulary_of(tmp_path / 'gone')


def test_importing_it_loads_no_seqio():
  code = (
    'import sys, ptune.convert.vocabulary; '
    "sys.exit('seqio' in sys.modules or 'tensorflow' in sys.modules)"
  )
  subprocess.run([sys.executable, '-c', code], check=True)
