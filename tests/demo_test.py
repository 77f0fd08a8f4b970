"""`ptune demo`, and the model that comes with ptune."""

import contextlib
import io
import json
import re
import signal

import numpy as np
import pytest
import rich.console

import ptune
from ptune import pretrained
from ptune.convert import open_checkpoint, restore
from ptune.convert.fingerprint import of_params
from ptune.methods import full
from ptune.model import parameters, partitioning
from ptune.tasks import generated_text
from ptune.tasks.rows import read_rows
from ptune.tools import demo
from ptune.training import loop
from tests import tiny
from tests.imports_test import loaded_by

# Enough rows for tests that do not check the accuracy.
FEW = {'TRAIN_ROWS': 200, 'VALIDATION_ROWS': 200, 'TEST_ROWS': 200}


@pytest.fixture(autouse=True, scope='module')
def one_device():
  with tiny.one_device():
    yield


@contextlib.contextmanager
def few_rows():
  with pytest.MonkeyPatch.context() as patch:
    for name, count in FEW.items():
      patch.setattr(demo, name, count)
    yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Runs a demo of few steps; returns its directory, summary and output."""
  directory = tmp_path_factory.mktemp('demo')
  with few_rows():
    return directory, *told(directory, steps=2)


def told(directory, **how):
  console = rich.console.Console(file=io.StringIO(), width=100)
  summary = demo.demo(directory, console=console, **how)
  return summary, console.file.getvalue()


def test_a_demo_leaves_its_files_and_nothing_else(run):
  directory, summary, _ = run
  assert sorted(p.name for p in directory.iterdir()) == sorted(demo.FILES)
  assert json.loads((directory / 'summary.json').read_text()) == summary
  for name in ('sentiment', 'topics'):
    saved = np.load(directory / f'{name}.npy')
    assert saved.shape == (demo.PROMPT_LENGTH, 96)
    assert saved.dtype == np.float32
  words = (directory / 'words.txt').read_text().splitlines()
  assert len(words) == 2 * demo.PROMPT_LENGTH
  assert (directory / 'curves.png').read_bytes()[:4] == b'\x89PNG'


def test_a_curve_has_the_scores_of_the_validation_rows_alone():
  tuned = ptune.tune(
    'ptune://tiny',
    [('so good', 'yes'), ('so bad', 'no')] * 4,
    validation=[('good', 'yes'), ('bad', 'no')],
    labels=['no', 'yes'],
    prompt_length=2,
    batch_size=8,
    steps=2,
    eval_period=1,
  )
  assert {record['split'] for record in tuned.history} == {
    'train',
    'validation',
  }
  curve = demo.Learned(tuned, accuracy=0.0, seconds=0.0).curve()
  assert [step for step, _ in curve] == [1, 2]


def test_the_summary_has_what_is_compared(run):
  _, summary, _ = run
  for name in ('untrained', 'prompt', 'full', 'majority'):
    assert 0 <= summary[name] <= 1, name
  assert summary['majority'] == 0.5
  assert summary['untrained'] <= summary['majority']
  assert summary['prompt_bytes'] == 20 * 96 * 4
  weights = pretrained.directory('tiny') / 'model.safetensors'
  assert summary['model_bytes'] == weights.stat().st_size
  assert summary['seconds'] > 0


def test_a_demo_shows_answers_of_both_tasks_and_how_to_go_on(run):
  *_, text = run
  assert 'positive' in text and any(
    topic in text for topic in generated_text.TOPICS.values()
  )
  assert 'ptune train --base=ptune://tiny --train=' in text
  assert '--base=hf://google/flan-t5-base' in text


def test_a_demo_leaves_the_reviews_as_files_to_train_on(run):
  directory, *_ = run
  with few_rows():
    made = demo.splits(generated_text.reviews, 0)
  for name, rows in zip(('train', 'dev', 'test'), made, strict=True):
    read = [row for _, row in read_rows(f'{directory}/{name}.tsv', '')]
    assert len(read) == 200
    assert read == [{'sentence': s, 'label': label} for s, label in rows]
  sentences = (directory / 'sentences.txt').read_text().splitlines()
  assert sentences == [row['sentence'] for row in read[: len(sentences)]] != []


@pytest.mark.slow
def test_a_second_demo_replaces_the_first_by_the_same(run):
  directory, summary, _ = run
  before = {p.name: p.read_bytes() for p in directory.iterdir()}
  (directory / 'words.txt').write_text('of an earlier version')
  (directory / 'mine.txt').write_text('mine')
  with few_rows():
    again, _ = told(directory, steps=2)
  after = {p.name: p.read_bytes() for p in directory.iterdir()}
  assert after.pop('mine.txt') == b'mine'
  for name in ('sentiment.npy', 'topics.npy', 'words.txt'):
    assert after[name] == before[name], name
  assert again['seconds'] != summary['seconds']
  assert {k: v for k, v in again.items() if not k.startswith('seconds')} == {
    k: v for k, v in summary.items() if not k.startswith('seconds')
  }
  assert json.loads(after['summary.json']) == again


def test_an_interrupted_demo_writes_nothing(tmp_path, monkeypatch, capsys):
  step = loop.Loop._read_metrics

  def interrupted(self, done, ahead):
    if done == 1:
      signal.raise_signal(signal.SIGINT)
    step(self, done, ahead)

  monkeypatch.setattr(loop.Loop, '_read_metrics', interrupted)
  assert demo.main([f'--output_dir={tmp_path}', '--steps=2']) == 130
  assert 'nothing was written' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flags', [['--steps=0'], ['--output_dir={file}/x']])
def test_a_wrong_flag_is_one_line(flags, tmp_path, capsys):
  file = tmp_path / 'file'
  file.write_text('')
  assert demo.main([flag.format(file=file) for flag in flags]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and flags[0][:6] in error


def test_nearest_words_of_an_embedding_are_its_own_piece():
  base = ptune.load('ptune://tiny')
  encode = base.vocabulary.encode
  ids = [encode(word)[0] for word in ('kitchen', 'not', 'guitar')]
  rows = np.asarray(base.weights['token_embedder/embedding'])[ids]
  nearest = demo.nearest_words(rows)
  assert [row[0] for row in nearest] == ['kitchen', 'not', 'guitar']


def test_the_demo_loads_jax_after_its_first_line():
  loaded, _ = loaded_by('import ptune.tools.demo')
  assert 'jax' not in loaded


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Runs a demo of all steps; returns its directory and summary."""
  directory = tmp_path_factory.mktemp('whole')
  summary, text = told(directory)
  print(text)
  return directory, summary


