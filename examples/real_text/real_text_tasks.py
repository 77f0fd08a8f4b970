"""Tasks of the example: pre-training on text files, then SST-2's sentences.

Paths come from the environment: CORPUS, a glob of text files with a paragraph
a line; VOCABULARY, the SentencePiece model made from them; SST2, a directory
of train.tsv, validation.tsv and test.tsv (a header, then sentence<TAB>label).
"""

import os

import seqio
import tensorflow as tf

from ptune.tasks import pretraining

vocabulary = seqio.SentencePieceVocabulary(os.environ['VOCABULARY'], 100)
feature = seqio.Feature(vocabulary, add_eos=True)

corpus = pretraining.text_files(os.environ.get('CORPUS', ''))
pretraining.add_span_corruption('corpus_spans', corpus, vocabulary)
pretraining.add_prefix_lm('corpus_prefixes', corpus, vocabulary)


def parse(lines):
  """sentence<TAB>label -> inputs, targets."""

  def one(line):
    sentence, label = tf.unstack(tf.strings.split(line, '\t'), 2)
    word = tf.where(label == '1', 'positive', 'negative')
    return {'inputs': 'sentence: ' + sentence, 'targets': word}

  return lines.map(one)


def accuracy(targets, predictions):
  """Percent of predictions that are the target."""
  right = [t == p for t, p in zip(targets, predictions, strict=True)]
  return {'accuracy': 100 * sum(right) / len(right)}


seqio.TaskRegistry.add(
  'sst2_sentences',
  source=seqio.TextLineDataSource(
    {
      split: os.path.join(os.environ.get('SST2', ''), f'{split}.tsv')
      for split in ('train', 'validation', 'test')
    },
    skip_header_lines=1,
  ),
  preprocessors=[
    parse,
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos_after_trim,
  ],
  output_features={'inputs': feature, 'targets': feature},
  metric_fns=[accuracy],
)
