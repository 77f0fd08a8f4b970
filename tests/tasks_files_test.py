"""tasks/files.py: a user's TSV, CSV and JSON lines as a task."""

import gzip
import json
import os
import pathlib
import re
from unittest import mock

import numpy as np
import pytest

from ptune.data import batches as data
from ptune.data import seqio_task
from ptune.errors import UserError
from ptune.tasks import files, templates

LENGTHS = {'inputs': 32, 'targets': 8}
NAMES = ['negative', 'positive']


def write(path, text):
  if isinstance(text, str):
    text = text.encode()
  path.write_bytes(text)
  return str(path)


def texts(file, inputs='{text}', targets='{label}', names=None, skip=False):
  rows = files.read_rows(file, 'TASK_FILES')
  found = files.to_texts('train', rows, inputs, targets, names, skip)
  return list(zip(found['inputs'], found['targets'], strict=True))


def test_tsv_csv_and_jsonl_give_the_same_rows(tmp_path):
  tsv = 'text\tlabel\nit "works", well\t1\nnaïve\t0\n'
  csv = 'text,label\r\n"it ""works"", well",1\r\nnaïve,0\r\n'
  jsonl = '{"text": "it \\"works\\", well", "label": 1}\n' + json.dumps(
    {'text': 'naïve', 'label': False}
  )
  want = [('it "works", well', 'positive'), ('naïve', 'negative')]
  for suffix, text in (('tsv', tsv), ('csv', csv), ('jsonl', jsonl)):
    file = write(tmp_path / f'rows.{suffix}', text)
    assert texts(file, names=NAMES) == want


def test_csv_fields_may_have_line_ends_and_a_byte_order_mark(tmp_path):
  file = write(
    tmp_path / 'a.csv', b'\xef\xbb\xbftext,label\n"two\nlines",x\n\nlast,y\n'
  )
  assert texts(file) == [('two\nlines', 'x'), ('last', 'y')]


def test_tsv_keeps_quotes_blanks_and_carriage_returns_out(tmp_path):
  file = write(tmp_path / 'a.tsv', 'text\tlabel\r\n a "b \tx\r\n\r\nc\ty')
  assert texts(file) == [(' a "b ', 'x'), ('c', 'y')]


def test_templates_take_any_column_and_braces(tmp_path):
  file = write(tmp_path / 'a.tsv', 'first text\tlabel\t0\na{b}\t1\tz\n')
  got = texts(file, 'x: {first text} {{{0}}}', 'It is {label}.', NAMES)
  assert got == [('x: a{b} {z}', 'It is positive.')]


def test_labels_may_be_numbers_names_or_unknown(tmp_path):
  file = write(tmp_path / 'a.tsv', 'text\tlabel\na\t1\nb\tnegative\nc\t-1\n')
  got = [target for _, target in texts(file, names=NAMES)]
  assert got == ['positive', 'negative', '<unk>']


FORMATS = ('tsv', 'csv', 'jsonl')


def labels(tmp_path, values, names):
  """Reads labels from each format; returns the equal targets or messages."""
  found = []
  for suffix, mark in (('tsv', '\t'), ('csv', ','), ('jsonl', '')):
    lines = [f'text{mark}label', *(f'a{mark}{value}' for value in values)]
    if not mark:
      lines = [json.dumps({'text': 'a', 'label': value}) for value in values]
    file = write(tmp_path / f'a.{suffix}', '\n'.join(lines))
    try:
      found.append([target for _, target in texts(file, names=names)])
    except ValueError as error:
      found.append(
        [
          line.split(': ', 1)[1].replace("'", '')
          for line in str(error).splitlines()[1:]
        ]
      )
  assert found[0] == found[1] == found[2]
  return found[0]


@pytest.mark.parametrize(
  ('values', 'names', 'want'),
  [
    ([1.0, 0.0, -1.0], NAMES, ['positive', 'negative', '<unk>']),
    ([1, 0, ''], NAMES, ['positive', 'negative', '<unk>']),
    ([True, False], NAMES, ['positive', 'negative']),
    # If a label has a boolean's name, the boolean means that label.
    ([True, False], ['True', 'False'], ['True', 'False']),
    ([True, False], ['true', 'false'], ['true', 'false']),
    ([0, 1, 1.0], ['0', '1'], ['0', '1', '1']),
    # A dict maps the column's values to names.
    (
      [1, 2.0, '3'],
      {'1': 'bad', '2': 'so', '3': 'good'},
      ['bad', 'so', 'good'],
    ),
    ([-1, 0, 1], {'-1': 'bad', '0': 'so', '1': 'good'}, ['bad', 'so', 'good']),
    (
      ['entailment', 0, -1],
      ['entailment', 'other'],
      ['entailment'] * 2 + ['<unk>'],
    ),
  ],
)
def test_labels_are_read_by_one_rule_in_all_formats(
  tmp_path, values, names, want
):
  assert labels(tmp_path, values, names) == want


