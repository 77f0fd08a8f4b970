"""Rows of a data set to text: `inputs` and `targets`, before tokenisation.

Every function here is a SeqIO preprocessor from a `tf.data.Dataset` to another.
The texts are exactly those of T5's training (Raffel et al., 2020, appendix D),
including blanks, because a prompt works best if a T5 checkpoint gets its inputs
in the form that it was trained on. In a few rows the reference implementation's
text is clearly a mistake; then the docstring says what we do instead.

A row without a label (-1 in TFDS) has the target '<unk>', and metrics ignore
it.
"""

from collections.abc import Mapping, Sequence

import tensorflow as tf

from ptune.tasks.metrics import UNLABELLED

Example = Mapping[str, tf.Tensor]


def _map(dataset: tf.data.Dataset, function) -> tf.data.Dataset:
  return dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE)


def _words(*parts: str | tf.Tensor) -> tf.Tensor:
  """Joins parts with blanks and keeps all their characters."""
  return tf.strings.join(parts, separator=' ')


def one_blank(text: tf.Tensor) -> tf.Tensor:
  """Replaces each run of ASCII white space with one blank."""
  return tf.strings.regex_replace(text, r'\s+', ' ')


def pad_punctuation(text: tf.Tensor) -> tf.Tensor:
  """Puts blanks around ASCII punctuation: 'a.b' -> 'a . b', 'a.' -> 'a . '."""
  return one_blank(tf.strings.regex_replace(text, r'([[:punct:]])', r' \1 '))


