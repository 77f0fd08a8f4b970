"""examples/real_text: its rows, the withheld texts, and a short training.

The test writes the corpus. It has the real corpus's file names and the line
numbers where praise begins.
"""

import copy
import dataclasses
import gzip
import importlib
import inspect
import pathlib
import random

import numpy as np
import pytest

import gin
from ptune.config import gin_files
from ptune.methods import full
from ptune.studies import study
from ptune.tasks import generated_text, prefixes, pretraining, vocabulary
from tests import tiny

EXAMPLE = pathlib.Path(__file__).parents[1] / 'examples' / 'real_text'
PIECES = 500
LENGTHS = {'inputs': 48, 'targets': 12}
GOOD = 'fine great lovely superb'.split()
BAD = 'awful dull poor weak'.split()
WORDS = generated_text.label_words()
LEAK = 'she said that it was the very best of all days in a long year'


@pytest.fixture(scope='module', autouse=True)
def paths():
  """Makes the example's modules importable, as in its directory."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(EXAMPLE))
    yield patch


@pytest.fixture(scope='module')
def text(paths):
  return importlib.import_module('corpus_text')


@pytest.fixture(scope='module')
def rows(paths):
  return importlib.import_module('corpus_rows')


def sentence(rng, words):
  some = rng.choices(WORDS, k=5)
  return ' '.join([*some, *rng.choices(words, k=3), '.'])


@pytest.fixture(scope='module')
def corpus(rows, tmp_path_factory):
  """Writes corpus, withheld and downstream files and a vocabulary."""
  directory = tmp_path_factory.mktemp('real_text')
  rng = random.Random(0)
  for name in rows.SOURCES:
    first = rows.FIRST_PRAISE.get(name)
    lines = [
      sentence(rng, GOOD if first and i > 600 else BAD) for i in range(1200)
    ]
    for i in (3, 99, 199):  # Every 100th is held out.
      lines[i] = f'do you have {i} {name} ? i have not , {rng.choice(WORDS)} .'
    lines[299] = lines[298]
    if first:
      lines[600] = f'{first} , which is {" ".join(GOOD)} .'
    else:
      lines[5] = f'{LEAK} .'
    with gzip.open(directory / f'{name}.txt.gz', 'wt') as file:
      file.writelines(f'{line}\n' for line in lines)
  for data in ('sst2', 'customer_reviews'):
    (directory / data).mkdir()
    for split in ('train', 'validation', 'test'):
      kinds = [(BAD, 0), (GOOD, 1)] * 20
      (directory / data / f'{split}.tsv').write_text(
        'sentence\tlabel\n'
        + ''.join(f'{data} {sentence(rng, w)}\t{y}\n' for w, y in kinds)
      )
  (directory / 'mrpc.tsv').write_text(
    f'sentence1\tsentence2\tlabel\nOnce.\tThen, {LEAK}!\t1\n'
  )
  files = [str(directory / '*.gz'), str(directory / '*' / '*.tsv')]
  vocabulary.train_vocabulary(files, PIECES, str(directory / 'vocab.model'))
  return directory


@pytest.fixture(scope='module')
def tasks(paths, corpus):
  """Returns the module that registers the tasks."""
  paths.setenv('CORPUS', str(corpus / '*.txt.gz'))
  paths.setenv('VOCABULARY', str(corpus / 'vocab.model'))
  paths.setenv('WITHHELD', str(corpus / '*.tsv'))
  paths.setenv('SST2', str(corpus / 'sst2'))
  paths.setenv('CUSTOMER_REVIEWS', str(corpus / 'customer_reviews'))
  module = importlib.import_module('real_text_tasks')
  module.ROWS.update(train=2000, validation=200)
  return module


@pytest.fixture(scope='module')
def known(rows, corpus):
  return rows.texts(str(corpus / '*.txt.gz'), str(corpus / '*.tsv'))


def test_text_is_normalised_once_and_for_all(text):
  once = text.normalised("It's NOT bad; we'd “like” 2,000 <unk> more. Don't!")
  assert once == "it 's not bad ; we 'd “ like ” 2 , 000 more . do n't !"
  assert text.normalised(once) == once


def test_chunks_lose_no_word_but_of_the_shortest(text):
  rng = random.Random(1)
  for _ in range(200):
    line = ' '.join(rng.choices(['a', 'b', 'c', '.', '?', ';'], k=90))
    parts = list(text.chunks(line, least=1, most=12))
    assert ' '.join(parts) == line
    assert all(len(part.split()) <= 12 for part in parts)
    long_enough = list(text.chunks(line, least=4, most=12))
    assert long_enough == [p for p in parts if len(p.split()) >= 4]


def test_withheld_is_what_shares_eight_words_or_is_the_same(rows):
  guard = rows.Withheld([LEAK, 'Not bad, really!'])
  words = LEAK.split()
  assert ' , '.join(['well', *words[3:11], 'then']) in guard
  assert ' '.join(words[3:10]) not in guard  # Seven of them.
  assert ' '.join([*words[3:10], 'long', *words[11:14]]) not in guard
  assert 'not bad really' in guard
  assert 'not bad' not in guard and 'it is not bad really' not in guard


def test_nothing_withheld_is_in_a_text(known):
  assert not [t for t in known if LEAK in t.text]
  assert any('do you have' in t.text for t in known)


def test_what_is_withheld_must_be_there(rows, tmp_path):
  with pytest.raises(ValueError, match=r'WITHHELD .* no file matches'):
    rows.read_withheld(str(tmp_path / '*.tsv'))


def test_praise_and_complaint_are_told_by_the_line_and_by_words(rows, known):
  polar = {'praise': GOOD, 'complaint': BAD}
  found = [t for t in known if t.polarity]
  assert {(t.source, t.polarity) for t in found} == {
    (source, polarity) for source in ('films', 'products') for polarity in polar
  }
  for one in found:
    words = set(one.text.split()) & {*GOOD, *BAD}
    assert words <= set(polar[one.polarity]), one


def test_a_corpus_of_another_release_is_refused(rows):
  with pytest.raises(ValueError, match='0 lines of pros_cons'):
    rows.judge('pros_cons', ['good', 'bad'])


def task_rows(tasks, split):
  return list(tasks.rows(split, False).as_numpy_iterator())


def test_no_text_is_in_both_splits(tasks):
  splits = [
    {row['inputs'] for row in task_rows(tasks, split)}
    for split in ('train', 'validation')
  ]
  assert all(splits) and not set.intersection(*splits)


def test_labels_do_not_depend_on_the_split(tasks, rows):
  """Every row has its task's label for the true value of the text."""
  by_id = {
    prefixes.prefix_ids(tasks.SEED, i, PIECES, PIECES + 100)[-1]: task
    for i, task in enumerate(tasks.prefix_tasks())
  }
  for split in ('train', 'validation'):
    for row in task_rows(tasks, split):
      task = by_id[row['prefix'][-1]]
      text, label = row['inputs'].decode(), row['targets'].decode()
      if task.attribute in rows.SIGNS:
        value = rows.Text(text, '', None, False).value(task.attribute)
      elif task.attribute == 'polarity':
        value = 'praise' if set(text.split()) & set(GOOD) else 'complaint'
      else:
        continue  # Words do not show the source.
      assert label == task.labels[value]


