"""tokenizer.json, BPE files and added tokens give transformers' ids."""

import json
import shutil
import sys

import numpy as np
import pytest

from ptune import pretrained
from ptune.convert import sentencepiece_tokenizer, tokenizer_json
from ptune.convert import vocabulary as vocabulary_lib
from ptune.convert.pieces import Bytes, Pieces
from ptune.convert.tokenizer_files import write_vocabulary
from ptune.convert.tokenizer_json import Tokenizer
from ptune.convert.vocabulary import check_same, open_vocabulary, vocabulary_of
from ptune.data import batches as data
from ptune.data import seqio_task
from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.model.config import TokenIds
from ptune.tasks import texts
from tests import vocabularies

tokenizers = pytest.importorskip(
  'tokenizers', reason="pip install 'ptune[tokenizers]' brings it"
)
# transformers warns about its future changes.
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
  'one\n\ntwo\n\n\nthree',
  'a <table>b</table> <start_of_turn>user',
  '<bos>twice<eos>',
)


@pytest.fixture(scope='module')
def corpus():
  return vocabularies.corpus()


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
  return vocabularies.codet5(tmp_path_factory.mktemp('codet5'))


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  return vocabularies.llama(tmp_path_factory.mktemp('llama'))


@pytest.fixture(scope='module')
def gemma(tmp_path_factory):
  return vocabularies.gemma(tmp_path_factory.mktemp('gemma'))


@pytest.fixture(scope='module')
def added(tmp_path_factory):
  """Writes a SentencePiece model with added tokens that it cannot encode."""
  path = tmp_path_factory.mktemp('added')
  shutil.copy(pretrained.VOCABULARY, path / 'spiece.model')
  size = Pieces(pretrained.VOCABULARY).vocab_size
  (path / 'added_tokens.json').write_text(
    json.dumps({'{': size, '}': size + 1, 'Größe': size + 2, '\n': size + 3})
  )
  return path


def ids_of(path, **how):
  """Returns transformers' tokenizer of a directory."""
  transformers = pytest.importorskip(
    'transformers', reason="pip install -e '.[test,interop]' brings it"
  )
  return transformers.AutoTokenizer.from_pretrained(path, **how)


@pytest.mark.parametrize('kind', ['bpe', 'llama', 'gemma'])
def test_texts_have_the_ids_of_transformers(request, kind):
  path = request.getfixturevalue(kind)
  theirs, ours = ids_of(path), open_vocabulary(path)
  assert isinstance(ours, Tokenizer)
  assert ours.eos_id == theirs.eos_token_id
  assert ours.unk_id == theirs.unk_token_id
  for text in TEXTS:
    want = theirs(text).input_ids
    got = ours.encode(text)
    # The task appends EOS; Llama's template has none.
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


def test_gemmas_start_stands_before_a_text_as_the_files_say(gemma, tmp_path):
  ids = open_vocabulary(gemma).encode('so')
  assert ids[0] == 2 and 2 not in ids[1:]
  assert open_vocabulary(gemma).decode(ids) == 'so'
  without = tmp_path / 'without'
  shutil.copytree(gemma, without)
  state = json.loads((gemma / 'tokenizer.json').read_text())
  state['post_processor'] = None
  (without / 'tokenizer.json').write_text(json.dumps(state))
  assert open_vocabulary(without).encode('so') == ids[1:]
  assert ids_of(without)('so').input_ids == ids[1:]
  # Without tokenizer.json there is no template, so the configuration decides.
  alone = tmp_path / 'alone'
  alone.mkdir()
  shutil.copy(pretrained.VOCABULARY, alone / 'tokenizer.model')
  assert isinstance(open_vocabulary(alone), Pieces)
  said = {'add_bos_token': True, 'bos_token': '<pad>'}
  (alone / 'tokenizer_config.json').write_text(json.dumps(said))
  assert open_vocabulary(alone).encode('so') == [
    0,
    *Pieces(pretrained.VOCABULARY).encode('so'),
  ]


@pytest.mark.parametrize('kind', ['bpe', 'gemma'])
def test_a_prompt_starts_without_the_start_of_a_text(request, kind):
  vocabulary = open_vocabulary(request.getfixturevalue(kind))
  start, *pieces = vocabulary.encode('so good')
  assert start in vocabulary.encode('') and len(pieces) > 1
  table = np.arange(3.0 * vocabulary.vocab_size).reshape(-1, 3) ** 2
  base = prompt_init.Base(table.__getitem__, lambda: vocabulary, list)
  shape, rng = (len(pieces), 3), np.random.default_rng(0)
  labels = prompt_init.from_class_labels(['so good'])(rng, shape, base)
  np.testing.assert_allclose(labels[0], table[pieces].mean(0), rtol=1e-6)
  text = prompt_init.from_string('so good')(rng, shape, base)
  np.testing.assert_allclose(text, table[pieces], rtol=1e-6)
  task = texts.TextTask(f'starts_{kind}', {}, vocabulary=vocabulary)
  assert seqio_task.text_ids('so good', task) == tuple(pieces)
  with pytest.raises(UserError, match=r"'\s*' cannot be encoded"):
    prompt_init.from_class_labels([''])(rng, shape, base)


