"""The inputs of a trained model (ptune/data/inputs.py)."""

import gzip
import io
import sys

import pytest

from ptune.data.inputs import read_inputs
from ptune.errors import UserError
from ptune.tasks import files
from ptune.tasks.texts import TextTask

TASK = files.from_rows(
  {'train': [{'title': 'a', 'body': 'b', 'stars': 1}]},
  inputs='{title}: {body}',
  targets='It is {stars}.',
  label_names=['bad', 'good'],
)
PLAIN = TextTask('plain', {})  # Like a SeqIO task: no templates.


def write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def texts(file, task=TASK, score=False):
  return [text for _, text, _ in read_inputs(file, task, score)]


def test_a_row_has_the_columns_that_inputs_names(tmp_path):
  csv = write(
    tmp_path / 'a.csv', 'title,body,stars\nx,"two\nlines",1\ny,z,bad\n'
  )
  want = [{'inputs': 'x: two\nlines'}, {'inputs': 'y: z'}]
  assert texts(csv) == want
  targets = ['It is good.', 'It is bad.']
  scored = [
    {**row, 'targets': text} for row, text in zip(want, targets, strict=True)
  ]
  assert texts(csv, score=True) == scored
  tsv = write(tmp_path / 'a.TSV.gz', gzip.compress(b'title\tbody\ny\tz\n'))
  assert texts(tsv) == want[1:]
  jsonl = write(tmp_path / 'a.jsonl', '{"title": "y", "body": "z"}')
  assert texts(jsonl) == want[1:]


@pytest.mark.parametrize('task', [TASK, PLAIN])
def test_or_inputs_and_targets_as_they_are(tmp_path, task):
  file = write(tmp_path / 'a.csv', 'inputs,targets,prompt\n{a},b,p\n')
  assert texts(file, task, score=True) == [{'inputs': '{a}', 'targets': 'b'}]
  assert texts(file, task) == [{'inputs': '{a}', 'targets': 'b'}]
  ((where, _, row),) = read_inputs(file, task, False)
  assert (where, row['prompt']) == (f'{file}:2', 'p')


def test_a_text_is_an_input_a_line_wherever_it_comes_from(
  tmp_path, monkeypatch
):
  content = b'\xef\xbb\xbfone, two\r\n\r\n"three\n'
  want = [{'inputs': 'one, two'}, {'inputs': '"three'}]
  assert texts(write(tmp_path / 'a.txt', content)) == want
  assert texts(write(tmp_path / 'a.gz', gzip.compress(content))) == want
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content)))
  found = read_inputs('-', TASK, False)
  assert [text for _, text, _ in found] == want
  assert [where for where, _, _ in found] == ['stdin:1', 'stdin:3']


def test_a_line_fills_the_only_column_of_the_template(tmp_path):
  rows = {'train': [{'title': 'a', 'stars': 1}]}
  how = {'inputs': 'review: {title}!', 'targets': '{stars}'}
  task = files.from_rows(rows, **how)
  file = write(tmp_path / 'a.txt', 'so good\n')
  assert texts(file, task) == [{'inputs': 'review: so good!'}]
  finished = write(tmp_path / 'a.jsonl', '{"inputs": "review: so good!"}')
  assert texts(finished, task) == texts(file, task)


def test_all_bad_rows_are_named(tmp_path):
  file = write(
    tmp_path / 'a.jsonl',
    '{"title": "a"}\n{"title": "a", "body": null}\n{"inputs": 1}\n[]\n'
    '{"inputs": "a"}\n',
  )
  with pytest.raises(ValueError, match='4 bad rows') as error:
    texts(file)
  lines = str(error.value).splitlines()[1:]
  for line, (number, message) in zip(
    lines,
    {
      1: "no column 'body', it has: title",
      2: "column 'body' is null",
      3: 'inputs must be a string',
      4: 'not a JSON object',
    }.items(),
    strict=True,
  ):
    assert line.startswith(f'  {file}:{number}: ')
    assert message in line
  with pytest.raises(ValueError, match=r'5: no column .stars'):
    texts(file, score=True)
  file = write(tmp_path / 'b.csv', 'title,body,stars\na,b,\n')
  with pytest.raises(ValueError, match='2: it has no label to score'):
    texts(file, score=True)
  with pytest.raises(ValueError, match=r'INFER_FILE must be a .jsonl file'):
    texts('-', score=True)
  with pytest.raises(FileNotFoundError, match='no INFER_FILE'):
    texts(str(tmp_path / 'none.csv'))


def test_inputs_that_are_seldom_meant_are_counted(tmp_path, caplog):
  file = tmp_path / 'a.txt'
  file.write_text('one\n\n \ntwo\x07\n')
  assert len(read_inputs(str(file), PLAIN, score=False)) == 2
  blank, odd = (r.getMessage().replace(str(file), 'F') for r in caplog.records)
  assert blank == 'F: 2 blank lines without an answer: F:2, F:3'
  assert odd == (
    "F: 1 of 2 rows has characters in the inputs that are no text: F:4, '\\x07'"
  )
  file = tmp_path / 'a.jsonl'
  file.write_text('{"inputs": "\\u0000"}\n')
  with pytest.raises(UserError, match='is NUL; this is not text'):
    read_inputs(str(file), PLAIN, score=False)
