"""Pre-training on plain text: span corruption and prefix language modelling.

Lines of text are tokenised, laid end to end, and cut into pieces. For example,
the piece a b c d e f g h becomes:

    span corruption  inputs   a b <extra_id_0> e f <extra_id_1> </s>
                     targets  <extra_id_0> c d <extra_id_1> g h </s>
    prefix LM        inputs   a b c </s>
                     targets  d e f g h </s>

T5 was trained with span corruption (Raffel et al., 2020, sections 3.1.4 and
3.3.4). It was then adapted with prefix LM before prompts were tuned (Lester et
al., 2021, section 2.2, "LM adaptation"). This module registers both for the
files of a directory:

    source = pretraining.text_files('/data/corpus/*.txt.gz')
    vocabulary = seqio.SentencePieceVocabulary('/data/vocab.model', 100)
    pretraining.add_span_corruption('my_spans', source, vocabulary)
    pretraining.add_prefix_lm('my_prefixes', source, vocabulary)

Train on them with runs/pretrain.gin. It streams tasks, so that every epoch
draws new spans; a task kept in memory would draw them once.
"""

import functools
from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

from ptune.errors import UserError

NOISE_DENSITY = 0.15
MEAN_NOISE_SPAN_LENGTH = 3.0
# Text files are shuffled in blocks of lines, so that most neighbours in a piece
# are neighbours in a file. If lines have 300 bytes, 2,000 blocks are 40 MB.
# SeqIO then shuffles pieces, but only 1,000, which is less than a file.
LINES_IN_BLOCK, SHUFFLED_BLOCKS, FILES_AT_ONCE = 64, 2000, 16


def text_files(
  pattern: str | Sequence[str], validation_every: int = 100
) -> seqio.FunctionDataSource:
  """Returns the lines of text files as a source with two splits.

  Every 100th line of a file, not counting blank lines, is in `validation`; all
  others are in `train`. So a file's lines keep their splits whatever other
  files there are. A text that occurs on two lines may be in both splits.

  Args:
    pattern: Globs of UTF-8 text files with one paragraph a line. Files that end
      in `.gz` are compressed. The files are searched for when a task reads
      them, so you can register a task on a machine without the files.
    validation_every: Interval of the validation lines.

  Returns:
    A source of {'text': string}: lines in the order of the files' names. If
    shuffled, the order differs in each epoch.

  Raises:
    ValueError: `validation_every` leaves nothing to train on; on reading: no
      file matches one of the globs.
  """
  if validation_every < 2:
    raise UserError(
      f'validation_every is {validation_every}, expected at least 2: 100 holds '
      'out every 100th line.'
    )
  patterns = [pattern] if isinstance(pattern, str) else list(pattern)

  def read(split: str, shuffle_files: bool, seed: int | None = None):
    found = {glob: tf.io.gfile.glob(glob) for glob in patterns}
    empty = [glob for glob, matches in found.items() if not matches]
    if empty or not found:
      raise UserError(
        f'No text file matches {", ".join(empty) or "an empty list"}, expected '
        'at least one for each pattern. A relative path starts at the working '
        'directory.'
      )
    files = sorted({file for matches in found.values() for file in matches})
    dataset = tf.data.Dataset.from_tensor_slices(files)
    if shuffle_files:
      dataset = dataset.shuffle(len(files), seed=seed)
    blocks = dataset.interleave(
      functools.partial(
        _blocks, split=split, validation_every=validation_every
      ),
      cycle_length=FILES_AT_ONCE if shuffle_files else 1,
    )
    if shuffle_files:
      blocks = blocks.shuffle(SHUFFLED_BLOCKS, seed=seed)
    return blocks.unbatch()

  return seqio.FunctionDataSource(read, splits=['train', 'validation'])