def test_a_number_that_is_another_labels_name_is_refused(tmp_path):
  said = labels(tmp_path, [1, 2, 3], ['1', '2', '3'])
  assert [m.split('.')[0] for m in said] == [
    'label 1 in column label is the name of a label and the number of 2',
    'label 2 in column label is the name of a label and the number of 3',
  ]
  said = labels(tmp_path, [1, 0, -1], ['-1', '0', '1'])
  assert len(said) == 3
  assert said[-1].startswith('label -1 in column label is the name of a label')
  assert 'the number of no label' in said[-1]
  said = labels(tmp_path, [7, 'x', 0.5], {'1': 'a', '2': 'b'})
  assert said[0] == (
    'unknown label 7 in column label, expected one of [1, 2], or -1 for none'
  )
  assert len(said) == 3


BAD = {
  'a.tsv': (
    b'text\tlabel\nok\t1\nshort\nok\t0\ntoo\tmany\t1\nb\xffd\t1\nok\t7\n',
    {3: '1 field, expected 2', 5: '3 fields', 6: 'not UTF-8', 7: "label '7'"},
  ),
  'a.csv': (
    b'text,label\nok,1\n"x\ny"\nb\xffd,1\nok,yes\n"open"x,1\nok,0\n',
    {3: '1 field, expected 2', 5: 'not UTF-8', 6: "label 'yes'", 7: 'not CSV'},
  ),
  'a.jsonl': (
    b'{"text": "ok", "label": 1}\n{"text": "x"}\n[1]\n{"text"\n'
    b'{"text": ["a"], "label": 0}\n{"text": "b\xffd", "label": 0}\n'
    b'{"text": null, "label": 0}\n{"text": "ok", "label": 0}\n'
    b'{"text": "\\ud800", "label": 0}\n',
    {
      2: "no column 'label'",
      3: 'not a JSON object',
      4: 'not JSON',
      5: 'is a list',
      6: 'not UTF-8',
      7: "column 'text' is null",
      9: 'is not Unicode',
    },
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_rows_are_all_named_by_file_and_line(tmp_path, name):
  content, wrong = BAD[name]
  file = write(tmp_path / name, content)
  with pytest.raises(ValueError, match=f'{len(wrong)} bad rows') as error:
    texts(file, names=NAMES)
  lines = str(error.value).splitlines()[1:]
  for number, message in wrong.items():
    (line,) = [x for x in lines if re.search(rf'a\.\w+:{number}[,:]', x)]
    assert message in line


def test_an_error_of_many_rows_is_told_once(tmp_path):
  rows = ''.join(f'row {i}\tnosuch\n' for i in range(30))
  file = write(tmp_path / 'a.tsv', f'text\tlabel\n{rows}last\t7\n')
  with pytest.raises(
    ValueError, match=r'^31 bad rows, and train has no good'
  ) as error:
    texts(file, names=NAMES)
  first, second = str(error.value).splitlines()[1:]
  assert first.startswith(f'  {file}:2, {file}:3, ')
  assert f"{file}:9 and 22 other rows: unknown label 'nosuch'" in first
  assert second.startswith(f"  {file}:32: unknown label '7'")


@pytest.mark.parametrize('name', BAD)
def test_bad_rows_are_counted_and_listed_if_skipped(tmp_path, name, caplog):
  content, wrong = BAD[name]
  file = write(tmp_path / name, content)
  with caplog.at_level('WARNING', 'absl'):
    got = texts(file, names=NAMES, skip=True)
  assert [text for text, _ in got] == ['ok', 'ok']
  assert f'left out {len(wrong)} bad rows:' in caplog.text
  for number in wrong:
    assert re.search(rf'{name}:{number}[,:]', caplog.text)


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('a.jsonl', b'\xef\xbb\xbf{"text": "a", "label": 1}\n'),
    ('a.TSV', b'text\tlabel\na\t1\n'),
    ('a.tsv', b'text\tlabel\ra\t1\r'),
    ('a.csv', b'text,label\ra,1\r'),
    ('a.csv', b'text;label\na;1\n'),
    ('a.csv', b'text\tlabel\n"a"\t1\n'),
    ('a.csv.gz', gzip.compress(b'text,label\na,1\n', mtime=0)),
    ('a.JSONL.GZ', gzip.compress(b'{"text": "a", "label": "1"}', mtime=0)),
    ('100%d.tsv', b'text\tlabel\na\t1\n'),
  ],
)
def test_files_as_other_programs_write_them(tmp_path, name, content):
  assert texts(write(tmp_path / name, content)) == [('a', '1')]
  assert texts(f'file://{tmp_path / name}') == [('a', '1')]


