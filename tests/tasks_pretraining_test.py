"""tasks/pretraining.py and tasks/vocabulary.py: from text files to batches.

No text is lost or invented, lengths equal T5's, and all random values depend
only on the seed. Tokens are bytes unless the vocabulary matters.
"""

import collections
import contextlib
import gzip
import io
import itertools
import json
import pathlib
import random

import numpy as np
import pytest

from ptune.data import batches as data
from tests import new_name

import seqio  # isort: skip  (after seqio_task, which quiets TensorFlow)
import tensorflow as tf  # isort: skip

from ptune.tasks import pretraining, vocabulary  # isort: skip

GOLDEN = pathlib.Path(__file__).parents[2] / 'shared' / 'golden' / 'text'
SENTINELS = 150
BYTES = seqio.ByteVocabulary(extra_ids=SENTINELS)
FIRST_SENTINEL = BYTES.vocab_size - 1
EOS = 1
LENGTHS = {'inputs': 64, 'targets': 64}
PIECE, NOISE, SPANS = 70, 10, 3  # The raw tokens for inputs of 64.


@pytest.fixture(scope='module')
def golden():
  """Returns tokens.json, the results of t5.data; see its README."""
  path = GOLDEN / 'tokens.json'
  if not path.is_file():
    pytest.skip(f'the reference values are not at {path}')
  return json.loads(path.read_text())


def words(count, seed=0):
  rng = random.Random(seed)
  letters = 'abcdefghijklmnop'
  return ' '.join(
    ''.join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(count)
  )


