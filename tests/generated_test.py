"""Generated text depends only on its seed, and leaks nothing of test data."""

import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from ptune.tasks import generated_text

MAKERS = {
  'text': generated_text.text,
  'reviews': generated_text.reviews,
  'topics': generated_text.topics,
  'described': generated_text.described,
  'prefix_tasks': generated_text.prefix_tasks,
}


@pytest.mark.parametrize('name', MAKERS)
def test_rows_are_a_pure_function_of_the_seed(name):
  make = MAKERS[name]
  first = make(0, 40)
  random.seed(1)
  assert make(0, 40) == first
  assert make(1, 40) != first


def test_rows_do_not_depend_on_the_process():
  code = (
    'from ptune.tasks import generated_text as g;'
    'print(g.reviews(3, 20), g.prefix_tasks(3, 20), g.text(3, 20, 0.0))'
  )
  outputs = {
    subprocess.run(
      [sys.executable, '-c', code],
      env={**os.environ, 'PYTHONHASHSEED': seed},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in ('1', '2')
  }
  assert len(outputs) == 1


@pytest.fixture(scope='module')
def read_in_pretraining():
  """Returns a sample of all pre-training rows: inputs and targets."""
  tasks = generated_text.prefix_tasks(0, 192)
  rows = generated_text.prefix_rows('0 train', 5000, tasks)
  described = generated_text.described('0 train', 5000)
  return [
    *generated_text.text('0 train', 10_000),
    *generated_text.docstrings(),
    *(text for row in rows for text in row[1:]),
    *(text for row in described for text in row),
  ]


def test_no_label_of_a_downstream_task_is_read_in_pretraining(
  read_in_pretraining,
):
  labels = '|'.join(generated_text.withheld())
  leaks = [t for t in read_in_pretraining if re.search(labels, t)]
  assert not leaks, leaks[:3]
  words = set(generated_text.label_words())
  assert not words & generated_text.withheld()
  # The reviews do not contain them either, so a model cannot copy them.
  reviews = ' '.join(text for text, _ in generated_text.reviews(0, 2000))
  assert not re.search(labels, reviews)


def test_no_template_of_a_review_is_read_in_pretraining(read_in_pretraining):
  def grams(words, n=3):
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

  literal = set()
  for template in generated_text.REVIEWS + generated_text.REPORTS:
    for part in re.split(r'\{\w+\}', template):
      literal |= grams(part.split())
  assert len(literal) > 20
  read = set().union(*(grams(text.split()) for text in read_in_pretraining))
  # The docstrings may share one phrase of ordinary English; sentences share
  # none.
  shared = literal & read
  assert len(shared) <= 1, shared
  sentences = {g for s in generated_text.sentences(0, 5000)
    for g in grams(s.text.split())}  # fmt: skip
  assert not literal & sentences


def test_no_adjective_is_of_both_polarities():
  domains = generated_text.DOMAINS.values()
  good = set(generated_text.GOOD).union(*(d.good for d in domains))
  bad = set(generated_text.BAD).union(*(d.bad for d in domains))
  assert not good & bad


def test_reviews_are_balanced_and_need_their_negations():
  rows = generated_text.reviews(0, 1000)
  assert [label for _, label in rows].count('positive') == 500
  negated = [text for text, _ in rows if ' not ' in f' {text} ']
  assert 0.15 < len(negated) / len(rows) < 0.4


def test_given_latents_are_in_the_sentence():
  rng = random.Random(0)
  for domain in generated_text.DOMAINS:
    made = generated_text.sentence(rng, domain=domain, colour='grey')
    assert made.latents['domain'] == domain
    assert 'grey' in made.text.split()
    assert made.latents['place'] in generated_text.DOMAINS[domain].places


# ----------------------------------------------------------------- SeqIO tasks

LENGTHS = {'inputs': 36, 'targets': 20}  # As in pretrain_generated.gin.


@pytest.fixture(scope='module')
def generated():
  from ptune.tasks import generated

  return generated


def rows(name, split='validation', lengths=LENGTHS):
  import seqio

  task = seqio.get_mixture_or_task(name)
  dataset = task.get_dataset(lengths, split, shuffle=False, num_epochs=1)
  return list(dataset.take(200).as_numpy_iterator())


def test_a_row_of_a_prefix_task_starts_with_the_ids_of_that_task(generated):
  tasks = generated_text.prefix_tasks(generated.SEED, generated.TASKS)
  for row in rows('generated_tasks'):
    own = row['inputs'][generated.PREFIX]
    number = (own - generated.VOCABULARY_ROWS) // generated.PREFIX
    prefix = generated.prefix_ids(number)
    np.testing.assert_array_equal(row['inputs'][: len(prefix)], prefix)
    label = generated.vocabulary.decode(row['targets'].tolist())
    assert label in tasks[number].labels.values()
    # Nothing was cut off, and the sentence contains no task ids.
    assert row['inputs'][-1] == 1 and row['targets'][-1] == 1
    assert (row['inputs'][len(prefix) :] < generated.VOCABULARY_ROWS).all()


def test_ids_of_tasks_are_their_own_and_have_an_embedding(generated):
  own = [
    i
    for task in range(generated.TASKS + 1)
    for i in generated.prefix_ids(task)[generated.PREFIX :]
  ]
  assert len(set(own)) == len(own)
  assert min(own) == generated.vocabulary.vocab_size
  assert max(own) == generated.EMBEDDING_ROWS - 1


def test_the_mixture_reads_all_its_tasks(generated):
  import seqio

  mixture = seqio.get_mixture_or_task('generated_pretraining')
  assert {task.name for task in mixture.tasks} == {
    f'generated_{name}' for name in generated.RATES
  }
  dataset = mixture.get_dataset(LENGTHS, 'train', seed=0, num_epochs=None)
  heads = [
    int(row['inputs'][generated.PREFIX]) if len(row['inputs']) > 8 else 0
    for row in dataset.take(200).as_numpy_iterator()
  ]
  steered = sum(head >= generated.VOCABULARY_ROWS for head in heads)
  assert 150 <= steered <= 190  # 48 of 56 rows.


@pytest.mark.parametrize('name', ['generated_sentiment', 'generated_topics'])
def test_downstream_rows_fit_the_lengths_of_the_demo(generated, name):
  lengths = {'inputs': 32, 'targets': 8}
  for row in rows(name, lengths=lengths):
    assert row['inputs'][-1] == 1 and row['targets'][-1] == 1