def test_a_csv_field_may_be_long(tmp_path):
  words = 'x ' * 80_000
  file = write(tmp_path / 'a.csv', f'text,label\n{words},1\n')
  assert texts(file) == [(words, '1')]


def test_an_open_quote_takes_no_other_row_with_it(tmp_path, caplog):
  rows = [f'row {i},{i % 2}' for i in range(50)]
  content = '\n'.join(['text,label', 'good,1', '"bad,0', *rows])
  file = write(tmp_path / 'a.csv', content)
  with pytest.raises(ValueError, match=r'1 bad row;.*\n.*a.csv:3: is not CSV'):
    texts(file)
  with caplog.at_level('WARNING', 'absl'):
    got = texts(file, skip=True)
  assert [f'{text},{label}' for text, label in got] == ['good,1', *rows]
  assert 'left out 1 bad row:' in caplog.text
  assert 'a quote that opens on this line is never closed' in caplog.text


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ('{"text": null, "label": 1}', "column 'text' is null"),
    ('{"text": NaN, "label": 1}', "column 'text' is nan"),
    ('{"text": 1e999, "label": 1}', "column 'text' is inf"),
    ('{"text": "a", "label": %s}' % ('9' * 5000), 'is not JSON: Exceeds'),
    ('[' * 100_000, 'is nested too deeply'),
    ('{"text": "a\\u0000", "label": 7}', 'character 2 is NUL'),
  ],
)
def test_what_json_has_that_is_no_text_is_named(tmp_path, record, message):
  file = write(tmp_path / 'a.jsonl', record)
  with pytest.raises(ValueError, match=f'a.jsonl:1: .*{message}'):
    texts(file, names=NAMES)


def test_a_file_of_very_many_columns_is_no_hang(tmp_path):
  names = '\t'.join(f'c{i}' for i in range(100_000))
  file = write(tmp_path / 'a.tsv', f'{names}\na\n')
  with pytest.raises(ValueError, match=r'1 field, expected 100000: c0, c1'):
    texts(file)


def test_a_pipe_is_no_data(tmp_path):
  os.mkfifo(tmp_path / 'a.tsv')
  with pytest.raises(ValueError, match='is a pipe; expected a file'):
    texts(str(tmp_path / 'a.tsv'))
  with pytest.raises(ValueError, match='ends in one of'):
    texts('/dev/zero')


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
  file = write(tmp_path / 'a.tsv', 'sentence\tlabel\na\t1\n')
  with pytest.raises(ValueError, match="no column 'text', it has: sentence"):
    texts(file)


@pytest.mark.parametrize(
  ('header', 'said'),
  [
    ('Text\tlabel', 'did you mean Text'),
    ('te xt \tlabel', "it has: 'te xt ', label"),
    ('\ufefftext\tlabel', r"it has: '\\ufefftext', label"),
    ('text|label', r"separated by '\|', not by tabs or ,"),
  ],
)
def test_a_column_that_looks_like_the_right_one_is_shown(
  tmp_path, header, said
):
  data = f'\ufeff{header}\na{"" if "|" in header else "	"}1\n'
  with pytest.raises(ValueError, match=said):
    texts(write(tmp_path / 'a.tsv', data))


@pytest.mark.parametrize(
  ('label', 'said'),
  [
    ('No', "'No' and 'no' look alike"),
    (' no', "' no' and 'no' look alike"),
    ('n\u200bo', r"'n\\u200bo' and 'no' look alike"),
    ('cafe\u0301', r"'cafe\\u0301' and 'caf\\xe9' look alike"),
    ('1e0', "unknown label '1e0'"),
    ('1e-400', "unknown label '1e-400'"),
    ('\u0661', 'unknown label'),
  ],
)
def test_a_label_that_is_nearly_right_is_refused(tmp_path, label, said):
  file = write(tmp_path / 'a.tsv', f'text\tlabel\na\t{label}\n')
  with pytest.raises(ValueError, match=said):
    texts(file, names=['no', 'caf\xe9'])


