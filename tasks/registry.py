"""Registers the data sets of the modules beside it with SeqIO.

A data set has up to three variants, each with three vocabularies:

    glue_cola_v200              inputs begin with the data set's name, 'cola'
    taskless_glue_cola_v200     they do not; prompts are tuned on these
    task_index_glue_cola_v200   a special token replaces the name
    mt5_..., byt5_...           the same in another vocabulary

Names are those of the reference implementations, t5 and prompt-tuning. In the
reference, a name with `_examples` at the end also writes texts to TensorBoard.
Here every task writes its predictions with their texts, and such a name is an
alias.

A classification task generates text. With `_rank` at the end of its name, it is
evaluated by scoring every label instead: see `rank_labels`. Training is the
same.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from ptune.tasks import labels as labels_lib
from ptune.tasks import metrics as metrics_lib
from ptune.tasks import postprocessors, preprocessors
from ptune.tasks.pretraining import prepend_sentinel
from ptune.tasks.texts import chosen_vocabulary

MT5_VOCABULARY = 'gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model'

PLAIN, TASKLESS, TASK_INDEX = 'plain', 'taskless', 'task_index'
PREFIXES = {PLAIN: '', TASKLESS: 'taskless_', TASK_INDEX: 'task_index_'}

Preprocessor = Callable[..., tf.data.Dataset]


def t5_vocabulary() -> seqio.Vocabulary:
  """Returns the vocabulary of all tasks without a prefix, read on first use.

  It is the `texts.chosen_vocabulary` at the time of the first registration.
  """
  path, extra_ids = chosen_vocabulary()
  if path.endswith('.model') or extra_ids is not None:
    return seqio.SentencePieceVocabulary(
      path, extra_ids=100 if extra_ids is None else extra_ids
    )
  from ptune.convert.vocabulary import vocabulary_of

  return vocabulary_of(path)


@functools.cache
def vocabulary(prefix: str = '') -> seqio.Vocabulary:
  """Returns the vocabulary of a prefix: '', 'mt5_' or 'byt5_'."""
  if prefix == 'byt5_':
    return seqio.ByteVocabulary()
  if prefix == 'mt5_':
    # The 100 sentinels are already pieces in its file.
    return seqio.SentencePieceVocabulary(MT5_VOCABULARY)
  return t5_vocabulary()


@functools.cache
def features(prefix: str = '') -> Mapping[str, seqio.Feature]:
  """Returns the output features of the tasks with a prefix."""
  feature = seqio.Feature(vocabulary(prefix), add_eos=True)
  return {'inputs': feature, 'targets': feature}


VOCABULARIES = ('', 'mt5_', 'byt5_')


def add_task(
  name: str,
  source: seqio.DataSource,
  preprocessors: Sequence[Preprocessor],
  **arguments: Any,
) -> None:
  """Registers one task, unless its name is taken; users' tasks are kept."""
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
      name, source=source, preprocessors=preprocessors, **arguments
    )


def tokenized(
  text: Sequence[Preprocessor], *after: Preprocessor
) -> list[Preprocessor]:
  """Returns the steps from rows to ids; the cache comes before `after`."""
  return [
    *text,
    seqio.preprocessors.tokenize,
    seqio.CacheDatasetPlaceholder(),
    *after,
    seqio.preprocessors.append_eos_after_trim,
  ]


def rank_labels(
  source: seqio.DataSource,
  text: Sequence[Preprocessor],
  labels: Sequence[str],
) -> seqio.DataSource:
  """Makes a source of texts: training rows; in other splits, row times label.

  The split `train` has one example a row, as the task itself has. Every other
  split has one example for each label of a row. Its target is the label's text;
  `row` is the row's number, and `gold` is the row's own text. An evaluation's
  `loss` and `token_accuracy` are computed over all of these, so they say
  nothing about the task.
  """

  def every_label(number, example):
    each = tf.data.Dataset.from_tensor_slices(tf.constant(labels))
    gold = example['targets']
    return each.map(
      lambda label: {**example, 'targets': label, 'row': number, 'gold': gold}
    )

  def get_dataset(split='train', shuffle=True, *args, **how):
    dataset = source.get_dataset(split, shuffle, *args, **how)
    for step in text:
      dataset = step(dataset)
    if split == 'train':
      return dataset
    # Unique over the shards, which seqio_cache_tasks reads one by one.
    shard = how.get('shard_info')
    first = shard.index << 40 if shard else 0
    return dataset.enumerate(first).flat_map(every_label)

  ranking = copy.copy(source)
  ranking.get_dataset = get_dataset
  return ranking


def ranking(
  source: seqio.DataSource,
  text: Sequence[Preprocessor],
  labels: Sequence[str],
  postprocess: Callable[..., Any],
  metrics: Sequence[metrics_lib.Metric],
) -> dict[str, Any]:
  """Returns the arguments of a task that scores every label in evaluation."""
  return {
    'source': rank_labels(source, text, labels),
    'preprocessors': tokenized([]),
    'postprocess_fn': functools.partial(
      postprocessors.ranked, then=postprocess
    ),
    'metric_fns': [metrics_lib.ranked(metrics, len(labels))],
  }