def source_of(lines):
  """Returns a source of lines in memory, the same for both splits."""

  def read(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({'text': lines})

  return seqio.FunctionDataSource(read, splits=['train', 'validation'])


def add(register, lines, **parameters):
  source = lines if isinstance(lines, seqio.DataSource) else source_of(lines)
  name = new_name('pretraining_test')
  return register(name, source, BYTES, **parameters)


def read(task, lengths=LENGTHS, *, seed=0, shuffle=False, epochs=1):
  """Returns the (inputs, targets) of a task, as lists."""
  dataset = task.get_dataset(
    lengths, 'train', shuffle=shuffle, seed=seed, num_epochs=epochs
  )
  return [
    (example['inputs'].tolist(), example['targets'].tolist())
    for example in dataset.as_numpy_iterator()
  ]


def without_eos(tokens):
  assert tokens[-1] == EOS and EOS not in tokens[:-1]
  return tokens[:-1]


def at_sentinels(tokens):
  """Splits a b <0> c <1> to [a b], [c], []; checks the sentinels' order."""
  parts, expected = [[]], FIRST_SENTINEL
  for token in tokens:
    if token > FIRST_SENTINEL - SENTINELS:
      assert token == expected
      parts.append([])
      expected -= 1
    else:
      parts[-1].append(token)
  return parts


def uncorrupted(inputs, targets):
  """Replaces the sentinels in the inputs by the noise in the targets."""
  *kept, after = at_sentinels(without_eos(inputs))
  before, *noise = at_sentinels(without_eos(targets))
  assert not after and not before  # Kept first, noise last.
  assert all(kept) and all(noise)
  spans = zip(kept, noise, strict=True)
  return list(itertools.chain.from_iterable(k + n for k, n in spans))


def uncut(inputs, targets):
  return without_eos(inputs) + without_eos(targets)


def tokens_of(lines):
  return [token for line in lines for token in BYTES.encode(line)]


# Comparisons with the reference.


def test_numbers_of_noise_tokens_and_spans_are_those_of_t5(golden):
  for case in golden['random_spans_noise_mask']:
    counts = pretraining.noise_counts(
      case['length'], case['noise_density'], case['mean_noise_span_length']
    )
    assert counts == (case['noise_tokens'], case['noise_spans']), case


def test_masks_drawn_have_the_counts_of_t5_and_begin_without_noise(golden):
  for case in golden['random_spans_noise_mask']:
    inputs_length = (
      case['length'] - case['noise_tokens'] + case['noise_spans'] + 1
    )
    task = add(
      pretraining.add_span_corruption,
      [words(case['length'])[: case['length']]],
      noise_density=case['noise_density'],
      mean_noise_span_length=case['mean_noise_span_length'],
    )
    lengths = {'inputs': inputs_length, 'targets': 600}
    inputs, targets = read(task, lengths)[0]
    assert len(uncorrupted(inputs, targets)) == case['length']
    _, *noise = at_sentinels(without_eos(targets))
    assert len(noise) == case['noise_spans']
    assert sum(map(len, noise)) == case['noise_tokens']
    assert (inputs[0] == FIRST_SENTINEL) == case['starts_with_noise']


def test_noise_becomes_sentinels_as_in_t5(golden):
  for case in golden['noise']:
    tokens = tf.constant(case['tokens'])
    mask = tf.constant(case['noise_mask']) == 1
    replaced = pretraining.spans_to_sentinels(tokens, mask, case['vocab_size'])
    assert replaced.numpy().tolist() == case['text_infilling_inputs']


def test_prepended_sentinels_are_those_of_t5(golden):
  for case in golden['add_sentinel_to_beginning']:
    passthrough = seqio.PassThroughVocabulary(case['vocab_size'])
    features = dict.fromkeys(
      ('inputs', 'targets'), seqio.Feature(passthrough, add_eos=True)
    )
    example = {
      name: tf.constant([tokens], tf.int32)
      for name, tokens in case['example'].items()
    }
    dataset = pretraining.prepend_sentinel(
      tf.data.Dataset.from_tensor_slices(example),
      features,
      case['field'],
      case['offset'],
    )
    (got,) = dataset.as_numpy_iterator()
    assert {f: t.tolist() for f, t in got.items()} == case['expected']


# The lengths in the configurations of T5X, mT5 and ByT5.
@pytest.mark.parametrize(
  ('inputs', 'mean', 'piece', 'targets'),
  [(512, 3.0, 568, 114), (1024, 3.0, 1137, 229), (1024, 20.0, 1193, 189)],
)
def test_lengths_are_the_published_ones(inputs, mean, piece, targets):
  got = pretraining.span_corruption_lengths(inputs, 0.15, mean)
  assert got == (piece, targets)


# Span corruption.


@pytest.mark.parametrize(
  ('density', 'mean'), [(0.15, 3.0), (0.5, 2.0), (0.15, 1.0), (0.8, 5.0)]
)
def test_pieces_fill_the_inputs_to_the_last_place(density, mean):
  for length in range(3, 300):
    piece, targets = pretraining.span_corruption_lengths(length, density, mean)
    noise, spans = pretraining.noise_counts(piece, density, mean)
    assert piece - noise + spans + 1 == length
    assert noise + spans + 1 == targets
    longer, more = pretraining.noise_counts(piece + 1, density, mean)
    assert piece + 1 - longer + more + 1 > length


@pytest.mark.parametrize(
  ('density', 'mean'), [(0.15, 3.0), (0.5, 2.0), (0.15, 1.0)]
)
def test_span_corruption_loses_and_invents_nothing(density, mean):
  lines = [words(n, seed=n) for n in (40, 3, 100, 1, 25)]
  task = add(
    pretraining.add_span_corruption,
    lines,
    noise_density=density,
    mean_noise_span_length=mean,
  )
  rows = read(task)
  piece, targets_length = pretraining.span_corruption_lengths(64, density, mean)
  noise, spans = pretraining.noise_counts(piece, density, mean)
  *full, last = rows
  assert len(full) > 5
  for inputs, targets in full:
    assert (len(inputs), len(targets)) == (64, targets_length)
    kept = at_sentinels(without_eos(inputs))
    assert len(kept) - 1 == spans
    assert sum(map(len, kept)) == piece - noise
  assert len(last[0]) <= 64
  restored = [token for row in rows for token in uncorrupted(*row)]
  assert restored == tokens_of(lines)


def test_every_way_to_part_is_equally_likely():
  @tf.function
  def draw(seed):
    return pretraining._segments(tf.constant(6), tf.constant(3), seed)

  counts = collections.Counter(
    tuple(draw(tf.constant([7, i])).numpy().tolist()) for i in range(3000)
  )
  ways = [w for w in itertools.product(range(1, 5), repeat=3) if sum(w) == 6]
  assert sorted(counts) == sorted(ways) and len(ways) == 10
  deviation = np.abs(np.array(list(counts.values())) - 300)
  assert deviation.max() < 5 * np.sqrt(300)


def test_without_first_sentinel_nothing_else_changes():
  lines = [words(100)]
  usual = read(add(pretraining.add_span_corruption, lines))
  without = read(
    add(pretraining.add_span_corruption, lines, sentinel_first=False)
  )
  assert [(i, t[1:]) for i, t in usual] == without
  assert usual[0][1][0] == FIRST_SENTINEL
  # Without the first sentinel, targets need one position less.
  lengths = {'inputs': 64, 'targets': NOISE + SPANS}
  task = add(pretraining.add_span_corruption, lines, sentinel_first=False)
  assert len(read(task, lengths)[0][1]) == NOISE + SPANS


# Prefix LM.


@pytest.mark.parametrize(
  ('lengths', 'piece'),
  [
    ({'inputs': 64, 'targets': 64}, 64),
    ({'inputs': 64, 'targets': 20}, 20),
    ({'inputs': 2, 'targets': 9}, 2),
  ],
)
def test_prefix_and_continuation_are_the_text(lengths, piece):
  lines = [words(n, seed=n) for n in (40, 3, 100, 1, 25)]
  rows = read(add(pretraining.add_prefix_lm, lines), lengths)
  for inputs, targets in rows:
    assert 2 <= len(inputs) <= lengths['inputs']
    assert 2 <= len(targets) <= lengths['targets']
  assert all(len(uncut(*row)) == piece for row in rows[:-1])
  restored = [token for row in rows for token in uncut(*row)]
  original = tokens_of(lines)
  # A single token at the end is dropped.
  assert restored == original[: len(original) - (len(original) % piece == 1)]


def test_every_place_to_cut_is_equally_likely():
  rows = read(
    add(pretraining.add_prefix_lm, ['x' * 9 * 3000]),
    {
      'inputs': 9,
      'targets': 9,
    },
  )
  counts = collections.Counter(len(without_eos(inputs)) for inputs, _ in rows)
  assert sorted(counts) == list(range(1, 9))
  deviation = np.abs(np.array(list(counts.values())) - 3000 / 8)
  assert deviation.max() < 5 * np.sqrt(3000 / 8)


# Randomness.

OBJECTIVES = [
  (pretraining.add_span_corruption, uncorrupted, PIECE),
  (pretraining.add_prefix_lm, uncut, 64),
]


@pytest.mark.parametrize(('register', 'undo', 'piece'), OBJECTIVES)
def test_rows_are_a_function_of_the_seed(register, undo, piece):
  lines = [words(200)]
  first, second, other = (
    read(add(register, lines), seed=seed) for seed in (3, 3, 4)
  )
  assert first == second
  assert [undo(*row) for row in first] == [undo(*row) for row in other]
  assert sum(a != b for a, b in zip(first, other, strict=True)) > 10


@pytest.mark.parametrize(('register', 'undo', 'piece'), OBJECTIVES)
def test_epochs_hold_the_same_pieces_and_other_draws(register, undo, piece):
  lines = [words(400)[: 20 * piece]]
  rows = read(add(register, lines), epochs=3)
  epochs = [rows[:20], rows[20:40], rows[40:]]
  for one, two in itertools.combinations(epochs, 2):
    assert [undo(*row) for row in one] == [undo(*row) for row in two]
    assert sum(a != b for a, b in zip(one, two, strict=True)) > 15


def test_pieces_reach_over_the_border_of_epochs():
  lines = ['abcdefghij']
  task = add(pretraining.add_prefix_lm, lines)
  rows = read(task, {'inputs': 4, 'targets': 4}, epochs=2)
  pieces = [BYTES.decode(uncut(*row)) for row in rows]
  assert pieces == ['abcd', 'efgh', 'ijab', 'cdef', 'ghij']


@pytest.mark.parametrize(('register', 'undo', 'piece'), OBJECTIVES)
def test_streamed_batches_agree_and_epochs_differ(register, undo, piece):
  lines = [words(400, seed=n) for n in range(4)]
  lines = [''.join(lines)[: 16 * piece]]
  task = add(register, lines)

  def batches(seed):
    return data.Batches(task, LENGTHS, 8, seed=seed, in_memory=False, window=2)

  one, two = batches(5), batches(5)
  drawn = [one(step) for step in range(12)]
  for step in (0, 7, 3, 11):  # Out of order: resumed runs skip rows.
    for name, array in two(step).items():
      np.testing.assert_array_equal(array, drawn[step][name])
  other = batches(6)(0)['encoder_input_tokens']
  assert not np.array_equal(other, drawn[0]['encoder_input_tokens'])

  # 12 batches hold 6 epochs of these 16 pieces; each epoch draws them anew.
  versions = collections.defaultdict(list)
  for batch in drawn:
    for inputs, targets in zip(
      batch['encoder_input_tokens'],
      batch['decoder_target_tokens'],
      strict=True,
    ):
      row = inputs[inputs != 0].tolist(), targets[targets != 0].tolist()
      versions[tuple(undo(*row))].append(tuple(row[0]))
  assert set(versions) <= {
    tuple(tokens_of(lines)[i * piece :][:piece]) for i in range(16)
  }
  assert sum(map(len, versions.values())) == 96
  assert sum(len(set(drawn)) for drawn in versions.values()) > 80
  assert one.trimmed == {'inputs': 0, 'targets': 0}


def test_span_corruption_has_one_shape_and_needs_no_padding():
  task = add(pretraining.add_span_corruption, [words(400)[: 32 * PIECE]])
  lengths = {'inputs': 64, 'targets': NOISE + SPANS + 1}
  batches = data.Batches(
    task, lengths, 4, in_memory=False, bucket_multiple=None
  )
  batch = batches(0)
  assert batch['encoder_input_tokens'].shape == (4, 64)
  assert batch['decoder_loss_weights'].all()
  assert (batch['encoder_input_tokens'] != 0).all()


# Text files.


@pytest.fixture
def corpus(tmp_path):
  """Writes files of 250 and 130 lines and blank lines; one is compressed."""
  lines = [
    [f'{name} {i}: ' + words(8, i) for i in range(n)]
    for name, n in (('a', 250), ('b', 130))
  ]
  (tmp_path / 'a.txt').write_text('\n\n'.join(lines[0]) + '\n  \n')
  with gzip.open(tmp_path / 'b.txt.gz', 'wt') as file:
    file.write('\r\n'.join(lines[1]))
  return tmp_path, lines


def texts(source, split, **how):
  dataset = source.get_dataset(split, **{'shuffle': False, **how})
  return [e['text'].decode() for e in dataset.as_numpy_iterator()]


def test_splits_are_disjoint_and_hold_every_line(corpus):
  folder, lines = corpus
  source = pretraining.text_files(
    [f'{folder}/*.txt', f'{folder}/*.gz', f'{folder}/a*']
  )
  train, validation = texts(source, 'train'), texts(source, 'validation')
  assert sorted(train + validation) == sorted(lines[0] + lines[1])
  assert set(validation) == {lines[0][99], lines[0][199], lines[1][99]}
  some = texts(pretraining.text_files(f'{folder}/*', 10), 'validation')
  assert len(some) == 25 + 13


def test_the_split_of_a_line_does_not_depend_on_other_files(corpus):
  folder, lines = corpus
  alone = pretraining.text_files(f'{folder}/b.txt.gz')
  assert texts(alone, 'validation') == [lines[1][99]]


def test_files_are_shuffled_by_the_seed_and_anew_in_each_epoch(tmp_path):
  for i in range(6):
    (tmp_path / f'{i}.txt').write_text(f'{i}\n')
  source = pretraining.text_files(f'{tmp_path}/*.txt')
  assert texts(source, 'train') == list('012345')

  def epochs(seed):
    dataset = source.get_dataset('train', shuffle=True, seed=seed).repeat(4)
    lines = [e['text'].decode() for e in dataset.as_numpy_iterator()]
    return [lines[i : i + 6] for i in range(0, 24, 6)]

  assert epochs(1) == epochs(1) != epochs(2)
  assert all(sorted(epoch) == list('012345') for epoch in epochs(1))
  assert len({tuple(epoch) for epoch in epochs(1)}) > 1


def test_shuffled_lines_keep_their_neighbours(corpus):
  folder, lines = corpus
  source = pretraining.text_files(f'{folder}/a.txt')
  dataset = source.get_dataset('train', shuffle=True, seed=0).repeat(5)
  shuffled = [e['text'].decode() for e in dataset.as_numpy_iterator()]
  in_order = [line for line in lines[0] if line not in (lines[0][99::100])]
  epochs = [shuffled[i : i + 248] for i in range(0, 5 * 248, 248)]
  assert len({tuple(epoch) for epoch in epochs}) > 1
  for epoch in epochs:
    assert sorted(epoch) == sorted(in_order)
    places = [in_order.index(line) for line in epoch]
    assert np.count_nonzero(np.diff(places) != 1) <= 248 // 64


def test_a_task_of_files_holds_out_its_validation_split(corpus):
  folder, lines = corpus
  task = add(pretraining.add_prefix_lm, pretraining.text_files(f'{folder}/*'))
  dataset = task.get_dataset(LENGTHS, 'validation', shuffle=False, seed=0)
  rows = [
    uncut(e['inputs'].tolist(), e['targets'].tolist())
    for e in dataset.as_numpy_iterator()
  ]
  held_out = [lines[0][99], lines[0][199], lines[1][99]]
  assert BYTES.decode([t for row in rows for t in row]) == ''.join(held_out)


# Errors.


def raises(match):
  return pytest.raises(ValueError, match=match)


def test_what_does_not_suit_the_lengths_is_an_error():
  task = add(pretraining.add_span_corruption, [words(400)])
  with raises(r"\['targets'\] is 20, expected at least 114 for inputs of 512"):
    read(task, {'inputs': 512, 'targets': 20})
  with raises(r"\['inputs'\] is 2, expected at least 3"):
    read(task, {'inputs': 2, 'targets': 20})
  with raises('has 150 sentinels, expected at least 227.*extra_ids=227'):
    read(task, {'inputs': 4096, 'targets': 1024})
  prefixes = add(pretraining.add_prefix_lm, [words(400)])
  with raises('expected at least 2'):
    read(prefixes, {'inputs': 512, 'targets': 1})
  for lengths in (None, {'inputs': 512}):
    for either in (task, prefixes):
      with raises("expected a length for 'inputs' and for 'targets'"):
        either.get_dataset(lengths)
  for parameters in (
    {'noise_density': 0.0},
    {'noise_density': 1.0},
    {'mean_noise_span_length': 0.5},
  ):
    with raises(f'{next(iter(parameters))} is'):
      read(add(pretraining.add_span_corruption, ['a'], **parameters))


def test_sources_that_do_not_suit_are_errors(tmp_path):
  (tmp_path / 'a.txt').write_text('text\n')
  with raises('expected at least 2'):
    pretraining.text_files('*.txt', validation_every=1)
  missing = pretraining.text_files([f'{tmp_path}/*.txt', f'{tmp_path}/*.csv'])
  with raises(r'No text file matches \S*/\*\.csv, expected'):
    missing.get_dataset('train')
  with raises('No text file matches an empty list'):
    pretraining.text_files([]).get_dataset('train')
  unnamed = seqio.TextLineDataSource({'train': f'{tmp_path}/a.txt'})
  with raises('expected a field named text'):
    read(add(pretraining.add_prefix_lm, unnamed))


# The vocabulary.


def run_vocabulary(*arguments):
  """Runs the command; returns its exit status, stdout and stderr."""
  out, error = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
    try:
      vocabulary.main(arguments)
    except SystemExit as end:
      return end.code, out.getvalue(), error.getvalue()
  return 0, out.getvalue(), error.getvalue()


@pytest.fixture(scope='module')
def vocabulary_run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('vocabulary')
  with gzip.open(folder / 'a.txt.gz', 'wt', encoding='utf-8') as file:
    file.writelines(words(30, seed=i) + '\n' for i in range(200))
  long_line = ' '.join(['zebra'] * 2000)  # Over SentencePiece's default.
  (folder / 'b.txt').write_text(long_line, encoding='utf-8')
  output = folder / 'made' / 'vocab.model'
  status, printed, error = run_vocabulary(
    f'--input={folder}/*.txt*', '--vocab_size=400', f'--output={output}'
  )
  assert status == 0, error
  return folder, output, printed


def test_the_script_writes_a_vocabulary_of_t5s_kind(vocabulary_run):
  _, output, printed = vocabulary_run
  assert f'{output}: 400 pieces' in printed
  assert vocabulary.SAMPLE in printed
  assert [path.name for path in output.parent.iterdir()] == ['vocab.model']
  pieces = seqio.SentencePieceVocabulary(str(output), extra_ids=100)
  assert (pieces.vocab_size, pieces.extra_ids) == (500, 100)
  assert (pieces.pad_id, pieces.eos_id, pieces.unk_id) == (0, 1, 2)
  assert pieces.bos_id == -1
  text = words(20, seed=1) + ' zebra Ü 😀'
  tokens = pieces.encode(text)
  assert pieces.decode(tokens) == text
  assert pieces.unk_id not in tokens
  assert pieces.encode_tf(text).numpy().tolist() == tokens
  assert pieces.tokenizer.id_to_piece(pieces.encode('zebra')) == ['▁zebra']
  assert pieces.encode('<extra_id_0>')[0] == 499


def test_the_same_text_gives_the_same_vocabulary(vocabulary_run, tmp_path):
  folder, output, _ = vocabulary_run
  again = tmp_path / 'again.model'
  vocabulary.train_vocabulary([f'{folder}/*.txt*'], 400, str(again))
  assert again.read_bytes() == output.read_bytes()


def test_without_byte_fallback_other_characters_are_unknown(
  vocabulary_run, tmp_path
):
  folder, _, _ = vocabulary_run
  pieces = vocabulary.train_vocabulary(
    [f'{folder}/*.txt*'], 150, str(tmp_path / 'v'), byte_fallback=False
  )
  assert pieces.get_piece_size() == 150
  assert pieces.unk_id() in pieces.encode('😀')


def test_text_files_train_on_the_vocabulary_made_of_them(vocabulary_run):
  folder, output, _ = vocabulary_run
  pieces = seqio.SentencePieceVocabulary(str(output), extra_ids=100)
  task = pretraining.add_span_corruption(
    new_name('pretraining_test'),
    pretraining.text_files(f'{folder}/*.txt*'),
    pieces,
  )
  lengths = {'inputs': 64, 'targets': NOISE + SPANS + 1}
  one, two = (
    data.Batches(task, lengths, 8, in_memory=False, window=2) for _ in range(2)
  )
  batch, late = one(0), [one(step) for step in (30, 31)]
  for step, batch_read in zip((31, 30), late[::-1], strict=True):
    for name, array in two(step).items():
      np.testing.assert_array_equal(array, batch_read[name])
  assert (batch['encoder_input_tokens'].max(1) == 499).all()
  assert (batch['decoder_target_tokens'][:, 0] == 499).all()
  assert batch['encoder_input_tokens'].shape == (8, 64)


def test_the_script_says_what_is_wrong(tmp_path):
  (tmp_path / 'a.txt').write_text('a few words of text\n' * 20)
  (tmp_path / 'latin.txt').write_bytes('Übung\n'.encode('latin-1'))
  (tmp_path / 'empty.txt').write_text('')
  status, _, error = run_vocabulary(f'--input={tmp_path}/*.csv', '--output=v')
  assert status == 2
  assert f'No file matches --input {tmp_path}/*.csv' in error

  def train(file, vocab_size=300, output=tmp_path / 'v'):
    vocabulary.train_vocabulary([f'{tmp_path}/{file}'], vocab_size, str(output))

  with raises('Cannot write --output'):
    train('a.txt', output=tmp_path / 'a.txt' / 'v')
  with raises('Cannot write --output .* is a directory'):
    train('a.txt', output=tmp_path)
  with raises('vocab_size 9000 .* set it to a value <= '):
    train('a.txt', 9000)
  with raises('vocab_size 100 .* smaller than required'):
    train('a.txt', 100)
  with raises(r'latin\.txt is not UTF-8 text'):
    train('latin.txt')
  with raises('vocab_size 300 .* 1 files'):
    train('empty.txt')
  assert not (tmp_path / 'v').exists()