def _blocks(
  file: tf.Tensor, split: str, validation_every: int
) -> tf.data.Dataset:
  """Reads the lines of one file that belong to a split, in blocks."""
  compressed = tf.strings.regex_full_match(file, r'.*\.gz')
  lines = tf.data.TextLineDataset(file, tf.where(compressed, 'GZIP', ''))
  # Remove blank lines first: otherwise a file with every other line blank could
  # have no text on its 100th lines.
  lines = lines.filter(lambda line: tf.strings.strip(line) != '').enumerate()
  held_out = split == 'validation'
  lines = lines.filter(
    lambda i, _: ((i + 1) % validation_every == 0) == held_out
  )
  return lines.map(lambda _, line: {'text': line}).batch(LINES_IN_BLOCK)


def noise_counts(
  length: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
  """Returns how many tokens of a piece are noise, and in how many spans.

  Both depend only on the length, so pieces of equal length keep equal lengths
  when they are corrupted. Halves round to even, as in T5.
  """
  noise = min(max(round(length * noise_density), 1), length - 1)
  spans = max(round(noise / mean_noise_span_length), 1)
  return noise, min(spans, noise, length - noise)  # Every span has a token.


def span_corruption_lengths(
  inputs_length: int,
  noise_density: float = NOISE_DENSITY,
  mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tuple[int, int]:
  """Returns the tokens in a piece, and in its targets with sentinels and EOS.

  A corrupted piece fills inputs of `inputs_length` exactly. For 512 the result
  is 568 and 114, T5's numbers.

  Raises:
    ValueError: A parameter is out of range.
  """
  if not (0 < noise_density < 1 and mean_noise_span_length >= 1):
    raise UserError(
      f'noise_density is {noise_density}, expected more than 0 and less than '
      f'1; mean_noise_span_length is {mean_noise_span_length}, expected at '
      f'least 1. T5 has {NOISE_DENSITY} and {MEAN_NOISE_SPAN_LENGTH}.'
    )

  def counts(length):
    return noise_counts(length, noise_density, mean_noise_span_length)

  def corrupted(length):
    noise, spans = counts(length)
    return length - noise + spans + 1

  length = 2  # The shortest piece: one token is kept and one is noise.
  if corrupted(length) > inputs_length:
    raise UserError(
      f"TASK_FEATURE_LENGTHS['inputs'] is {inputs_length}, expected at least "
      f'{corrupted(length)}: a token, a sentinel and EOS.'
    )
  while corrupted(length + 1) <= inputs_length:
    length += 1
  return length, sum(counts(length)) + 1


def span_corruption(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int] | None,
  output_features: Mapping[str, seqio.Feature],
  noise_density: float = NOISE_DENSITY,
  mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
  sentinel_first: bool = True,
) -> tf.data.Dataset:
  """A preprocessor: tokens in `targets` -> corrupted inputs and the noise.

  A piece begins with a kept token and ends with noise. Its length determines
  the numbers of noise tokens and spans. The positions of the spans are random;
  all possibilities are equally likely. All pieces are full, except the last
  piece of a finite dataset.

  Args:
    dataset: {'targets': [tokens] int32} without EOS, which a later preprocessor
      appends.
    sequence_length: TASK_FEATURE_LENGTHS.
    output_features: The task's output features.
    noise_density: The fraction of tokens that are noise.
    mean_noise_span_length: Average number of tokens in a span of noise.
    sentinel_first: Whether the targets begin with the first sentinel, as T5's
      do. Otherwise they begin with the first noise token; the sentinels between
      spans stay.

  Raises:
    ValueError: A parameter is out of range, the targets do not fit their
      length, or the vocabulary has too few sentinels.
  """
  lengths = _feature_lengths(sequence_length)
  parameters = noise_density, mean_noise_span_length
  length, targets_length = span_corruption_lengths(
    lengths['inputs'], *parameters
  )
  targets_length -= not sentinel_first
  counts = [(0, 0), (0, 0)]  # For 0 and 1 tokens; such pieces are left out.
  counts += [noise_counts(n, *parameters) for n in range(2, length + 1)]
  vocabulary = output_features['targets'].vocabulary
  spans = counts[length][1]
  wrong = []
  if targets_length > lengths['targets']:
    wrong.append(
      f"TASK_FEATURE_LENGTHS['targets'] is {lengths['targets']}, expected at "
      f'least {targets_length} for inputs of {lengths["inputs"]}'
    )
  if spans > vocabulary.extra_ids:
    wrong.append(
      f'the vocabulary has {vocabulary.extra_ids} sentinels, expected at least '
      f'{spans}, one for each span; make it with extra_ids={max(spans, 100)}, '
      "or shorten TASK_FEATURE_LENGTHS['inputs']"
    )
  if wrong:
    raise UserError(f'Span corruption: {"; ".join(wrong)}.')
  return _corrupt(
    _pieces(dataset, length),
    counts=tf.constant(counts),
    vocab_size=vocabulary.vocab_size,
    sentinel_first=sentinel_first,
  )


@seqio.map_over_dataset(num_seeds=2)
def _corrupt(piece, seeds, counts, vocab_size, sentinel_first):
  tokens = piece['targets']
  noise, spans = tf.unstack(counts[tf.size(tokens)])
  kept_lengths = _segments(tf.size(tokens) - noise, spans, seeds[0])
  noise_lengths = _segments(noise, spans, seeds[1])
  # [spans, 2] -> [2 * spans]: kept, noise, kept, noise, ...
  lengths = tf.reshape(tf.stack([kept_lengths, noise_lengths], 1), [-1])
  is_noise = tf.repeat(tf.tile([False, True], [spans]), lengths)
  targets = spans_to_sentinels(tokens, ~is_noise, vocab_size)
  return {
    'inputs': spans_to_sentinels(tokens, is_noise, vocab_size),
    'targets': targets if sentinel_first else targets[1:],
  }


def _segments(total: tf.Tensor, parts: tf.Tensor, seed) -> tf.Tensor:
  """Draws the lengths [parts] of non-empty parts whose sum is `total`."""
  places = tf.random.experimental.stateless_shuffle(tf.range(1, total), seed)
  edges = tf.concat([[0], tf.sort(places[: parts - 1]), [total]], 0)
  return edges[1:] - edges[:-1]


def spans_to_sentinels(
  tokens: tf.Tensor, mask: tf.Tensor, vocab_size: int
) -> tf.Tensor:
  """Replaces each run of masked tokens with a sentinel.

  The first sentinel is the last token of the vocabulary. With 1,100 tokens:

      tokens   122 425 483 663 608 426
      mask       1   0   0   0   1   1
      after   1099 425 483 663 1098

  Args:
    tokens: [length] int32
    mask: [length] bool
    vocab_size: Size of the vocabulary with its sentinels.
  """
  begins = mask & ~tf.concat([[False], mask[:-1]], 0)
  sentinels = vocab_size - tf.cumsum(tf.cast(begins, tokens.dtype))
  return tf.where(begins, sentinels, tokens)[begins | ~mask]


def prefix_lm(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None
) -> tf.data.Dataset:
  """A preprocessor: tokens in `targets` -> a prefix and its continuation.

  A piece has as many tokens as the shorter feature. So both parts fit with EOS,
  wherever it is cut. Every cut between two tokens is equally likely.

  Args:
    dataset: {'targets': [tokens] int32} without EOS, which a later preprocessor
      appends.
    sequence_length: TASK_FEATURE_LENGTHS. Give both features one length.

  Raises:
    ValueError: A length is missing or too short.
  """
  lengths = _feature_lengths(sequence_length)
  length = min(lengths['inputs'], lengths['targets'])
  if length < 2:
    raise UserError(
      f'TASK_FEATURE_LENGTHS is {dict(lengths)}, expected at least 2 for '
      'inputs and for targets: a token and EOS.'
    )
  return _cut(_pieces(dataset, length))


@seqio.map_over_dataset(num_seeds=1)
def _cut(piece, seed):
  tokens = piece['targets']
  place = tf.random.stateless_uniform([], seed, 1, tf.size(tokens), tf.int32)
  return {'inputs': tokens[:place], 'targets': tokens[place:]}


def _feature_lengths(
  sequence_length: Mapping[str, int] | None,
) -> Mapping[str, int]:
  if not {'inputs', 'targets'} <= set(sequence_length or ()):
    raise UserError(
      f'TASK_FEATURE_LENGTHS is {sequence_length}, expected a length for '
      "'inputs' and for 'targets': they say how long the pieces are."
    )
  return sequence_length


def _pieces(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
  """Lays tokens end to end and cuts them, across lines and epochs.

  With a length of 4:

      before  a b c | d e f g h i j | k l
      after   a b c d | e f g h | i j k l
  """
  tokens = dataset.map(lambda example: example['targets']).unbatch()
  pieces = tokens.batch(length)
  # In a last piece of one token, nothing is left to predict it from.
  pieces = pieces.filter(lambda piece: tf.size(piece) > 1)
  return pieces.map(lambda piece: {'targets': piece})


def prepend_sentinel(
  dataset: tf.data.Dataset,
  output_features: Mapping[str, seqio.Feature],
  feature: str = 'targets',
  offset: int = 0,
) -> tf.data.Dataset:
  """A preprocessor: puts the sentinel <extra_id_{offset}> before a feature.

  A model trained by span corruption alone has seen only targets that begin with
  a sentinel. Downstream tasks may suit it better if their targets begin with
  one too (Lester et al., 2021, section 2.2, "Span Corruption + Sentinel"). Use
  it after tokenize and before EOS is appended.
  """
  sentinel = output_features[feature].vocabulary.vocab_size - 1 - offset

  def prepend(example):
    tokens = example[feature]
    first = tf.constant([sentinel], tokens.dtype)
    return {**example, feature: tf.concat([first, tokens], 0)}

  return dataset.map(prepend, num_parallel_calls=tf.data.AUTOTUNE)


def prepend_prefix(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """A preprocessor: puts the ids in `prefix` before the tokens of `inputs`.

  The ids say which task a row belongs to, see `prefixes`. Use it after tokenize
  and before EOS is appended.
  """

  def prepend(example):
    inputs = tf.concat([example['prefix'], example['inputs']], 0)
    return {'inputs': inputs, 'targets': example['targets']}

  return dataset.map(prepend, num_parallel_calls=tf.data.AUTOTUNE)


def _text_to_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
  spec = dataset.element_spec
  if not isinstance(spec, Mapping) or 'text' not in spec:
    raise UserError(
      f'The source has examples of {spec}, expected a field named text. Use '
      'text_files, or a source that maps its examples to {"text": ...}.'
    )
  return dataset.map(lambda example: {'targets': example['text']})


def _add(name, source, vocabulary, objective) -> seqio.Task:
  feature = seqio.Feature(vocabulary, add_eos=True)
  return seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[
      _text_to_targets,
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
      # Random steps come after the cache, so a cached task still draws anew.
      seqio.CacheDatasetPlaceholder(),
      objective,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature, 'targets': feature},
  )


def add_span_corruption(
  name: str,
  source: seqio.DataSource,
  vocabulary: seqio.Vocabulary,
  noise_density: float = NOISE_DENSITY,
  mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
  sentinel_first: bool = True,
) -> seqio.Task:
  """Registers a task of span corruption, without metrics.

  Args:
    name: The task's name.
    source: A source of examples with a field `text`.
    vocabulary: It needs as many sentinels (extra_ids) as a piece has spans.
    noise_density: As for `span_corruption`.
    mean_noise_span_length: As for `span_corruption`.
    sentinel_first: As for `span_corruption`.

  Raises:
    ValueError: A task has this name. Values that do not suit
      TASK_FEATURE_LENGTHS raise when the task is read.
  """
  objective = functools.partial(
    span_corruption,
    noise_density=noise_density,
    mean_noise_span_length=mean_noise_span_length,
    sentinel_first=sentinel_first,
  )
  return _add(name, source, vocabulary, objective)


def add_prefix_lm(
  name: str, source: seqio.DataSource, vocabulary: seqio.Vocabulary
) -> seqio.Task:
  """Registers a task of prefix language modelling, without metrics.

  Arguments and errors are as for `add_span_corruption`, but it needs no
  sentinels.
  """
  return _add(name, source, vocabulary, prefix_lm)