def test_numbers_that_are_names_are_read_by_their_value():
  """1 is the name '1.0', not the label number 1."""

  def targets(value, names):
    rows = {'train': [('a', value)]}
    task = files.from_rows(rows, label_names=names)
    return task.texts('train')['targets']

  assert targets(3, ['1.0', '2.0', '3.0']) == ['3.0']
  assert targets('04', ['2', '3', '4']) == ['4']
  with pytest.raises(ValueError, match=r"no name .* number of '1', which is"):
    targets(0, ['1', '2', '3'])
  with pytest.raises(ValueError, match='the name of a label and the number'):
    targets(1, ['1.0', '2.0'])


# Without the time, because the names of tests must not change.
GZIPPED = gzip.compress(b'text', mtime=0)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.tsv', b'', 'is empty'),
    ('a.tsv', b'text\tlabel\n', 'no good rows'),
    ('a.tsv', b'text\ttext\na\tb\n', 'more than once'),
    ('a.tsv', b't\xffxt\tlabel\na\tb\n', 'a.tsv:1.*not UTF-8'),
    ('a.txt', b'a', 'ends in one of .tsv, .csv, .jsonl'),
    ('a.tsv', b'text,label\na,1\n', "seem to be separated by ','"),
    ('a.tsv', b't\0\tlabel\na\t1\n', 'is NUL; this is not text'),
    ('a.tsv', 'text\tlabel\na\t1'.encode('utf-16'), 'save it as UTF-8'),
    ('a.tsv.gz', b'text', 'not a gzip file'),
    ('a.tsv', 'text\tlabel\na\t1'.encode('utf-16-le'), 'UTF-16 or UTF-32'),
    ('a.tsv', 'text\tlabel\na\t1'.encode('utf-32'), 'UTF-16 or UTF-32'),
    ('a.tsv', GZIPPED, 'compressed with gzip'),
    ('a.tsv.gz', gzip.compress(GZIPPED, mtime=0), 'ends? in .gz, once'),
    ('a.csv', b'PK\x03\x04\x14\0', 'a zip archive, or .xlsx'),
    ('a.csv', b'PAR1\x15\x04', 'a Parquet file'),
    ('a.csv', b'<!DOCTYPE html><html>', 'a web page'),
    ('a.jsonl', b'{"text": "a", "label": 1, "label": 0}\n', 'label more than'),
    (None, b'', 'does not exist'),
  ],
)
def test_files_that_are_no_data_are_errors(tmp_path, name, content, message):
  file = str(tmp_path / 'none.tsv')
  if name:
    file = write(tmp_path / name, content)
  with pytest.raises(ValueError, match=message):
    texts(file)


def test_an_object_that_is_no_row_is_told_in_one_line():
  class Table:
    def __repr__(self):
      return '  text  label\n0    a      1'

  task = files.from_rows({'train': [Table()]})
  with pytest.raises(ValueError, match=r': text label 0 a 1 is not a row'):
    task.texts('train')


