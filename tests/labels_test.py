"""Labels that a vocabulary cannot encode are compared in their decoded form."""

import logging as python_logging

import pytest
import sentencepiece

from ptune.convert.vocabulary import open_vocabulary
from ptune.data import seqio_task
from ptune.errors import UserError
from ptune.tasks import files
from ptune.tasks import labels as labels_lib

LENGTHS = {'inputs': 32, 'targets': 24}
# The vocabulary has no piece for `<`, like T5's. The others have two blanks,
# outer blanks, a line end and a ligature.
ODD = ['<=50K', 'no  way', ' yes ', 'two\nlines', 'ﬁne']
LETTERS = 'abc def ghi jkl mno pqr stu vwxyz =50K >50K'


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  """Trains a vocabulary of letters and digits without bytes, like T5's."""
  file = tmp_path_factory.mktemp('pieces') / 'letters.model'
  with file.open('wb') as model:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([LETTERS] * 9),
      model_writer=model,
      vocab_size=38,
      hard_vocab_limit=False,
      **{'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1},
      minloglevel=2,
    )
  return open_vocabulary(str(file), 20)


def rows(labels):
  return {'train': [(f'row {label}', label) for label in labels]}


def task_of(labels, vocabulary, **settings):
  return files.from_rows(
    rows(labels), label_names=labels, vocabulary=vocabulary, **settings
  )


def said(vocabulary, text):
  return vocabulary.decode(vocabulary.encode(text))


def test_the_labels_of_these_tests_are_written_in_another_way(vocabulary):
  assert all(said(vocabulary, label) != label for label in ODD)
  assert said(vocabulary, '>50K') == '>50K'


@pytest.mark.parametrize('rank', [False, True])
def test_an_answer_is_the_label_that_the_vocabulary_writes(
  rank, caplog, vocabulary
):
  task = task_of(ODD, vocabulary, rank=rank)
  ids = labels_lib.of(task.postprocess_fn)
  for number, label in enumerate(ODD):
    assert ids(said(vocabulary, label), is_target=False) == number
    assert ids(label, is_target=True) == number
  assert ids('another', is_target=False) == -1
  assert ids('<unk>', is_target=True) == -1  # This row has no label.
  seqio_task.check(task, LENGTHS, 'train')


def test_the_labels_that_are_changed_are_logged(caplog, vocabulary):
  with caplog.at_level(python_logging.WARNING):
    labels_lib.written([*ODD, '>50K'], vocabulary)
  (line,) = [r.getMessage() for r in caplog.records]
  assert all(repr(label) in line for label in ODD)
  assert '>50K' not in line
  caplog.clear()
  with caplog.at_level(python_logging.WARNING):
    labels_lib.written(['good', 'bad'], vocabulary)
  assert not caplog.records


@pytest.mark.parametrize(
  'labels',
  [['<no', '{no'], ['a b', 'a  b'], ['a', 'a '], ['x', '\u200b'], ['fi', 'ﬁ']],
)
def test_labels_that_become_the_same_are_refused(labels, vocabulary):
  task = task_of(labels, vocabulary)
  with pytest.raises(UserError, match='cannot distinguish or cannot write'):
    seqio_task.check(task, LENGTHS, 'train')


def test_labels_that_are_cut_are_refused_with_the_length_that_is_needed(
  vocabulary,
):
  label = 'a rather long label'
  need = len(vocabulary.encode(label)) + 1
  task = task_of(['short', label], vocabulary)
  for length in (need - 1, 1):
    with pytest.raises(UserError, match=f'{label}.*; they need {need} tokens'):
      seqio_task.check(task, {'inputs': 8, 'targets': length}, 'train')
    with pytest.raises(UserError, match=f'CLASS_LABELS: .* need {need} tokens'):
      seqio_task.target_ids(
        ['short', label], {'inputs': 8, 'targets': length}, task
      )
  seqio_task.check(task, {'inputs': 8, 'targets': need}, 'train')


def test_texts_are_matched_as_they_are_written(vocabulary):
  task = files.from_rows(rows(ODD), vocabulary=vocabulary)
  (exact_match,) = task.metric_fns
  targets = [task.postprocess_fn(label, is_target=True) for label in ODD]
  answers = [task.postprocess_fn(said(vocabulary, label)) for label in ODD]
  assert exact_match(targets, answers) == {'exact_match': 100.0}
  assert exact_match(targets, answers[::-1])['exact_match'] < 100
  # ROUGE compares with the original text.
  task = files.from_rows(rows(ODD), vocabulary=vocabulary, metrics=['rouge'])
  assert task.postprocess_fn is None


def test_tasks_of_the_library_compare_alike(monkeypatch, vocabulary):
  import seqio

  from ptune.tasks import metrics, registry

  seqios = seqio.SentencePieceVocabulary(vocabulary.file, extra_ids=20)
  feature = seqio.Feature(seqios, add_eos=True)
  monkeypatch.setattr(
    registry, 'features', lambda _: {'inputs': feature, 'targets': feature}
  )
  source = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: None, ['train']
  )
  registry.register(
    'odd_labels',
    source,
    [],
    metrics=[metrics.accuracy],
    labels=ODD,
    other_words={'ok': ' yes '},
    sentinel_name='odd_labels_sentinel',
  )
  registry.register(
    'odd_labels_alike', source, [], labels=['<no', '{no'], metrics=[]
  )
  task = seqio.get_mixture_or_task('odd_labels')
  for number, label in enumerate(ODD):
    answer = said(vocabulary, label)
    assert task.postprocess_fn(answer, example={}, is_target=False) == number
    assert task.postprocess_fn(label, example={}, is_target=True) == number
  assert task.postprocess_fn('ok', example={}, is_target=False) == 2
  other = seqio.get_mixture_or_task('odd_labels_sentinel')
  answer = f'<extra_id_0> {said(vocabulary, ODD[1])}'
  assert other.postprocess_fn(answer, example={}, is_target=False) == 1
  seqio_task.check(task, LENGTHS, 'train')
  with pytest.raises(UserError, match='do not fit TASK_FEATURE_LENGTHS'):
    seqio_task.check(task, {'inputs': 8, 'targets': 3}, 'train')
  for name in ('odd_labels_alike', 'odd_labels_alike_rank'):
    with pytest.raises(UserError, match='cannot distinguish'):
      seqio_task.check(seqio.get_mixture_or_task(name), LENGTHS, 'train')
