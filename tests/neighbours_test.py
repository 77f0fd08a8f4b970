"""The pieces of the vocabulary that are nearest to a prompt."""

import io
import json

import numpy as np
import pytest
import rich.console

from ptune import cli, pretrained
from ptune.analysis import neighbours
from ptune.convert import open_checkpoint
from ptune.convert.pieces import load_sentencepiece
from ptune.convert.prompts import Prompt
from ptune.convert.source import EMBEDDING, Leaf

BASE = 'ptune://tiny'


@pytest.fixture(scope='module')
def words():
  return neighbours.read_vocabulary(BASE)


@pytest.fixture(scope='module')
def embedding():
  leaf = open_checkpoint(BASE).leaves[EMBEDDING]
  return leaf.read().astype(np.float32)


@pytest.fixture
def prompt(words, embedding):
  """Returns rows of kitchen, guitar, kitchen and not, scaled differently."""
  ids = [words[1](w)[0] for w in ('kitchen', 'guitar', 'kitchen', 'not')]
  scale = np.array([[3.0], [0.1], [1.0], [2.0]], np.float32)
  return Prompt(embedding[ids] * scale, 'p.npy', 'npy', {})


def test_a_row_of_the_embedding_is_nearest_to_its_own_piece(prompt):
  found = neighbours.neighbours(prompt, BASE, top=3)
  first = [row['neighbours'][0] for row in found['rows']]
  assert [n['piece'] for n in first] == [
    '▁kitchen',
    '▁guitar',
    '▁kitchen',
    '▁not',
  ]
  assert np.allclose([n['cosine'] for n in first], 1, atol=1e-5)
  for row in found['rows']:
    cosines = [n['cosine'] for n in row['neighbours']]
    assert len(cosines) == 3 and cosines == sorted(cosines, reverse=True)


def test_rows_with_the_same_nearest_piece_are_a_cluster(prompt):
  found = neighbours.neighbours(prompt, BASE, top=1)
  assert found['clusters'] == [{'piece': '▁kitchen', 'rows': [0, 2]}]


def test_labels_are_found_where_they_are_near(prompt, embedding, words):
  ids = words[1]('negative')
  assert len(ids) > 1  # So its value is a mean.
  array = np.concatenate([prompt.array, embedding[ids].mean(0)[None]])
  prompt = Prompt(array, 'p.npy', 'npy', {})
  labels = ['not', 'negative', 'guitar']
  found = neighbours.neighbours(prompt, BASE, top=1, labels=labels)['labels']
  assert found['not']['rows'] == [3] and found['not']['closest_row'] == 3
  assert found['guitar']['rows'] == [1]
  assert found['negative']['closest_row'] == 4
  assert found['negative']['cosine'] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('block', [1, 96 * 7, 96 * 3000])
def test_the_size_of_the_blocks_changes_nothing(
  block, prompt, words, embedding, monkeypatch
):
  monkeypatch.setattr(neighbours, 'BLOCK', block)
  most = 0

  def fetch(index):
    nonlocal most
    read = embedding[index]
    most = max(most, read.size)
    return read

  # Only a few rows, because blocks of one row are slow.
  leaf = Leaf((600, 96), np.dtype(np.float32), fetch)
  texts = words[0][:600]
  ids, cosines = neighbours.nearest(
    prompt.array, neighbours.blocks_of(leaf), texts, 4
  )
  assert most <= max(block, 96)
  unit = neighbours.normalised
  expected = unit(prompt.array) @ unit(embedding[:600]).T
  expected[:, [text is None for text in texts]] = -2
  best = np.argsort(-expected, axis=1, kind='stable')[:, :4]
  assert (ids == best).all()
  assert np.allclose(
    cosines, np.take_along_axis(expected, best, axis=1), atol=1e-6
  )


def test_what_is_no_text_is_never_a_neighbour(words, embedding):
  texts = words[0]
  hidden = [i for i, text in enumerate(texts) if text is None]
  assert {0, 1, 2} < set(hidden)
  processor = load_sentencepiece(pretrained.VOCABULARY)
  assert any(processor.is_byte(i) for i in hidden)
  ids, _ = neighbours.nearest(embedding[hidden], [embedding], texts, 5)
  assert not set(ids.flat) & set(hidden)


def test_rows_of_zeros_and_rows_without_a_piece_are_no_trouble():
  table = np.eye(4, dtype=np.float32)
  table[1] = 0
  ids, cosines = neighbours.nearest(
    np.zeros((1, 4)), [table], ['a', 'b', None], 2
  )
  assert ids.tolist() == [[0, 1]] and cosines.tolist() == [[0, 0]]


def test_the_vocabulary_of_bytes(tmp_path):
  (tmp_path / 'config.json').write_text(
    '{"tokenizer_class": "ByT5Tokenizer", "vocab_size": 384}'
  )
  texts, encode = neighbours.read_vocabulary(tmp_path)
  assert ''.join(texts[i] or '' for i in encode('no!')) == 'no!'
  assert texts[:3] == [None] * 3 and texts[3 + 0x0A] == '0x0a'
  assert len(texts) == 3 + 256


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'top': 0}, '--top is 0; expected 1 to'),
    ({'top': 5000}, '--top is 5000'),
    ({'labels': ['not', '']}, r"no pieces for the labels \[''\]"),
  ],
)
def test_bad_input_is_told(change, message, prompt):
  with pytest.raises(ValueError, match=message):
    neighbours.neighbours(prompt, BASE, **change)


def test_another_width_and_a_base_without_vocabulary_are_told(tmp_path, prompt):
  narrow = Prompt(np.ones((2, 8), np.float32), 'p.npy', 'npy', {})
  with pytest.raises(ValueError, match=r'p.npy is \[2, 8\].* embed is 96'):
    neighbours.neighbours(narrow, BASE)
  for file in pretrained.directory('tiny').iterdir():
    (tmp_path / file.name).symlink_to(file)
  with pytest.raises(ValueError, match='as --vocabulary'):
    neighbours.neighbours(prompt, tmp_path)
  with_words = neighbours.neighbours(prompt, tmp_path, pretrained.VOCABULARY)
  assert with_words['rows'] == neighbours.neighbours(prompt, BASE)['rows']


def test_a_run_tells_its_base_and_labels(tmp_path, prompt, capsys):
  folder = tmp_path / 'prompts'
  folder.mkdir()
  np.save(folder / 'best.npy', prompt.array)
  assert cli.main(['neighbours', str(tmp_path)]) == 2
  assert '--base=ptune://tiny' in capsys.readouterr().err
  (tmp_path / 'run.json').write_text(
    json.dumps({'initial_checkpoint_path': BASE})
  )
  (tmp_path / 'config.gin').write_text(
    "CLASS_LABELS = None\nLABEL_NAMES = \\\n    ['not',\n     'negative']\n"
  )
  assert cli.main(['neighbours', str(tmp_path), '--top=2', '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert list(found['labels']) == ['not', 'negative']
  assert found['labels']['not']['rows'] == [3]
  console = rich.console.Console(file=io.StringIO(), width=80)
  neighbours.show(found, console)
  text = console.file.getvalue()
  assert '2 of 4 rows are nearest to ▁kitchen: rows 0, 2' in text
  assert 'label not (▁not): among the neighbours of row 3' in text
