"""Tasks of the example: pre-training on text files, then SST-2's sentences.

Pre-training, `corpus_pretraining`: a mixture of

    corpus_spans      span corruption of the text (see `pretraining`)
    corpus_prefixes   prefix language modelling of it
    corpus_tasks      128 small classification tasks (see `prefixes`)

Downstream, for prompts: `sst2_sentences` and `customer_review_sentences`.

Paths come from the environment:

    CORPUS             a glob of the text files that `corpus_text` wrote
    VOCABULARY         the SentencePiece model made from them
    SST2               a directory of train.tsv, validation.tsv and test.tsv
                       (a header, then sentence<TAB>label)
    CUSTOMER_REVIEWS   another such directory
    WITHHELD           a glob of TSV files whose texts corpus_tasks leaves out
"""

import functools
import os
import random

import corpus_rows
import numpy as np
import seqio
import tensorflow as tf

from ptune.tasks import metrics, prefixes, pretraining

SEED = 0
TASKS, LABEL_WORDS = 128, 400
ROWS = {'train': 200_000, 'validation': 1000}
# A batch of 56 rows has 8 rows of text and 48 of the tasks.
RATES = {'spans': 6, 'prefixes': 2, 'tasks': 48}
DOWNSTREAM_LABELS = ('negative', 'positive')

vocabulary = seqio.SentencePieceVocabulary(os.environ['VOCABULARY'], 100)
feature = seqio.Feature(vocabulary, add_eos=True)


def add(name, source, *preprocessors):
  """Registers a classification task."""
  seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[
      *preprocessors,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature, 'targets': feature},
    metric_fns=[metrics.accuracy],
  )


# ---------------------------------------------------------------- pre-training


def label_words() -> list[str]:
  """Draws words that are one piece, except the labels of downstream tasks."""
  pieces = vocabulary.tokenizer
  texts = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
  words = [text[1:] for text in texts if text[0] == '▁' and len(text) > 4]
  words = sorted(w for w in words if w.isalpha() and w not in DOWNSTREAM_LABELS)
  return random.Random(f'label words {SEED}').sample(
    words, min(LABEL_WORDS, len(words))
  )


@functools.cache
def prefix_tasks() -> list[prefixes.PrefixTask]:
  """Draws the tasks, which are the same for all splits."""
  return prefixes.draw_tasks(
    SEED, TASKS, corpus_rows.VALUES, corpus_rows.WEIGHTS, label_words()
  )


def rows(split: str, shuffle_files: bool, seed: int | None = None):
  """Returns the rows of corpus_tasks: prefix, inputs, targets."""
  del shuffle_files, seed  # The rows are already in random order.
  paths = [os.environ.get(name, '') for name in ('CORPUS', 'WITHHELD')]
  known = corpus_rows.texts(*paths)
  drawn = corpus_rows.prefix_rows(
    f'{SEED} {split}',
    ROWS[split],
    prefix_tasks(),
    [text for text in known if text.held_out == (split == 'validation')],
  )
  numbers, inputs, targets = zip(*drawn, strict=True)
  sizes = vocabulary.vocab_size - vocabulary.extra_ids, vocabulary.vocab_size
  ids = [prefixes.prefix_ids(SEED, task, *sizes) for task in range(TASKS)]
  return tf.data.Dataset.from_tensor_slices(
    {
      'prefix': np.array([ids[number] for number in numbers], np.int32),
      'inputs': np.array(inputs),
      'targets': np.array(targets),
    }
  )


corpus = pretraining.text_files(os.environ.get('CORPUS', ''))
pretraining.add_span_corruption('corpus_spans', corpus, vocabulary)
pretraining.add_prefix_lm('corpus_prefixes', corpus, vocabulary)
add(
  'corpus_tasks',
  seqio.FunctionDataSource(rows, list(ROWS), ROWS),
  seqio.preprocessors.tokenize,
  pretraining.prepend_prefix,
)
seqio.MixtureRegistry.add(
  'corpus_pretraining',
  [(f'corpus_{name}', rate) for name, rate in RATES.items()],
)

# ------------------------------------------------------------------ downstream


def parse(lines):
  """Parses sentence<TAB>label into inputs and targets."""

  def one(line):
    sentence, label = tf.unstack(tf.strings.split(line, '\t'), 2)
    word = tf.gather(DOWNSTREAM_LABELS, tf.strings.to_number(label, tf.int32))
    return {'inputs': sentence, 'targets': word}

  return lines.map(one)


for name, variable in (
  ('sst2_sentences', 'SST2'),
  ('customer_review_sentences', 'CUSTOMER_REVIEWS'),
):
  directory = os.environ.get(variable, '')
  files = {
    split: os.path.join(directory, f'{split}.tsv')
    for split in ('train', 'validation', 'test')
  }
  add(
    name,
    seqio.TextLineDataSource(files, skip_header_lines=1),
    parse,
    seqio.preprocessors.tokenize,
  )
