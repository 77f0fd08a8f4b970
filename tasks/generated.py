"""SeqIO tasks of generated text, for pre-training and for prompts.

Pre-training, `generated_pretraining`: a mixture of

    generated_spans      span corruption (see `pretraining`)
    generated_prefixes   prefix language modelling
    generated_tasks      192 small classification tasks
    generated_described  all latents of a sentence, in words

A row of the last two starts with ids that identify the task (see `prefixes`).
Some of these ids are not pieces. With them the embedding has EMBEDDING_ROWS
rows; `ptune.pretrained.make` cuts these rows off when it exports the model.

Downstream tasks for prompts, with 2,000 training rows each:

    generated_sentiment               of reviews
    generated_topics                  of reports
    generated_sentiment_of_things     of reviews of half of the domains
    generated_sentiment_of_others     of the other half
    generated_sentiment_of_reports    of reports
    generated_paraphrase              whether two reviews say the same
    generated_paraphrase_of_reports   whether two reports do
"""

import functools

import numpy as np
import seqio
import tensorflow as tf

from ptune import pretrained
from ptune.tasks import generated_text, metrics, prefixes, pretraining

SEED = 0
PIECES, SENTINELS = 2980, 20
VOCABULARY_ROWS = PIECES + SENTINELS
TASKS, PREFIX = 192, prefixes.PREFIX
EMBEDDING_ROWS = VOCABULARY_ROWS + (TASKS + 1) * PREFIX
# Examples of a source; 4,000 steps of 56 rows see each about twice.
LINES, ROWS = 60_000, 60_000
# In every 56 rows: 8 of text, 32 of the tasks, 16 descriptions.
RATES = {'spans': 4, 'prefixes': 4, 'tasks': 32, 'described': 16}

vocabulary = seqio.SentencePieceVocabulary(
  str(pretrained.VOCABULARY), extra_ids=SENTINELS
)
feature = seqio.Feature(vocabulary, add_eos=True)


def _source(make, **sizes: int) -> seqio.FunctionDataSource:
  """Returns a source whose split is `make(seed, size)`: a dict of columns."""
  make = functools.cache(make)

  def read(split: str, shuffle_files: bool, seed: int | None = None):
    del shuffle_files, seed  # The rows are already in random order.
    columns = make(f'{SEED} {split}', sizes[split])
    # Arrays, because TensorFlow takes a tuple for a structure and is slow on
    # lists.
    return tf.data.Dataset.from_tensor_slices(
      {name: np.array(column) for name, column in columns.items()}
    )

  return seqio.FunctionDataSource(
    read, splits=list(sizes), num_input_examples=sizes
  )


def prefix_ids(task: int) -> list[int]:
  """Returns the ids that a task's rows start with."""
  return prefixes.prefix_ids(SEED, task, PIECES, VOCABULARY_ROWS)


def _text(seed, count):
  return {'text': generated_text.text(seed, count)}


def _tasks(seed, count):
  tasks = generated_text.prefix_tasks(SEED, TASKS)
  rows = generated_text.prefix_rows(seed, count, tasks)
  numbers, inputs, targets = zip(*rows, strict=True)
  ids = [prefix_ids(number) for number in range(TASKS)]
  prefix = np.array([ids[number] for number in numbers], np.int32)
  return {'prefix': prefix, 'inputs': inputs, 'targets': targets}


def _described(seed, count):
  inputs, targets = zip(*generated_text.described(seed, count), strict=True)
  prefix = np.array([prefix_ids(TASKS)] * count, np.int32)
  return {'prefix': prefix, 'inputs': inputs, 'targets': targets}


def _columns(make, seed, count):
  inputs, targets = zip(*make(seed, count), strict=True)
  return {'inputs': inputs, 'targets': targets}


def _add(name: str, source: seqio.DataSource, *preprocessors) -> None:
  seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[
      seqio.preprocessors.tokenize,
      *preprocessors,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature, 'targets': feature},
    metric_fns=[metrics.accuracy],
  )


_lines = _source(_text, train=LINES, validation=1000)
pretraining.add_span_corruption('generated_spans', _lines, vocabulary, 0.2, 2.5)
pretraining.add_prefix_lm('generated_prefixes', _lines, vocabulary)
_add(
  'generated_tasks',
  _source(_tasks, train=2 * ROWS, validation=1000),
  pretraining.prepend_prefix,
)
_add(
  'generated_described',
  _source(_described, train=ROWS, validation=200),
  pretraining.prepend_prefix,
)
seqio.MixtureRegistry.add(
  'generated_pretraining',
  [(f'generated_{name}', rate) for name, rate in RATES.items()],
)
# For comparison: a model that learns from text alone.
seqio.MixtureRegistry.add(
  'generated_text_only', ['generated_spans', 'generated_prefixes'], 1
)

_domains, _reports = tuple(generated_text.DOMAINS), generated_text.REPORTS
for _name, _make, _how in (
  ('sentiment', generated_text.reviews, {}),
  ('topics', generated_text.topics, {}),
  ('sentiment_of_things', generated_text.reviews, {'domains': _domains[::2]}),
  ('sentiment_of_others', generated_text.reviews, {'domains': _domains[1::2]}),
  ('sentiment_of_reports', generated_text.reviews, {'templates': _reports}),
  ('paraphrase', generated_text.paraphrases, {}),
  (
    'paraphrase_of_reports',
    generated_text.paraphrases,
    {'templates': _reports},
  ),
):
  _add(
    f'generated_{_name}',
    _source(
      functools.partial(_columns, functools.partial(_make, **_how)),
      train=2000,
      validation=400,
      test=1000,
    ),
  )