def test_files_without_rows_are_named(tmp_path):
  file = write(tmp_path / 'a.tsv', 'text\tlabel\n')
  task = files.from_files({'train': file}, '{text}', '{label}')
  with pytest.raises(
    ValueError, match=r"'train'\] has '.*a.tsv', with no rows"
  ):
    task.texts('train')


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'files': {}}, 'TASK_FILES'),
    ({'files': 'train.tsv'}, 'TASK_FILES'),
    ({'inputs': 'a {'}, 'INPUTS'),
    ({'inputs': 'a {}'}, 'expected a column in every pair of braces'),
    ({'targets': '{a} {b}', 'label_names': NAMES}, 'expected one column'),
    ({'label_names': ['one']}, 'at least two'),
    ({'metrics': ['acuracy']}, 'did you mean accuracy'),
    ({'metrics': ['pearson', 'rouge']}, 'of one kind'),
    ({'metrics': ['accuracy']}, 'need each other'),
    ({'metrics': ['rouge'], 'label_names': NAMES}, 'need each other'),
    ({'metrics': ['rouge', 'rouge']}, "name .'rouge'. only once"),
    ({'metrics': 'rouge'}, 'expected a list of names'),
    ({'rank': True}, 'no LABEL_NAMES'),
    ({'rank': 'yes'}, 'RANK is .yes., expected True or False'),
    ({'skip_bad_rows': None}, 'SKIP_BAD_ROWS is None'),
    ({'inputs': '{a:.3}'}, r'without a format instead of {a:.3}'),
    ({'inputs': '{a!r}'}, r'instead of {a!r}'),
    ({'inputs': None}, 'INPUTS is None, expected a text'),
    ({'inputs': 'a'}, "INPUTS is 'a', which is the same for all rows"),
    ({'targets': ''}, "TARGETS is '', which is the same for all rows"),
    ({'files': None}, 'TASK_FILES is None'),
    ({'files': {'train': 3}}, "TASK_FILES has 'train': 3, expected"),
    ({'files': {1: 'a.tsv'}}, "TASK_FILES has 1: 'a.tsv', expected"),
    ({'files': {'train': [['a.tsv']]}}, 'expected the name of a split'),
    ({'label_names': 'ab'}, 'LABEL_NAMES is .ab., expected a list'),
    ({'label_names': [0, 1]}, 'expected a list of texts'),
    ({'label_names': ['<unk>', 'b']}, 'means that there is no label'),
    ({'name': ''}, "TASK_NAME is ''"),
    ({'name': '..'}, "TASK_NAME is '..'"),
    ({'name': 'a/b'}, "TASK_NAME is 'a/b'"),
    ({'name': 'a' * 201}, 'up to 200 letters'),
  ],
)
def test_settings_that_do_not_fit_are_errors(settings, message):
  good = {'files': {'train': 'a.tsv'}, 'inputs': '{a}', 'targets': '{b}'}
  with pytest.raises(ValueError, match=message):
    files.from_files(**{**good, **settings})


def as_seqio(task):
  """Registers the same task with SeqIO."""
  from ptune.tasks import seqio_texts

  return seqio_task.load(seqio_texts.register(task))


@pytest.fixture
def sentiment(tmp_path):
  """Returns a task with 40 training rows and 6 validation rows."""
  rows = [('good film', 1), ('bad film', 0)]
  for split, count in (('train', 20), ('validation', 3)):
    lines = [
      f'{i} {text}\t{label}' for i in range(count) for text, label in rows
    ]
    write(tmp_path / f'{split}.tsv', '\n'.join(['text\tlabel', *lines]))
  return {
    'files': {
      'train': str(tmp_path / 'tr*.tsv'),
      'validation': [str(tmp_path / 'validation.tsv')],
    },
    'inputs': 'text: {text}',
    'targets': '{label}',
    'label_names': NAMES,
  }


def test_the_task_batches_and_knows_its_labels(sentiment):
  task = files.from_files(**sentiment)
  assert seqio_task.load(task) is task
  assert sorted(task.splits) == ['train', 'validation']
  batches = data.Batches(task, LENGTHS, 8)
  assert batches.num_examples == 40
  assert batches(3)['encoder_input_tokens'].shape == (8, 32)
  assert seqio_task.distinct_targets(task, LENGTHS) == NAMES
  theirs = as_seqio(task)
  assert seqio_task.distinct_targets(theirs, LENGTHS) == NAMES
  with mock.patch.object(seqio_task, 'LABELLED_ROWS', 1):
    assert len(seqio_task.distinct_targets(theirs, LENGTHS)) == 1
  first, _ = next(seqio_task.examples(task, LENGTHS, 'validation'))
  assert first == {'inputs': 'text: 0 good film', 'targets': 'positive'}


@pytest.mark.parametrize('bucket_multiple', [None, 8])
def test_batches_are_those_of_the_same_task_in_seqio(
  sentiment, bucket_multiple
):
  # Text targets, because batches of a classification have labels of all
  # lengths.
  texts = {'label_names': None, 'targets': '{label} {text}'}
  task = files.from_files(**{**sentiment, **texts})
  how = {'seed': 3, 'bucket_multiple': bucket_multiple}
  lengths = {'inputs': 5, 'targets': 8}  # Trims some.
  ours = data.Batches(task, lengths, 12, **how)
  theirs = data.Batches(as_seqio(task), lengths, 12, **how)
  assert ours.trimmed == theirs.trimmed != {'inputs': 0, 'targets': 0}
  assert ours.shapes == theirs.shapes
  for step in (0, 3, 7):
    left, right = ours(step), theirs(step)
    assert left.keys() == right.keys()
    for name in left:
      np.testing.assert_array_equal(left[name], right[name])
      assert left[name].dtype == right[name].dtype