def test_targets_begin_behind_the_start_that_the_decoder_reads(gemma):
  vocabulary = open_vocabulary(gemma)
  ids = TokenIds(pad=0, eos=1, start=2)
  text = np.array([*vocabulary.encode('so it is'), 1], np.int32)
  made = seqio_task.model_features(text, text, ids)
  assert made['encoder_input_tokens'].tolist() == text.tolist()
  assert made['decoder_target_tokens'].tolist() == text[1:].tolist()
  assert made['decoder_input_tokens'].tolist() == text[:-1].tolist()
  assert made['decoder_loss_weights'].shape == text[1:].shape
  # T5's start token is its padding, so nothing changes.
  made = seqio_task.model_features(text, text, TokenIds())
  assert made['decoder_target_tokens'].tolist() == text.tolist()

  task = texts.TextTask(
    'gemma',
    {'train': lambda: {'inputs': ['a', 'it'], 'targets': ['so', 'so']}},
    vocabulary=vocabulary,
  )
  batch = data.Batches(
    task, {'inputs': 8, 'targets': 8}, batch_size=2, ids=ids
  )(0)
  so = [*vocabulary.encode('so')[1:], 1]
  for row in batch['decoder_target_tokens'].tolist():
    assert row[: len(so)] == so and set(row[len(so) :]) <= {0}
  assert set(batch['decoder_input_tokens'][:, 0].tolist()) == {2}
  assert set(batch['encoder_input_tokens'][:, 0].tolist()) == {2}


def test_tokens_added_to_a_sentencepiece_model_are_found(added):
  ours, plain = open_vocabulary(added), Pieces(added / 'spiece.model')
  assert isinstance(ours, Tokenizer)
  size = plain.vocab_size
  assert ours.vocab_size == size + 4
  got = ours.encode('a {b}\nGröße')
  assert [i for i in got if i >= size] == [size, size + 1, size + 3, size + 2]
  for text in TEXTS[:2]:  # Nothing changes without them.
    assert ours.encode(text) == list(plain.encode(text))


def test_the_unigram_model_is_that_of_sentencepiece(corpus):
  ours = sentencepiece_tokenizer.tokenizer_of(pretrained.VOCABULARY, 100)
  plain = Pieces(pretrained.VOCABULARY)
  assert ours.get_vocab_size() == plain.vocab_size
  for text in [*TEXTS[:6], *TEXTS[9:], *corpus.splitlines()]:
    assert ours.encode(text).ids == [*plain.encode(text), plain.eos_id], text
    assert ours.decode(ours.encode(text).ids) == plain.decode(
      plain.encode(text)
    )


@pytest.mark.parametrize('prefix', [True, False])
def test_a_bpe_of_sentencepiece_is_written_as_it_is(corpus, tmp_path, prefix):
  import sentencepiece

  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus.splitlines()),
    model_prefix=str(tmp_path / 'spiece'),
    model_type='bpe',
    vocab_size=700,
    byte_fallback=True,
    add_dummy_prefix=prefix,
    remove_extra_whitespaces=False,
    user_defined_symbols=[] if prefix else ['<table>', '▁▁'],
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    minloglevel=2,
  )
  ours = sentencepiece_tokenizer.tokenizer_of(tmp_path / 'spiece.model', 0)
  plain = Pieces(tmp_path / 'spiece.model')
  special = ('<pad>', '</s>', '<bos>', '<extra_id')
  for text in [*TEXTS, *corpus.splitlines(), 'a  b   c']:
    # transformers finds special tokens, and SentencePiece encodes the other
    # text.
    if any(name in text for name in special):
      continue
    assert ours.encode(text).ids == [*plain.encode(text), plain.eos_id], text
  written = tmp_path / 'written'
  written.mkdir()
  lines = write_vocabulary(written, tmp_path / 'spiece.model', 728)
  assert 'tokenizer.json' in lines[0] and len(lines) == 1
  theirs = ids_of(written)
  for text in ('a  b', 'This is good.', '日本語', 'x\ty'):
    assert theirs(text).input_ids == [*plain.encode(text), plain.eos_id]


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
  check_same(pieces, tmp_path)  # It has no vocabulary.
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