def remove_first_word(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Removes the inputs' first word, which names the data set."""

  def remove(example):
    rest = tf.strings.regex_replace(
      example['inputs'], r'^[^ ]* ', '', replace_global=False
    )
    return {**example, 'inputs': rest}

  return _map(dataset, remove)


def _label_text(label: tf.Tensor, labels: Sequence[str]) -> tf.Tensor:
  """Returns a label's text; a label out of range stops the run."""
  if label.dtype == tf.string:
    label = tf.strings.to_number(label, tf.int64)
  names = tf.constant([UNLABELLED, *labels])
  return tf.gather(names, tf.cast(label, tf.int64) + 1)


def _index(example: Example) -> dict[str, tf.Tensor]:
  """Returns the row's number: `idx`, or `idx/question` and the like."""
  idx = example.get('idx')
  if isinstance(idx, Mapping):
    return {f'idx/{name}': value for name, value in idx.items()}
  return {} if idx is None else {'idx': idx}


def classification(
  dataset: tf.data.Dataset,
  name: str,
  fields: Sequence[str] | Mapping[str, str],
  labels: Sequence[str],
  html: bool = False,
  collapse: bool = False,
) -> tf.data.Dataset:
  """Converts rows of text fields with an integer label.

      before  {'hypothesis': 'B.', 'premise': 'A.', 'label': 0, 'idx': 7}
      after   {'inputs': 'mnli hypothesis: B. premise: A.',
               'targets': 'entailment', 'idx': 7}

  Args:
    dataset: The rows.
    name: The first word of the inputs.
    fields: The columns in the order of the inputs; a mapping gives the word
      before each column.
    labels: The text of each label.
    html: Whether to remove MultiRC's markup: <br> becomes a blank, <b> nothing.
    collapse: Whether to replace runs of white space with one blank.
  """
  if not isinstance(fields, Mapping):
    fields = {field: field for field in fields}

  def to_text(row):
    parts = [name]
    for word, column in fields.items():
      value = row[column]
      if html:
        value = tf.strings.regex_replace(value, '<br>', ' ')
        value = tf.strings.regex_replace(value, '</?b>', '')
      parts += [f'{word}:', value]
    inputs = _words(*parts)
    return {
      'inputs': one_blank(inputs) if collapse else inputs,
      'targets': _label_text(row['label'], labels),
      **_index(row),
    }

  return _map(dataset, to_text)


def sts_b(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """STS-B: a similarity from 0 to 5, as the text of the nearest fifth.

  A value halfway between two fifths rounds to the even one, as in T5: 2.5 ->
  '2.4'. T5 gives an unlabelled row the target '-1.0' and may write '-0.0'; here
  an unlabelled row has '<unk>', and no target is '-0.0'.
  """

  def to_text(row):
    fifths = tf.abs(tf.round(row['label'] * 5) / 5)
    text = tf.strings.as_string(fifths, precision=1)
    return {
      'inputs': _words(
        'stsb sentence1:', row['sentence1'], 'sentence2:', row['sentence2']
      ),
      'targets': tf.where(row['label'] < 0, UNLABELLED, text),
      'idx': row['idx'],
    }

  return _map(dataset, to_text)


def record(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """ReCoRD: a passage, and a query with a gap for an entity.

  Each row becomes one example for each answer; these differ only in the target.
  A row without answers becomes one example with the target '<unk>'.
  """

  def to_text(row):
    passage = row['passage']
    # A highlight begins a sentence, so the sentence before it gets a full stop.
    for pattern, end in (
      (r"""([.?!"'])\n@highlight\n""", r'\1 '),
      (r'\n@highlight\n', '. '),
    ):
      passage = tf.strings.regex_replace(passage, pattern, end)
    inputs = _words(
      'record query:',
      row['query'],
      'entities:',
      tf.strings.reduce_join(row['entities'], separator=', '),
      'passage:',
      passage,
    )
    return {'inputs': inputs, 'answers': row['answers'], **_index(row)}

  def for_each_answer(example):
    answers = example['answers']
    none = tf.constant([UNLABELLED])
    targets = tf.cond(tf.size(answers) > 0, lambda: answers, lambda: none)
    each = tf.data.Dataset.from_tensor_slices(targets)
    return each.map(lambda target: {**example, 'targets': target})

  return _map(dataset, to_text).flat_map(for_each_answer)


def wsc(
  dataset: tf.data.Dataset, only_correct: bool = False
) -> tf.data.Dataset:
  """WSC as generation: a text with a marked pronoun -> the noun it stands for.

      before  {'text': 'Ann left as she was ill.', 'span2_text': 'she', ...}
      after   {'inputs': 'wsc: Ann left as *she* was ill.', 'targets': 'Ann'}

  We mark the pronoun nearest to the row's index, and separate it from
  punctuation. T5's own code also marks every word ' X ' of the text, and leaves
  a blank after a pronoun at the end. It stops if the pronoun is the first word
  or is not at the row's index. We do none of that.

  Args:
    dataset: The rows of super_glue/wsc.fixed.
    only_correct: Whether to leave out rows whose candidate is wrong, because
      they cannot be trained on.

  Raises:
    InvalidArgumentError: On reading, a text does not contain its pronoun.
  """

  def to_text(row):
    pronoun = tf.strings.strip(row['span2_text'])
    words = tf.strings.split(row['text'])
    quoted = tf.strings.join([r'(?i)^([[:punct:]]*)(\Q', pronoun, r'\E)'])
    pattern = tf.strings.join([quoted, r'([[:punct:]].*)?$'])
    places = tf.where(tf.strings.regex_full_match(words, pattern))[:, 0]
    found = tf.debugging.assert_positive(
      tf.size(places), 'a text of WSC does not have its pronoun as a word'
    )
    with tf.control_dependencies([found] if found is not None else []):
      place = tf.cast(row['span2_index'], tf.int64)
      nearest = places[tf.argmin(tf.abs(places - place))]
    marked = tf.strings.regex_replace(words, pattern, r'\1*\2* \3')
    here = tf.range(tf.size(words, tf.int64)) == nearest
    text = tf.where(here, tf.strings.strip(marked), words)
    return {
      'inputs': _words('wsc:', tf.strings.reduce_join(text, separator=' ')),
      'targets': row['span1_text'],
      'label': row['label'],
      'idx': row['idx'],
    }

  if only_correct:
    dataset = dataset.filter(lambda row: row['label'] != 0)
  return _map(dataset, to_text)


def definite_pronoun(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """DPR in WSC's form: marks the first place where the pronoun is a word.

  T5's own code marks it only between a blank and a blank, full stop or comma,
  so not at the start of a sentence, and sometimes marks a later place instead.
  """

  def to_text(row):
    pattern = tf.strings.join([r'\b(\Q', row['pronoun'], r'\E)\b'])
    text = tf.strings.regex_replace(
      row['sentence'], pattern, r'*\1*', replace_global=False
    )
    names = tf.concat([[UNLABELLED], row['candidates']], 0)
    return {
      'inputs': _words('wsc:', text),
      'targets': names[row['label'] + 1],
    }

  return _map(dataset, to_text)


def _answered(answers: tf.Tensor) -> tf.Tensor:
  """Returns the first of padded answers, '<unk>' if there are none."""
  first = tf.concat([answers, [UNLABELLED]], 0)[0]
  return tf.strings.strip(first)


def squad(
  dataset: tf.data.Dataset, with_context: bool = True
) -> tf.data.Dataset:
  """SQuAD: a question and its context -> the first answer.

  Punctuation has blanks around it. T5 leaves a blank after a target that ends
  with punctuation, and stops on a question without answers; here there is no
  such blank, and the target is '<unk>'.
  """

  def to_text(row):
    question = pad_punctuation(row['question'])
    context = pad_punctuation(row['context'])
    answers = pad_punctuation(row['answers']['text'])
    if with_context:
      parts = 'question:', question, 'context:', context
    else:
      parts = 'squad trivia question:', question
    return {
      'inputs': one_blank(_words(*parts)),
      'targets': _answered(answers),
      'id': row['id'],
      'context': context,
      'question': question,
      'answers': answers,
    }

  return _map(dataset, to_text)


def mrqa(dataset: tf.data.Dataset, name: str = '') -> tf.data.Dataset:
  """MRQA in SQuAD's form; the inputs begin with `name` if it is given."""

  def to_text(row):
    question = pad_punctuation(row['question'])
    context = pad_punctuation(row['context'])
    answers = pad_punctuation(row['answers'])
    parts = ['question:', question, 'context:', context]
    return {
      'inputs': one_blank(_words(*([name] if name else []), *parts)),
      'targets': _answered(answers),
      'idx': row['qid'],
      'question': question,
      'context': context,
      'answer': _answered(answers),
      'answers': answers,
    }

  return _map(dataset, to_text)


def generation(
  dataset: tf.data.Dataset, prefix: str, source: str, target: str
) -> tf.data.Dataset:
  """One column to another, with a prefix such as 'summarize:'."""

  def to_text(row):
    return {'inputs': _words(prefix, row[source]), 'targets': row[target]}

  return _map(dataset, to_text)