def test_rows_of_python_make_the_batches_of_the_same_files(sentiment):
  rows = {'train': [], 'validation': []}
  for i in range(20):
    rows['train'] += [
      {'text': f'{i} good film', 'label': 1},
      {'text': f'{i} bad film', 'label': False},
    ]
  rest = {k: v for k, v in sentiment.items() if k != 'files'}
  ours = data.Batches(files.from_rows(rows, **rest), LENGTHS, 8, seed=1)
  theirs = data.Batches(files.from_files(**sentiment), LENGTHS, 8, seed=1)
  pairs = [
    (f'text: {row["text"]}', NAMES[row['label']]) for row in rows['train']
  ]
  task = files.from_rows({'train': pairs}, label_names=NAMES)
  again = data.Batches(task, LENGTHS, 8, seed=1)
  for step in (0, 6):
    for name, values in theirs(step).items():
      np.testing.assert_array_equal(ours(step)[name], values)
      np.testing.assert_array_equal(again(step)[name], values)


def test_rows_without_a_label_are_not_trained_on_and_counted(tmp_path, caplog):
  rows = [('a', 'yes'), ('b', ''), ('c', -1), ('d', None), ('e', 'no')]
  splits = {'train': rows, 'validation': rows, 'none': rows[1:4]}
  task = files.from_rows(splits, label_names=['no', 'yes'])
  with caplog.at_level('WARNING', 'absl'):
    batches = data.Batches(task, LENGTHS, 2)
  assert '3 of 5 rows have no label, and are not trained on' in caplog.text
  assert batches.num_examples == 2
  assert seqio_task.distinct_targets(task, LENGTHS) == ['no', 'yes']
  # Such rows are predicted, but no metric counts them.
  found = [t['targets'] for t, _ in seqio_task.examples(task, LENGTHS, 'train')]
  assert found == ['yes', '<unk>', '<unk>', '<unk>', 'no']
  targets = [task.postprocess_fn(t, is_target=True) for t in found]
  accuracy = task.metric_fns[0]
  assert accuracy(targets, [1, 1, 0, 0, 1]) == {'accuracy': 50}
  with pytest.raises(ValueError, match='none of the 3 rows has a label'):
    data.Batches(task, LENGTHS, 2, split='none')


def test_labels_that_the_vocabulary_writes_in_another_way(caplog):
  rows = {'train': [('a', '<=50K'), ('b', 'two  blanks'), ('c', 'ﬁ')]}
  names = ['<=50K', 'two  blanks', 'ﬁ', 'plain']
  task = files.from_rows(rows, label_names=names)
  with caplog.at_level('WARNING', 'absl'):
    seqio_task.check(task, LENGTHS, 'train')
  assert "'two  blanks': 'two blanks'" in caplog.text
  assert 'plain' not in caplog.text
  vocab = task.vocabulary
  for i, name in enumerate(names):
    # The output of a model that has memorised the target.
    said = vocab.decode([*vocab.encode(name), 1])
    assert task.postprocess_fn(said, is_target=False) == i
    assert task.postprocess_fn(name, is_target=True) == i
  assert (vocab.decode(vocab.encode(names[2])), said) == ('fi', 'plain')


def test_a_text_that_the_vocabulary_writes_in_another_way_can_be_matched():
  task = files.from_rows({'train': [('a', 'two  blanks {x}')]})
  vocab, target = task.vocabulary, 'two  blanks {x}'
  said = task.postprocess_fn(vocab.decode(vocab.encode(target)))
  (metric,) = task.metric_fns
  assert said != target
  want = task.postprocess_fn(target, is_target=True)
  assert metric([want, want], [said, 'other']) == {'exact_match': 50}


def test_labels_that_become_the_same_or_are_cut_are_refused():
  rows = {'train': [('a', 'x  y')]}
  task = files.from_rows(rows, label_names=['x  y', 'x y', 'z'])
  with pytest.raises(ValueError, match=r"cannot distinguish.*'x  y', 'x y'"):
    seqio_task.check(task, LENGTHS, 'train')
  task = files.from_rows(rows, label_names=['x  y', 'a rather long label'])
  size = len(task.vocabulary.encode('a rather long label')) + 1
  lengths = {'inputs': 8, 'targets': size}
  seqio_task.check(task, lengths, 'train')
  lengths['targets'] -= 1
  with pytest.raises(ValueError, match=rf'do not fit .* they need {size} tok'):
    seqio_task.check(task, lengths, 'train')