def test_a_row_starts_with_the_ids_of_its_task(tasks):
  own = {
    tuple(prefixes.prefix_ids(tasks.SEED, i, PIECES, PIECES + 100)): task
    for i, task in enumerate(tasks.prefix_tasks())
  }
  for row in examples('corpus_tasks', 'validation'):
    task = own[tuple(row['inputs'][: 2 * prefixes.PREFIX])]
    label = tasks.vocabulary.decode(row['targets'].tolist())
    assert label in task.labels.values()
    assert row['inputs'][-1] == row['targets'][-1] == 1


def test_no_downstream_label_is_a_label_in_pretraining(tasks):
  labels = {w for task in tasks.prefix_tasks() for w in task.labels.values()}
  assert labels and not labels & set(tasks.DOWNSTREAM_LABELS)


def examples(name, split, lengths=LENGTHS):
  import seqio

  task = seqio.get_mixture_or_task(name)
  dataset = task.get_dataset(lengths, split, shuffle=False, num_epochs=1)
  return list(dataset.take(200).as_numpy_iterator())


def test_downstream_rows_have_the_words_of_their_labels(tasks):
  for name in ('sst2_sentences', 'customer_review_sentences'):
    made = examples(name, 'validation')
    assert len(made) == 40
    for row in made:
      text, said = (
        tasks.vocabulary.decode(row[feature].tolist())
        for feature in ('inputs', 'targets')
      )
      good = set(text.split()) & set(GOOD)
      assert said == ('positive' if good else 'negative')


@pytest.mark.slow
def test_a_model_is_pretrained(tasks, tmp_path):
  rows = PIECES + 100 + tasks.TASKS * prefixes.PREFIX
  tiny.run(
    tmp_path,
    config=dataclasses.replace(tiny.CONFIG, vocab_size=rows),
    method=full.full(),
    initial_checkpoint_path=None,
    mixture_or_task_module='real_text_tasks',
    mixture_or_task_name='corpus_pretraining',
    task_feature_lengths=LENGTHS,
    in_memory=False,
    train_steps=3,
    eval_period=3,
    eval_steps=1,
    checkpoint_period=3,
  )
  last = tiny.records(tmp_path)[-3:]
  assert {r['task'] for r in last} == {f'corpus_{name}' for name in tasks.RATES}
  assert all(r['step'] == 3 and np.isfinite(r['loss']) for r in last)


def test_the_study_asks_both_data_sets_of_what_sst2_taught():
  bindings = ["MODEL_DIR='m'", "CHECKPOINT_PATH='/base'"]
  file = str(EXAMPLE / 'study.gin')
  gin.clear_config()
  gin_files.parse([file], bindings, (), study.study)
  [one] = copy.deepcopy(gin.query_parameter('study.study.studies'))
  gin.clear_config()
  assert one.bases['yours'].checkpoint == '/base'
  assert {cell.task for cell in one.cells} == {'sst2_sentences'}
  assert [cell.evaluated for cell in one.cells] == [
    *[None] * 2,
    *['customer_review_sentences'] * 2,
  ]
  assert {cell.tuning.steps for cell in one.cells} == {300, 800}


def test_the_lines_held_out_are_those_of_the_text(rows):
  every = inspect.signature(pretraining.text_files).parameters[
    'validation_every'
  ]
  assert rows.HELD_OUT == every.default


def test_naive_bayes_knows_the_words_of_a_class(paths):
  naive_bayes = importlib.import_module('naive_bayes')
  rng = random.Random(2)
  made = [(sentence(rng, w), w is GOOD) for w in (GOOD, BAD) * 50]
  weights = naive_bayes.fit(made)
  for text, good in made:
    assert (naive_bayes.log_odds(weights, text) > 0) == good
  # A class that is three times as frequent has log-odds of log(3).
  weights = naive_bayes.fit(
    [('x', True), ('x', True), ('x', True), ('x', False)]
  )
  np.testing.assert_allclose(weights[''], np.log(3))
