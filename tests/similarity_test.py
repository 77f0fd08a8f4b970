"""Which prompts are similar, and which are retrieved for a target."""

import csv
import json
import pathlib
import shutil

import numpy as np
import pytest

from ptune import cli
from ptune.analysis import similarity
from ptune.methods import prompt_init

RNG = np.random.default_rng(0)
A = RNG.normal(size=(5, 8)).astype(np.float32)
B = RNG.normal(size=(3, 8)).astype(np.float32)


def save(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  np.save(path, array)
  return str(path)


def cosine(a, b):
  return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def test_both_measures_are_those_of_the_paper():
  found = similarity.similarities({'a': A, 'b': B})
  of_means = cosine(A.mean(axis=0), B.mean(axis=0))
  of_pairs = np.mean([[cosine(a, b) for b in B] for a in A])
  for measure, expected in zip(
    similarity.MEASURES, (of_means, of_pairs), strict=True
  ):
    matrix = found[measure]
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-7)
    assert matrix[0, 1] == pytest.approx(expected, abs=1e-6)
  np.testing.assert_allclose(np.diag(found['average_tokens']), 1, atol=1e-6)


def test_neither_order_nor_scale_of_the_rows_nor_names_matter():
  first = similarity.similarities({'a': A, 'b': B})
  mixed = similarity.similarities({'x': 3 * A[::-1], 'y': B})
  for measure in similarity.MEASURES:
    np.testing.assert_allclose(first[measure], mixed[measure], atol=1e-6)


def test_names_are_as_short_as_tells_them_apart():
  run = '/runs/{}/prompts/{}.npy'
  names = lambda *files: similarity.names(list(files))
  assert names(run.format('sst2', 'best'), '/x/mnli.npy') == ['sst2', 'mnli']
  assert names('/x/a.npy', '/y/a.npy') == ['x/a', 'y/a']
  assert names(run.format('a', 'step_4'), run.format('a', 'step_8')) == [
    'step_4',
    'step_8',
  ]
  with pytest.raises(ValueError, match=r'named twice: /x/a\.npy'):
    names('/x/a.npy', '/x/a.npy')


def test_all_files_tell_the_same(tmp_path, capsys):
  files = [save(tmp_path / 'a.npy', A), save(tmp_path / 'b.npy', B)]
  output = tmp_path / 'out'
  assert cli.main(['similarity', *files, '--json', f'--output={output}']) == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed == json.loads((output / 'similarity.json').read_text())
  expected = similarity.similarities({'a': A, 'b': B})
  for measure in similarity.MEASURES:
    np.testing.assert_allclose(printed[measure], expected[measure], atol=1e-7)
    head, *rows = csv.reader(
      (output / f'{measure}.csv').read_text().splitlines()
    )
    assert head == ['', 'a', 'b'] and [row[0] for row in rows] == ['a', 'b']
    values = np.array([row[1:] for row in rows], float)
    np.testing.assert_allclose(values, expected[measure], atol=1e-6)
  assert (output / 'similarity.png').read_bytes()[:4] == b'\x89PNG'
  assert '</svg>' in (output / 'similarity.svg').read_text()
  assert len(list(output.iterdir())) == 5


@pytest.fixture
def library(tmp_path):
  """Writes a run similar to A, a file of B, a wider prompt and other files."""
  folder = tmp_path / 'library'
  save(folder / 'run' / 'prompts' / 'best.npy', A + 0.1)
  save(folder / 'b.npy', B)
  save(folder / 'wide.npy', np.ones((2, 16), np.float32))
  (folder / 'notes.txt').write_text('x')
  (folder / 'empty').mkdir()
  return folder


def test_the_prompts_most_like_a_target_are_found(library):
  target = str(library / 'b.npy')
  found = similarity.retrieve(target, library, 5, 'average_tokens')
  assert [pathlib.Path(f['prompt']).parts[-3] for f in found] == ['run']
  copy = shutil.copy(target, library.parent / 'copy.npy')
  for measure in similarity.MEASURES:
    found = similarity.retrieve(copy, library, 5, measure)
    assert found[0]['prompt'] == target and len(found) == 2
    assert found[0][measure] > found[1][measure]
  assert len(similarity.retrieve(copy, library, 1, 'per_token')) == 1


def test_what_is_found_can_be_started_from(library, capsys):
  flags = [f'--directory={library}', '--json']
  assert cli.main(['similarity', str(library / 'b.npy'), *flags]) == 0
  files = [f['prompt'] for f in json.loads(capsys.readouterr().out)]
  init = prompt_init.from_prompts(files)
  value = init(RNG, A.shape, prompt_init.Base(None, None, None))
  np.testing.assert_allclose(value, A + 0.1, atol=1e-6)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['{}/b.npy'], 'cannot be compared with itself'),
    (['{}/b.npy', '{}/wide.npy'], 'only if their widths are equal'),
    (['{}/b.npy', '--directory={}/empty'], 'has no prompts'),
    (['{}/wide.npy', '--directory={}'], 'no other prompt of width 16'),
    (['{}/b.npy', '--directory={}/no'], 'is not a directory'),
    (['{}/b.npy', '--directory={}', '--top=0'], '--top is 0'),
    (['{}/b.npy', '{}/run', '--directory={}'], 'takes one prompt'),
  ],
)
def test_bad_input_is_told(library, arguments, message, capsys):
  given = [a.format(library) for a in arguments]
  assert cli.main(['similarity', *given]) == 2
  assert message in capsys.readouterr().err