def test_scores_are_those_of_metrics(sentiment):
  names = ['accuracy', 'f1', 'macro_f1', 'matthews']
  task = files.from_files(**sentiment, metrics=names)
  outputs = ['positive', 'positive', 'film']
  targets = [task.postprocess_fn(t, is_target=True) for t in NAMES + NAMES[1:]]
  predictions = [task.postprocess_fn(t, is_target=False) for t in outputs]
  scores = {}
  for metric in task.metric_fns:
    scores |= metric(targets, predictions)
  assert scores == {
    'accuracy': pytest.approx(100 / 3),
    'f1': pytest.approx(50),
    'mean_2class_f1': pytest.approx(25),
    'matthews_corrcoef': pytest.approx(-50),
    'invalid': pytest.approx(100 / 3),
  }


def test_numbers_and_answers_have_their_metrics(tmp_path):
  file = write(tmp_path / 'a.tsv', 'a\tb\nx\t1.5\n')
  common = {'files': {'train': file}, 'inputs': '{a}', 'targets': '{b}'}
  task = files.from_files(**common, metrics=['pearson', 'spearman'])
  assert task.postprocess_fn('2.5', is_target=False) == 2.5
  task = files.from_files(**common, metrics=['squad'])
  assert task.postprocess_fn('x', is_target=True) == ['x']


def test_seqio_reads_the_same_rows_in_an_order_of_the_seed(sentiment):
  task = as_seqio(files.from_files(**sentiment))

  def order(seed):
    rows = task.get_dataset(LENGTHS, 'train', shuffle=True, seed=seed)
    return [r['inputs_pretokenized'] for r in rows.as_numpy_iterator()]

  assert order(1) == order(1) != order(2)
  assert sorted(order(1)) == sorted(order(2))


def test_ranking_has_every_label_of_a_row_but_to_train_on(sentiment):
  task = as_seqio(files.from_files(**sentiment, rank=True))
  train = list(seqio_task.examples(task, LENGTHS, 'train'))
  assert len(train) == 40
  rows = list(
    task.get_dataset(LENGTHS, 'validation', shuffle=False).as_numpy_iterator()
  )
  assert [r['targets_pretokenized'].decode() for r in rows] == NAMES * 6
  targets = [
    task.postprocess_fn(
      r['targets_pretokenized'].decode(), example=r, is_target=True
    )
    for r in rows
  ]
  # The first of each pair of rows is right, the second wrong.
  scores = [0.0, 1.0] * 6
  (metric,) = task.metric_fns
  assert metric(targets, scores) == {'accuracy': 50.0}
  # If EVAL_STEPS cuts off a part of a row, the row does not count.
  assert metric(targets[:3], scores[:3]) == {'accuracy': 100.0}


SHARED = pathlib.Path(__file__).parents[2] / 'shared' / 'data'


@pytest.mark.parametrize('name', ['sst2', 'mrpc', 'rte', 'customer_reviews'])
def test_real_data_has_no_bad_rows(name):
  folder = SHARED / name
  if not folder.is_dir():
    pytest.skip(f'the data is not at {folder}')
  for split in ('train', 'validation', 'test'):
    file = str(folder / f'{split}.tsv')
    rows = texts(file, '{label}', '{label}', ['a', 'b'])
    lines = pathlib.Path(file).read_text().splitlines()
    assert len(rows) == len([line for line in lines if line]) - 1


def test_a_hugging_face_data_set_is_a_task(tmp_path):
  datasets = pytest.importorskip('datasets')
  from ptune.tasks import hugging_face

  rows = {'text': ['a', 'b', 'c'], 'label': [1, 0, 1]}
  part = datasets.Dataset.from_dict(rows)
  datasets.DatasetDict(train=part, test=part).save_to_disk(str(tmp_path))
  task = hugging_face.from_hugging_face(
    str(tmp_path),
    'x: {text}',
    '{label}',
    splits={'train': 'train', 'validation': 'test', 'other': 'none'},
    label_names=NAMES,
  )
  got = [t for t, _ in seqio_task.examples(task, LENGTHS, 'validation')]
  assert got[0] == {'inputs': 'x: a', 'targets': 'positive'}
  assert len(got) == 3
  with pytest.raises(ValueError, match="no split 'none', it has"):
    list(seqio_task.examples(task, LENGTHS, 'other'))
  # A data set with a single split, in slices.
  part.save_to_disk(str(tmp_path / 'one'))
  task = hugging_face.from_hugging_face(
    str(tmp_path / 'one'),
    '{text}',
    '{label}',
    splits={'train': 'train[:2]', 'validation': 'train[2:]'},
    name='a_slice',
  )
  for split, want in (('train', ['a', 'b']), ('validation', ['c'])):
    rows = seqio_task.examples(task, LENGTHS, split)
    assert [text['inputs'] for text, _ in rows] == want


