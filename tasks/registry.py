"""How the modules beside this one register their data sets with SeqIO.

A data set has up to three variants, and each of them three vocabularies:

    glue_cola_v200              inputs begin with the data set's name, 'cola'
    taskless_glue_cola_v200     they do not: what prompts are tuned on
    task_index_glue_cola_v200   a token of its own stands in the name's place
    mt5_..., byt5_...           the same in another vocabulary

Names are those of the reference implementations, t5 and prompt-tuning. There,
`_examples` behind a name wrote texts to TensorBoard as well; here every task's
predictions are written with their texts, and such a name is an alias.

`..._rank` behind a classification task evaluates it by scoring every label,
where the task itself generates text: see `rank_labels`. Both are trained alike.
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
  """The vocabulary of all tasks without a prefix; a file is read when used.

  It is `texts.chosen_vocabulary`, as it is when the first task is registered.
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
  """The vocabulary of the tasks with a prefix: '', 'mt5_' or 'byt5_'."""
  if prefix == 'byt5_':
    return seqio.ByteVocabulary()
  if prefix == 'mt5_':
    # Its file has the 100 sentinels among its pieces.
    return seqio.SentencePieceVocabulary(MT5_VOCABULARY)
  return t5_vocabulary()


@functools.cache
def features(prefix: str = '') -> Mapping[str, seqio.Feature]:
  """The output features of the tasks with a prefix."""
  feature = seqio.Feature(vocabulary(prefix), add_eos=True)
  return {'inputs': feature, 'targets': feature}


VOCABULARIES = ('', 'mt5_', 'byt5_')


def add_task(
  name: str,
  source: seqio.DataSource,
  preprocessors: Sequence[Preprocessor],
  **arguments: Any,
) -> None:
  """Registers one task, unless its name is taken: what others named stays."""
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
      name, source=source, preprocessors=preprocessors, **arguments
    )


def tokenized(
  text: Sequence[Preprocessor], *after: Preprocessor
) -> list[Preprocessor]:
  """The steps from rows to ids, cached before those that come after."""
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
  """A source of texts: rows to train on, elsewhere each with every label.

  In `train` there is one example a row, as in the task itself. In all other
  splits there is one for each label, whose text is the target, with the `row`
  it belongs to and the `gold` text that the row has. An evaluation's `loss` and
  `token_accuracy` are over all of them, so they say nothing of the task.
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
    # Unique over the shards that seqio_cache_tasks reads one by one.
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
  """The arguments of a task that is evaluated by scoring every label."""
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
    names: Its names without prefixes, the first one and aliases.
    source: Its rows.
    text: The steps from rows to text.
    postprocess: See `postprocessors`; with labels, it gets their numbers as
      `then`.
    metrics: See `metrics`.
    labels: All targets of a classification task. It is then also registered
      with `_rank`, and tells how many predictions are no label.
    other_words: See `postprocessors.label_id`; there is no `_rank` then.
    variants: Which there are.
    task_index: Says which token stands for the data set: 0 is the last one of
      the vocabulary.
    sentinel_name: A name under which a sentinel ends the inputs and begins the
      targets, as a model of span corruption knows it (Raffel et al., 2020).
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
  """What comes before the metrics of a task in one of VOCABULARIES."""
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
  """A preprocessor: puts the sentinel <extra_id_0> behind the inputs.

  Inputs are trimmed before, so that it keeps its place with EOS behind it.
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
    names: Its names, the first one and aliases.
    rates: For each task how often it is drawn, in relation to the others.
  """
  names = [names] if isinstance(names, str) else names
  for vocab in VOCABULARIES:
    for name in names:
      if vocab + name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(
          vocab + name, [(vocab + task, rate) for task, rate in rates.items()]
        )


class _TfdsSource(seqio.TfdsDataSource):
  """Prepares a data set when its splits are asked for and are not known.

  SeqIO's own says that there are none until the data set has been read.
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
  """A data set of TFDS, 'glue/cola:2.0.0', with some or all of its splits."""
  return _TfdsSource(tfds_name=name, splits=splits)
