"""tokenizer.json, BPE files and added tokens give transformers' ids."""

import json
import shutil
import sys

import pytest

from ptune import pretrained
from ptune.convert import tokenizer_json, unigram
from ptune.convert import vocabulary as vocabulary_lib
from ptune.convert.pieces import Bytes, Pieces
from ptune.convert.tokenizer_json import Tokenizer
from ptune.convert.vocabulary import check_same, open_vocabulary, vocabulary_of
from ptune.errors import UserError

tokenizers = pytest.importorskip(
  'tokenizers', reason="pip install 'ptune[tokenizers]' brings it"
)
# transformers warns of what it is to become.
pytestmark = pytest.mark.filterwarnings('ignore')

TEXTS = (
  'This is good.',
  ' two  blanks ',
  'a {b}\nc',
  'Ünïcödé ﬁ ½',
  '日本語 and 😀',
  'tab\there',
  '<extra_id_0> walks in <extra_id_1> park',
  'before</s>after',
  '<pad>',
  '',
  ' ',
  "don't",
  'x▁y',
  '  def f(x):\n\treturn x[0] <= 50',
  'i <mask> j',
)


@pytest.fixture(scope='module')
def corpus():
  return pretrained.VOCABULARY.parent.joinpath('README.md').read_text()


@pytest.fixture(scope='module')
def bpe(tmp_path_factory, corpus):
  """CodeT5's files: byte-level BPE, sentinels among the added tokens."""
  path = tmp_path_factory.mktemp('codet5')
  made = tokenizers.ByteLevelBPETokenizer()
  special = ['<pad>', '<s>', '</s>', '<unk>', '<mask>']
  made.train_from_iterator(
    corpus.splitlines(), vocab_size=500, special_tokens=special
  )
  made.save_model(str(path))
  size = made.get_vocab_size()
  extra = [f'<extra_id_{i}>' for i in reversed(range(10))]
  added = {token: size + i for i, token in enumerate(extra)}
  (path / 'added_tokens.json').write_text(json.dumps(added))
  (path / 'special_tokens_map.json').write_text(
    json.dumps({'additional_special_tokens': extra})
  )
  (path / 'tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'RobertaTokenizer', 'eos_token': '</s>'})
  )
  return path


@pytest.fixture(scope='module')
def llama(tmp_path_factory, corpus):
  """A BPE with bytes for what it lacks, as Llama's and Gemma's are."""
  from tokenizers import decoders, models, normalizers, trainers

  path = tmp_path_factory.mktemp('llama')
  made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=['<unk>', '<s>', '</s>'],
    initial_alphabet=[],
  )
  made.train_from_iterator(corpus.splitlines(), trainer)
  state = json.loads(made.to_str())
  vocab = state['model']['vocab']
  for byte in range(256):
    vocab[f'<0x{byte:02X}>'] = len(vocab)
  made = tokenizers.Tokenizer.from_str(json.dumps(state))
  made.add_tokens([tokenizers.AddedToken('{', normalized=False), '}'])
  made.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast'} | ENDS)
  )
  return path