def test_gin_files_and_flags_alone_make_a_task(sentiment, capsys):
  import gin
  from ptune.tools import list_tasks

  arguments = ['show', '--gin_file=tasks/from_files.gin', '--examples=1']
  arguments += [
    f'--gin.TASK_FILES={sentiment["files"]}',
    "--gin.INPUTS='text: {text}'",
    "--gin.TARGETS='{label}'",
    f'--gin.LABEL_NAMES={NAMES}',
    "--gin.METRICS=['accuracy', 'f1']",
    "--gin.TASK_NAME='mine'",
  ]
  try:
    assert list_tasks.main(arguments) == 0
  finally:
    gin.clear_config()
  out = capsys.readouterr().out
  assert out.startswith('mine: your rows')
  assert 'accuracy, f1, invalid' in out
  assert "'text: 0 good film'" in out


def test_rows_that_are_seldom_meant_are_counted(tmp_path, caplog):
  rows = tmp_path / 'rows.tsv'
  rows.write_text('a\tb\nso good\tyes\n \tno\nso\x1b bad\tno\n\tyes\n')

  def texts(given, targets='{b}', labels=None):
    caplog.clear()
    if isinstance(given, list):
      task = files.from_rows({'train': given}, 'x: {a}', targets, labels)
    else:
      task = files.from_files({'train': given}, 'x: {a}', targets, labels)
    task.texts('train')
    return [r.getMessage().replace(str(rows), 'F') for r in caplog.records]

  assert texts(str(rows)) == [
    'train: 2 of 4 rows have inputs without any text: F:3, F:5',
    'train: 1 of 4 rows has characters in the inputs that are no text: F:4,'
    " '\\x1b'",
  ]
  blank = [{'a': 'a', 'b': ' '}, {'a': 'x:', 'b': 'yes'}]
  assert texts(blank) == [
    'train: 1 of 2 rows has targets without any text: train[0]'
  ]
  blank[0]['b'] = ''  # The row has no label, which is said elsewhere.
  assert texts(blank, labels=['no', 'yes']) == []
  for row in ({'a': 'a\0', 'b': 'b'}, {'a': 'a', 'b': '\0'}):
    with pytest.raises(UserError, match=r'train\[0\]: column .* is NUL; this'):
      texts([row])


def test_a_column_with_invisible_characters_is_shown_in_quotes():
  for name in (' s', 's\r', '\ufeffs'):
    task = files.from_rows({'train': [{name: 'a', 'b': 'b'}]}, '{s}', '{b}')
    with pytest.raises(UserError, match='did you mean') as error:
      task.texts('train')
    assert str(error.value).endswith(f'did you mean {name!r}?')


def test_a_label_is_read_once(monkeypatch):
  read = []
  original = templates._label
  monkeypatch.setattr(
    templates, '_label', lambda *args: read.append(0) or original(*args)
  )
  rows = [{'a': 'a', 'b': str(i % 2)} for i in range(9)]
  task = files.from_rows({'train': rows}, '{a}', '{b}', ['no', 'yes'])
  assert task.texts('train')['targets'] == ['no', 'yes'] * 4 + ['no']
  assert len(read) == 2


def test_labels_that_no_row_has_are_told(caplog):
  rows = [{'a': 'a', 'b': 'yes'}, {'a': 'b', 'b': 'yes'}]
  names = ['yes', *(f'no{i}' for i in range(12))]
  task = files.from_rows({'train': rows, 'dev': rows}, '{a}', '{b}', names)
  data.Batches(task, LENGTHS, 2)
  said = [r.getMessage() for r in caplog.records if 'no row has' in r.msg]
  assert said == [
    "from_rows:train: no row has the label 'no0', 'no1', 'no2', 'no3', 'no4',"
    " 'no5', 'no6', 'no7', 'no8', 'no9' and 2 others."
  ]