@pytest.mark.slow
def test_a_prompt_reaches_85_percent(whole):
  # These bounds leave a margin for other machines; the card has the figures.
  _, summary = whole
  assert summary['prompt'] >= 0.85
  assert summary['topics'] >= 0.85
  assert summary['untrained'] <= summary['majority']
  assert summary['full'] - summary['prompt'] <= 0.12


@pytest.mark.slow
def test_what_is_counted_right_is_what_is_decoded(whole):
  directory, summary = whole
  tuned = ptune.load(directory / 'sentiment.npy', base='ptune://tiny')
  texts, labels = zip(*demo.splits(generated_text.reviews, 0)[2], strict=True)
  correct = [a == b for a, b in zip(tuned.predict(texts), labels, strict=True)]
  # The frozen model and the saved prompt reproduce the score.
  assert abs(np.mean(correct) - summary['prompt']) <= 0.002


# ------------------------------------------------------------- shipped weights


@pytest.mark.parametrize('name', pretrained.names())
def test_a_shipped_model_loads_strictly_and_is_what_its_card_says(name):
  source = open_checkpoint(pretrained.directory(name))
  config = ptune.load(f'ptune://{name}').config
  plan = parameters.plan(config, full.full(), partitioning.make_mesh())
  values = restore(source, plan.select(plan.base))
  assert set(values) == set(plan.base) == set(source.leaves)
  card = (pretrained.DIRECTORY / 'README.md').read_text()
  found = re.search(rf'\| `{name}` \|.*\| `([0-9a-f]{{16}})` \|', card)
  assert found, f'README.md has no row for {name}'
  assert of_params(values) == found[1]
  count = sum(x.size for x in values.values())
  assert f'{count:,}' in card


def test_a_shipped_model_is_the_one_of_its_gin_file():
  import gin
  from ptune.config import gin_files

  for name in pretrained.names():
    with gin.unlock_config():
      gin.clear_config()
      gin.parse_config_file(
        str(gin_files.own_directory() / 'models' / f'{name}.gin')
      )
      configured = gin.query_parameter('%MODEL').scoped_configurable_fn()
      gin.clear_config()
    assert configured == ptune.load(f'ptune://{name}').config


def test_what_is_shipped_has_at_most_6_megabytes():
  files = [p for p in pretrained.DIRECTORY.rglob('*') if p.is_file()]
  assert sum(p.stat().st_size for p in files) <= 6_000_000


def test_an_unknown_model_is_told_with_those_that_there_are():
  with pytest.raises(ValueError, match=r'ptune://huge.*ptune://tiny'):
    pretrained.directory('ptune://huge')