ENDS = {'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '<unk>'}


@pytest.fixture(scope='module')
def added(tmp_path_factory):
  """A SentencePiece model beside tokens that it cannot write."""
  path = tmp_path_factory.mktemp('added')
  shutil.copy(pretrained.VOCABULARY, path / 'spiece.model')
  size = Pieces(pretrained.VOCABULARY).vocab_size
  (path / 'added_tokens.json').write_text(
    json.dumps({'{': size, '}': size + 1, 'Größe': size + 2, '\n': size + 3})
  )
  return path


def ids_of(path, **how):
  """transformers' tokenizer of a directory."""
  transformers = pytest.importorskip(
    'transformers', reason="pip install -e '.[test,interop]' brings it"
  )
  return transformers.AutoTokenizer.from_pretrained(path, **how)


@pytest.mark.parametrize('kind', ['bpe', 'llama'])
def test_texts_have_the_ids_of_transformers(request, kind):
  path = request.getfixturevalue(kind)
  theirs, ours = ids_of(path), open_vocabulary(path)
  assert isinstance(ours, Tokenizer)
  assert ours.eos_id == theirs.eos_token_id
  assert ours.unk_id == theirs.unk_token_id
  for text in TEXTS:
    want = theirs(text).input_ids
    got = ours.encode(text)
    # EOS is left to the task; Llama's template has none.
    assert want in (got, [*got, ours.eos_id]), text
    if ours.eos_id not in got and '<extra_id' not in text:
      assert ours.decode([*got, ours.eos_id, 7]) == theirs.decode(
        got, skip_special_tokens=True
      )


def test_codet5_reads_a_start_before_each_text(bpe):
  ours = open_vocabulary(bpe)
  start = ours.tokenizer.token_to_id('<s>')
  assert ours.encode('so')[0] == start
  assert ours.vocab_size == 510


def test_tokens_added_to_a_sentencepiece_model_are_found(added):
  ours, plain = open_vocabulary(added), Pieces(added / 'spiece.model')
  assert isinstance(ours, Tokenizer)
  size = plain.vocab_size
  assert ours.vocab_size == size + 4
  got = ours.encode('a {b}\nGröße')
  assert [i for i in got if i >= size] == [size, size + 1, size + 3, size + 2]
  for text in TEXTS[:2]:  # Without them, all is as it was.
    assert ours.encode(text) == list(plain.encode(text))


def test_the_unigram_model_is_that_of_sentencepiece(corpus):
  ours = unigram.tokenizer_of(pretrained.VOCABULARY, 100)
  plain = Pieces(pretrained.VOCABULARY)
  assert ours.get_vocab_size() == plain.vocab_size
  for text in [*TEXTS[:6], *TEXTS[9:], *corpus.splitlines()]:
    assert ours.encode(text).ids == [*plain.encode(text), plain.eos_id], text
    assert ours.decode(ours.encode(text).ids) == plain.decode(
      plain.encode(text)
    )


def test_seqio_gives_the_same_ids(bpe):
  import seqio
  import tensorflow as tf

  ours, plain = vocabulary_of(bpe), open_vocabulary(bpe)
  assert isinstance(ours, seqio.Vocabulary)
  assert ours == vocabulary_of(bpe) and ours != seqio.ByteVocabulary()
  assert (ours.eos_id, ours.unk_id) == (plain.eos_id, plain.unk_id)
  assert ours.vocab_size == plain.vocab_size
  for text in TEXTS:
    ids = plain.encode(text)
    assert list(ours.encode(text)) == ids
    assert ours.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert ours.decode([*ids, plain.eos_id]) == plain.decode(ids)
    if ids:
      decoded = ours.decode_tf(tf.constant(ids)).numpy().decode()
      assert decoded == plain.decode(ids)


def test_without_the_library_the_error_says_what_to_install(bpe, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(UserError, match=r'pip install "ptune\[tokenizers\]"'):
    open_vocabulary(bpe).encode('a')


def test_damaged_files_are_named(bpe, tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{"version": "1.0"')
  with pytest.raises(UserError, match='is damaged'):
    open_vocabulary(tmp_path).encode('a')
  shutil.copytree(bpe, tmp_path / 'moved')
  (tmp_path / 'moved' / 'added_tokens.json').write_text('{"<new>": 9999}')
  with pytest.raises(UserError, match="'<new>' has the id 9999"):
    open_vocabulary(tmp_path / 'moved').encode('a')


def test_a_vocabulary_is_compared_with_the_base(bpe, added, tmp_path, caplog):
  own = tmp_path / 'own'
  own.mkdir()
  shutil.copy(pretrained.VOCABULARY, own / 'spiece.model')
  pieces = Pieces(pretrained.VOCABULARY)
  check_same(pieces, own)
  check_same(open_vocabulary(bpe), bpe)
  check_same(pieces, tmp_path)  # Nothing is known of it.
  for other in (Bytes(), open_vocabulary(bpe)):
    with pytest.raises(UserError, match='not that of the base model'):
      check_same(other, own)
  assert not caplog.records
  check_same(pieces, added)
  assert "'{', '}', 'Größe', '\\n'" in caplog.text
  caplog.clear()
  check_same(open_vocabulary(added), added)
  assert not caplog.records


def test_a_directory_without_any_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text('{"vocab_size": 100}')
  with pytest.raises(UserError, match='holds no vocabulary'):
    vocabulary_lib.look(tmp_path)
  assert tokenizer_json.added_tokens(tmp_path) == {}