def register(
  names: str | Sequence[str],
  source: seqio.DataSource,
  text: Sequence[Preprocessor],
  *,
  postprocess: Callable[..., Any] | None = None,
  metrics: Sequence[metrics_lib.Metric] = (),
  labels: Sequence[str] | None = None,
  other_words: Mapping[str, str] | None = None,
  variants: Sequence[str] = (PLAIN,),
  task_index: int | None = None,
  sentinel_name: str | None = None,
) -> None:
  """Registers a data set under all its names.

  Args:
    names: Its names without prefixes: the main one and aliases.
    source: Its rows.
    text: The steps from rows to text.
    postprocess: See `postprocessors`; with labels, it gets their numbers as
      `then`.
    metrics: See `metrics`.
    labels: All targets of a classification task. The task is then also
      registered with `_rank`, and counts predictions that are not a label.
    other_words: See `postprocessors.label_id`; there is no `_rank` then.
    variants: The variants to register.
    task_index: The number of the token that replaces the data set's name: 0 is
      the last token of the vocabulary.
    sentinel_name: A name for a variant in which a sentinel ends the inputs and
      begins the targets, as in span corruption (Raffel et al., 2020).
  """
  names = [names] if isinstance(names, str) else list(names)
  metrics = list(metrics)
  if labels is not None:
    metrics.append(metrics_lib.invalid)
  short = [*text, preprocessors.remove_first_word]
  index = functools.partial(
    prepend_sentinel, feature='inputs', offset=task_index or 0
  )
  chains = {
    PLAIN: (text, tokenized(text)),
    TASKLESS: (short, tokenized(short)),
    TASK_INDEX: (short, tokenized(short, index)),
  }
  by_vocabulary = {
    vocab: _postprocessor(vocab, postprocess, labels, other_words)
    for vocab in VOCABULARIES
  }
  for variant in variants:
    text_steps, steps = chains[variant]
    for vocab, scored in by_vocabulary.items():
      has = {'output_features': features(vocab)}
      scores = {'postprocess_fn': scored, 'metric_fns': metrics}
      ranked = None
      if labels is not None and variant != TASK_INDEX and not other_words:
        ranked = ranking(source, text_steps, labels, scored, metrics[:-1])
      for name in names:
        full = f'{vocab}{PREFIXES[variant]}{name}'
        for alias in (full, f'{full}_examples'):
          add_task(alias, source, steps, **scores, **has)
        if ranked:
          add_task(f'{full}_rank', **ranked, **has)
  if sentinel_name:
    steps = tokenized(text, append_sentinel, prepend_sentinel)
    for vocab, scored in by_vocabulary.items():
      add_task(
        f'{vocab}{sentinel_name}',
        source,
        steps,
        postprocess_fn=functools.partial(
          postprocessors.without_sentinel, then=scored
        ),
        metric_fns=metrics,
        output_features=features(vocab),
      )


def _postprocessor(
  vocab: str,
  postprocess: Callable[..., Any] | None,
  labels: Sequence[str] | None,
  other_words: Mapping[str, str] | None,
) -> Callable[..., Any] | None:
  """Returns the postprocessor of a task in one of VOCABULARIES."""
  if labels is None:
    return postprocess
  ids = labels_lib.LabelIds(
    tuple(labels),
    lambda: features(vocab)['targets'].vocabulary,
    other_words,
  )
  return functools.partial(postprocess, then=ids) if postprocess else ids


def append_sentinel(
  dataset: tf.data.Dataset,
  output_features: Mapping[str, seqio.Feature],
  sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
  """A preprocessor: appends the sentinel <extra_id_0> to the inputs.

  It trims the inputs first, so that the sentinel and EOS both fit.
  """
  sentinel = output_features['inputs'].vocabulary.vocab_size - 1
  limit = (sequence_length or {}).get('inputs')

  def append(example):
    tokens = example['inputs'][: limit and limit - 2]
    last = tf.constant([sentinel], tokens.dtype)
    return {**example, 'inputs': tf.concat([tokens, last], 0)}

  return dataset.map(append, num_parallel_calls=tf.data.AUTOTUNE)


def register_mixture(
  names: str | Sequence[str], rates: Mapping[str, float]
) -> None:
  """Registers a mixture of tasks in all vocabularies, unless a name is taken.

  Args:
    names: Its names: the main one and aliases.
    rates: The relative rate of each task.
  """
  names = [names] if isinstance(names, str) else names
  for vocab in VOCABULARIES:
    for name in names:
      if vocab + name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(
          vocab + name, [(vocab + task, rate) for task, rate in rates.items()]
        )


class _TfdsSource(seqio.TfdsDataSource):
  """Prepares a data set when its splits are needed and not yet known.

  SeqIO's own source says that there are none until the data set is prepared.
  """

  def _prepare(self):
    if not self.tfds_dataset.info.splits:
      self.tfds_dataset.builder.download_and_prepare()

  @property
  def splits(self):
    if not self._splits:
      self._prepare()
    return super().splits

  def num_input_examples(self, split: str) -> int | None:
    self._prepare()
    return super().num_input_examples(split)


def tfds(name: str, splits: Any = None) -> seqio.TfdsDataSource:
  """Returns a TFDS data set, 'glue/cola:2.0.0', with some or all splits."""
  return _TfdsSource(tfds_name=name, splits=splits)
