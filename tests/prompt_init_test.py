"""Initialisers of the prompt: their values, and errors in files."""

import logging
import pathlib
import re

import numpy as np
import pytest
import sentencepiece
import seqio

from ptune.methods import prompt_array, prompt_init

EMBED = 4


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  """Trains a SentencePiece vocabulary that lacks some characters."""
  folder = tmp_path_factory.mktemp('vocabulary')
  text = folder / 'text.txt'
  text.write_text('good bad great film the a no yes maybe\n' * 20)
  sentencepiece.SentencePieceTrainer.train(
    input=str(text),
    model_prefix=str(folder / 'v'),
    vocab_size=40,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  return seqio.SentencePieceVocabulary(str(folder / 'v.model'), extra_ids=3)


def base_of(vocabulary, labels=()):
  """Returns a base whose embedding has a different row for each id."""
  table = np.arange(vocabulary.vocab_size * EMBED, dtype=np.float32)
  table = table.reshape(-1, EMBED) ** 1.5  # No mean equals a row.

  def embedding(ids):
    assert 0 <= np.min(ids) <= np.max(ids) < len(table), ids
    return table[ids]

  base = prompt_init.Base(embedding, lambda: vocabulary, lambda: list(labels))
  return base, table


def run(init, length, base, seed=0):
  value = init(np.random.default_rng(seed), (length, EMBED), base)
  assert value.dtype == np.float32
  assert value.shape == (length, EMBED)
  return value


def ids_of(value, table):
  """Returns, for each row of the prompt, the equal row of the table."""
  same = (value[:, None] == table[None]).all(axis=-1)
  assert (same.sum(axis=1) == 1).all(), 'a row that is no embedding'
  return same.argmax(axis=1)


def warnings_of(caplog):
  return [
    r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING
  ]


ELSEWHERE = prompt_init.Base(None, None, None)  # Cannot be read.


# --------------------------------------------------------------------- random


@pytest.mark.parametrize(
  ('init', 'low', 'high'),
  [
    (prompt_init.random_uniform(), -0.5, 0.5),  # As in the paper.
    (prompt_init.random_uniform(low=0.0), 0.0, 0.5),  # As in its code.
    (prompt_init.random_uniform(-2.0, 1.0), -2.0, 1.0),
  ],
)
def test_random_uniform_fills_its_range(init, low, high):
  value = run(init, 1000, ELSEWHERE)
  assert low <= value.min() < value.max() <= high
  edge = 0.01 * (high - low)
  assert value.min() < low + edge
  assert value.max() > high - edge
  np.testing.assert_allclose(value.mean(), (low + high) / 2, atol=2 * edge)


def test_the_seed_decides(vocabulary):
  base, _ = base_of(vocabulary)
  for init in (prompt_init.random_uniform(), prompt_init.from_sampled_vocab()):
    a, again, b = (run(init, 8, base, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()


# --------------------------------------------------------------- vocabulary


def test_sampled_vocab_takes_common_ids_and_each_once(vocabulary, caplog):
  base, table = base_of(vocabulary)
  init = prompt_init.from_sampled_vocab(population=10)
  for seed in range(5):
    ids = ids_of(run(init, 7, base, seed), table)
    assert len(set(ids)) == 7
    assert max(ids) < 10
  # All ids, special tokens included, in random order.
  ids = ids_of(run(init, 10, base), table)
  assert sorted(ids) == list(range(10)) != list(ids)
  assert not warnings_of(caplog)


def test_sampled_vocab_repeats_ids_where_there_are_too_few(vocabulary, caplog):
  base, table = base_of(vocabulary)
  init = prompt_init.from_sampled_vocab(population=10)
  ids = ids_of(run(init, 11, base), table)
  assert max(ids) < 10
  assert warnings_of(caplog) == [
    'a prompt of 11 tokens is drawn from 10 ids, so some repeat'
  ]


def test_sampled_vocab_never_asks_for_ids_beyond_the_vocabulary(caplog):
  base, table = base_of(seqio.ByteVocabulary())  # 259 ids, not 5,000.
  ids = ids_of(run(prompt_init.from_sampled_vocab(), 259, base), table)
  assert sorted(ids) == list(range(259))
  assert not warnings_of(caplog)
  run(prompt_init.from_sampled_vocab(), 260, base)
  assert 'drawn from 259 ids' in warnings_of(caplog)[0]


# --------------------------------------------------------------- class labels


FILL = prompt_init.from_array  # A recognisable fill.


def test_class_label_i_fills_row_i_once_with_the_mean_of_its_pieces(
  vocabulary, caplog
):
  base, table = base_of(vocabulary)
  labels = ['good', 'maybe yes no', 'bad']
  pieces = [vocabulary.encode(label) for label in labels]
  assert len(pieces[1]) > 1
  assert all(vocabulary.eos_id not in p for p in pieces)
  fill = np.full((6, EMBED), -7.0)
  value = run(prompt_init.from_class_labels(labels, FILL(fill)), 6, base)
  want = fill.copy()
  want[:3] = [table[p].mean(axis=0) for p in pieces]
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert not warnings_of(caplog)
  np.testing.assert_array_equal(fill, -7)  # Was not changed.


def test_class_labels_are_filled_up_from_the_sampled_vocab(vocabulary):
  base, table = base_of(vocabulary)
  value = run(prompt_init.from_class_labels(['good']), 9, base)
  sampled = run(prompt_init.from_sampled_vocab(), 9, base)
  np.testing.assert_array_equal(value[1:], sampled[1:])
  assert len(set(ids_of(value[1:], table))) == 8


def test_class_labels_are_those_of_the_task_unless_given(vocabulary):
  base, _ = base_of(vocabulary, labels=['yes', 'no'])
  np.testing.assert_array_equal(
    run(prompt_init.from_class_labels(), 5, base),
    run(prompt_init.from_class_labels(['yes', 'no']), 5, base),
  )


def test_class_labels_beyond_the_prompt_are_left_out(vocabulary, caplog):
  base, table = base_of(vocabulary)
  labels = ['yes', 'no', 'bad', 'good']
  value = run(prompt_init.from_class_labels(labels), 2, base)
  want = [table[vocabulary.encode(x)].mean(axis=0) for x in labels[:2]]
  np.testing.assert_allclose(value, want, rtol=1e-6)
  (message,) = warnings_of(caplog)
  assert message == (
    "the prompt has 2 rows for 4 class labels; these get no row: 'bad', 'good'"
  )


def test_class_labels_that_are_no_list_or_none_are_refused(vocabulary):
  with pytest.raises(ValueError, match=r"must be a list, such as \['yes'\]"):
    prompt_init.from_class_labels('yes')
  base, _ = base_of(vocabulary, labels=[])
  for labels in (None, []):
    with pytest.raises(ValueError, match='CLASS_LABELS is empty'):
      run(prompt_init.from_class_labels(labels), 2, base)


@pytest.mark.parametrize('label', ['日本', '日', '', '   '])
def test_a_label_that_cannot_be_encoded_is_named(vocabulary, label):
  # SentencePiece encodes such a word as a known space and the unknown token.
  base, _ = base_of(vocabulary)
  init = prompt_init.from_class_labels(['yes', label])
  with pytest.raises(ValueError, match='cannot be encoded') as e:
    run(init, 2, base)
  assert repr(label) in str(e.value)
  assert ('unknown token' if label.strip() else 'no tokens') in str(e.value)


def test_a_label_that_is_partly_unknown_is_warned_of(vocabulary, caplog):
  base, table = base_of(vocabulary)
  value = run(prompt_init.from_class_labels(['good 日本']), 1, base)
  ids = vocabulary.encode('good 日本')
  assert vocabulary.unk_id in ids
  np.testing.assert_allclose(value[0], table[ids].mean(axis=0), rtol=1e-6)
  (message,) = warnings_of(caplog)
  assert "the class label 'good 日本' has pieces" in message


# --------------------------------------------------------------------- string


def test_a_string_gives_its_pieces_in_order(vocabulary, caplog):
  base, table = base_of(vocabulary)
  ids = vocabulary.encode('the film a film')
  assert len(set(ids)) > 2
  fill = np.full((len(ids) + 2, EMBED), -7.0)
  init = prompt_init.from_string('the film a film', FILL(fill))
  value = run(init, len(ids) + 2, base)
  np.testing.assert_array_equal(value, [*table[ids], *fill[:2]])
  assert not warnings_of(caplog)


def test_a_string_is_cut_to_the_prompt(vocabulary, caplog):
  base, table = base_of(vocabulary)
  ids = vocabulary.encode('the film a film')
  value = run(prompt_init.from_string('the film a film'), 2, base)
  np.testing.assert_array_equal(value, table[ids[:2]])
  assert warnings_of(caplog) == [
    f'the initial text has {len(ids)} pieces; the prompt takes the first 2'
  ]


def test_a_string_that_cannot_be_encoded_is_refused(vocabulary):
  base, _ = base_of(vocabulary)
  with pytest.raises(ValueError, match="the initial text '日本' cannot be"):
    run(prompt_init.from_string('日本'), 2, base)


# ------------------------------------------------------------- array and file


VALUE = np.arange(5 * EMBED, dtype=np.float32).reshape(5, EMBED) / 3


def test_an_array_is_copied():
  array = VALUE.copy()
  value = run(prompt_init.from_array(array), 5, ELSEWHERE)
  np.testing.assert_array_equal(value, VALUE)
  value[:] = 0
  np.testing.assert_array_equal(array, VALUE)


def test_a_shape_that_does_not_fit_names_both_and_the_macro():
  with pytest.raises(ValueError, match=r'\[5, 4\].*\[7, 4\].*PROMPT_LENGTH'):
    run(prompt_init.from_array(VALUE), 7, ELSEWHERE)


@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.float16])
@pytest.mark.parametrize('asked', ['prompt.npy', 'prompt'])
def test_a_file_is_found_with_and_without_its_suffix(tmp_path, asked, dtype):
  array = VALUE.astype(dtype)
  np.save(tmp_path / 'prompt.npy', array)
  value = run(prompt_init.from_file(tmp_path / asked), 5, ELSEWHERE)
  np.testing.assert_array_equal(value, array.astype(np.float32))


def test_a_file_is_read_when_the_run_starts_and_not_before(tmp_path):
  init = prompt_init.from_file(str(tmp_path / 'prompt.npy'))
  np.save(tmp_path / 'prompt.npy', VALUE)
  np.testing.assert_array_equal(run(init, 5, ELSEWHERE), VALUE)


def test_the_references_prompt_files_are_read(numerics):
  # Its name has dots, but no suffix.
  folder = numerics / 'checkpoints/legacy_prompt/numpy_checkpoints'
  path = folder / 'checkpoint_1100010/encoder.prompt.prompt.prompt'
  with np.load(numerics / 'trajectory' / 'trajectory.npz') as f:
    want = f['start1100000_prompt_each'][-1]
  init = prompt_init.from_file(path)
  value = init(np.random.default_rng(0), want.shape, ELSEWHERE)
  np.testing.assert_array_equal(value, want)


def test_a_file_of_another_shape_is_named(tmp_path):
  np.save(tmp_path / 'prompt.npy', VALUE)
  init = prompt_init.from_file(tmp_path / 'prompt.npy')
  with pytest.raises(
    ValueError, match=r'prompt\.npy has shape \[5, 4\].*\[6, 4\]'
  ):
    run(init, 6, ELSEWHERE)


def test_a_missing_file_names_its_neighbours(tmp_path):
  np.save(tmp_path / 'step_1000.npy', VALUE)
  (tmp_path / 'metrics.jsonl').touch()
  with pytest.raises(FileNotFoundError) as e:
    prompt_array.read(tmp_path / 'step_100.npy')
  assert str(e.value) == (
    f'there is no prompt file {tmp_path}/step_100.npy; did you mean'
    ' step_1000.npy?'
  )
  with pytest.raises(FileNotFoundError, match='there is no prompt file'):
    prompt_array.read(tmp_path / 'no' / 'where.npy')


class Touches:
  """A pickle that writes a file when loaded."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def test_a_pickled_file_is_refused_and_never_loaded(tmp_path):
  trace = tmp_path / 'loaded'
  objects = np.array([[Touches(trace)]], dtype=object)
  np.save(tmp_path / 'prompt.npy', objects, allow_pickle=True)
  with pytest.raises(ValueError, match='pickled objects, which are not loaded'):
    prompt_array.read(tmp_path / 'prompt.npy')
  assert not trace.exists()


def write(name, value):
  def make(folder):
    np.save(folder / name, value)

  return make


def cut(at):
  def make(folder):
    np.save(folder / 'prompt.npy', VALUE)
    content = (folder / 'prompt.npy').read_bytes()
    (folder / 'prompt.npy').write_bytes(content[:at])

  return make


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (cut(-4), 'cut short'),
    (cut(40), 'cut short'),  # In the header.
    (cut(3), 'cut short'),
    (cut(0), 'cut short'),
    (write('prompt.npy', VALUE[0]), r'float32 \[4\]; a prompt is \[prompt,'),
    (write('prompt.npy', VALUE[None]), r'float32 \[1, 5, 4\]'),
    (write('prompt.npy', VALUE.astype(str)), r'<U32 \[5, 4\]'),
    (write('prompt.npy', VALUE.astype(complex)), r'complex128 \[5, 4\]'),
    (write('prompt.npy', np.where(VALUE > 2, np.nan, VALUE)), 'holds NaN'),
    (write('prompt.npy', np.where(VALUE > 2, np.inf, VALUE)), 'or infinity'),
  ],
)
def test_a_damaged_file_is_named(tmp_path, make, message):
  make(tmp_path)
  with pytest.raises(ValueError, match=message) as e:
    prompt_array.read(tmp_path / 'prompt.npy')
  assert re.match(rf'prompt file {tmp_path}/prompt\.npy ', str(e.value))


def test_values_too_large_for_float32_are_refused(tmp_path):
  np.save(tmp_path / 'prompt.npy', VALUE.astype(np.float64) * 1e300)
  with pytest.raises(ValueError, match='holds NaN or infinity'):
    prompt_array.read(tmp_path / 'prompt.npy')


def test_an_archive_or_a_text_is_no_prompt_file(tmp_path):
  np.savez(tmp_path / 'prompt.npz', prompt=VALUE)
  (tmp_path / 'prompt.json').write_text('{"step": 5}')
  for name in ('prompt.npz', 'prompt.json'):
    with pytest.raises(ValueError, match='is not a NumPy array file'):
      prompt_array.read(tmp_path / name)


# ---------------------------------------------------------------- of prompts


@pytest.fixture
def sources(tmp_path):
  """Writes two prompts [2, 4] and one [3, 4]; returns arrays and files."""
  rng = np.random.default_rng(3)
  files = []
  for name, rows in (('a', 2), ('b', 2), ('long', 3)):
    files.append(str(tmp_path / f'{name}.npy'))
    np.save(files[-1], rng.normal(size=(rows, EMBED)).astype(np.float32))
  return files


def test_one_source_prompt_is_taken_as_it_is(sources):
  value = run(prompt_init.from_prompts(sources[:1]), 2, ELSEWHERE)
  assert (value == np.load(sources[0])).all()


@pytest.mark.parametrize(
  ('weights', 'shares'),
  [(None, (0.5, 0.5)), ([3, 1], (0.75, 0.25)), ([0.0, 2.0], (0, 1))],
)
def test_several_source_prompts_give_their_weighted_mean(
  sources, weights, shares
):
  init = prompt_init.from_prompts(sources[:2], weights)
  a, b = map(np.load, sources[:2])
  expected = shares[0] * a + shares[1] * b
  np.testing.assert_allclose(run(init, 2, ELSEWHERE), expected, rtol=1e-6)


def test_source_prompts_of_unlike_shapes_are_all_named(sources):
  init = prompt_init.from_prompts(sources)
  with pytest.raises(ValueError, match=r'prompt is \[2, 4\]') as error:
    run(init, 2, ELSEWHERE)
  assert 'long.npy [3, 4]' in str(error.value)
  assert 'a.npy' not in str(error.value)


@pytest.mark.parametrize(
  ('files', 'weights', 'message'),
  [
    ('a.npy', None, r"must be a list of prompt files, such as \['a.npy'\]"),
    ([], None, 'must be a list of prompt files'),
    (['a', 'b'], [1.0], '1 numbers for 2 SOURCE_PROMPTS'),
    (['a', 'b'], [0, 0], 'numbers of at least 0, and at least one'),
    (['a', 'b'], [2, -1], 'numbers of at least 0'),
    (['a', 'b'], [1, float('nan')], 'numbers of at least 0'),
    (['a', 'b'], [1, float('inf')], 'numbers of at least 0'),
  ],
)
def test_wrong_source_prompts_are_told_at_once(files, weights, message):
  with pytest.raises(ValueError, match=message):
    prompt_init.from_prompts(files, weights)
