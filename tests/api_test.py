"""The Python API runs the same programs as the command line."""

import doctest
import json
import pathlib
import shutil
import types

import numpy as np
import pytest

import gin
import ptune
from ptune import cli
from ptune.api import calls, prompt_bank, tuned
from ptune.api import rows as rows_lib
from ptune.convert import publish
from ptune.errors import UserError
from ptune.tasks import files
from tests import tiny
from tests.imports_test import loaded_by

PAIRS = [('so good', 'yes'), ('so bad', 'no'), ('good', 'yes'), ('bad', 'no')]
TRAIN, DEV = PAIRS * 4, PAIRS
LABELS = ['no', 'yes']
SMALL = {'prompt_length': 3, 'batch_size': 8, 'labels': LABELS, 'seed': 1}
TEXTS = ['so good', 'not that bad', 'good']


@pytest.fixture(autouse=True, scope='module')
def one_device():
  with tiny.one_device():
    yield


@pytest.fixture(scope='module')
def base():
  return ptune.load('ptune://tiny')


@pytest.fixture(scope='module')
def run(base, tmp_path_factory):
  """Returns the result of `tune` on pairs, at its best step."""
  directory = tmp_path_factory.mktemp('runs') / 'run'
  return ptune.tune(
    base, TRAIN, validation=DEV, steps=4, model_dir=directory, **SMALL
  )


# ------------------------------------------------------------------- training


def test_tune_is_ptune_train_to_the_bit(run, tmp_path):
  for split, rows in (('train', TRAIN), ('dev', DEV)):
    lines = [f'{text},{label}\n' for text, label in [('t', 'l'), *rows]]
    (tmp_path / f'{split}.csv').write_text(''.join(lines))
  gin.clear_config()
  status = cli.main(
    [
      'train',
      '--base=ptune://tiny',
      f'--train={tmp_path}/train.csv',
      f'--validation={tmp_path}/dev.csv',
      *('--inputs={t}', '--targets={l}', '--labels=no,yes', '--steps=4'),
      *('--prompt_length=3', '--batch_size=8', '--seed=1'),
      f'--model_dir={tmp_path}/run',
    ]
  )
  gin.clear_config()
  assert status == 0
  ours, theirs = tiny.files(run.directory), tiny.files(tmp_path / 'run')
  assert ours['prompts/best.npy'] == theirs['prompts/best.npy']
  assert tiny.records(run.directory) == tiny.records(tmp_path / 'run')
  plain = lambda names: {n for n in names if '/' not in n or 'prompts/' in n}
  assert plain(ours) == plain(theirs)


def test_the_same_call_goes_on_and_a_finished_run_is_as_it_is(
  base, run, tmp_path
):
  settings = {'validation': DEV, 'model_dir': tmp_path / 'run', **SMALL}
  ptune.tune(base, TRAIN, steps=2, **settings)
  again = ptune.tune(base, TRAIN, steps=4, **settings)
  assert np.array_equal(
    np.load(tmp_path / 'run/prompts/step_4.npy'),
    np.load(run.directory / 'prompts/step_4.npy'),
  )
  before = tiny.files(again.directory)
  ptune.tune(base, TRAIN, steps=4, **settings)
  assert tiny.files(again.directory) == before
  with pytest.raises(UserError, match='a run that is not this one'):
    ptune.tune(base, TRAIN, steps=4, **{**settings, 'seed': 2})


def test_a_run_keeps_the_rows_from_python(base, run, tmp_path):
  moved = shutil.copytree(run.directory, tmp_path / 'moved')
  expected = run.evaluate(DEV)
  assert ptune.load(moved).evaluate() == run.evaluate() == expected
  assert (
    cli.main(['eval', f'{moved}', f'--eval_output_dir={tmp_path}/eval']) == 0
  )
  (told,) = tiny.records(tmp_path / 'eval')
  assert told['accuracy'] == expected['accuracy']
  again = {'base': base, 'steps': 4, 'model_dir': moved, **SMALL}
  other = [*TRAIN[:2], ('good', 'no'), *TRAIN[3:]]
  for split, rows, message in (
    ('train', other, r'train\[2\] is {"inputs": "good", "targets": "no"}, but'),
    ('train', TRAIN[:3], r'train\[3\] is missing, but the run in .*moved was'),
    (
      'validation',
      [*DEV, DEV[0]],
      r'validation\[4\] .* with no such row. Give',
    ),
  ):
    given = {'train': TRAIN, 'validation': DEV, split: rows}
    with pytest.raises(UserError, match=message):
      ptune.tune(**given, **again)


def test_rows_are_kept_as_the_same_texts(tmp_path):
  numpy_row = {
    't': np.str_('é\x01\u2028"'),
    'n': np.float32(0.1),
    'l': np.int64(1),
  }
  rows = [numpy_row, {'t': 'a\nb', 'n': 1e22, 'l': None}, {'t': 1, 'n': True}]
  rows += [
    {'t': '', 'n': -0.0, 'l': 'no'},
    {'t': 'c', 'n': 1, 'l': float('nan')},
  ]
  how = {'inputs': '{t} {n}', 'targets': '{l}', 'label_names': LABELS}
  task = files.from_rows({'train': rows}, skip_bad_rows=True, **how)
  (tmp_path / 'train.jsonl').write_text(
    files.as_jsonl([{**row, 'x': object()} for row in rows], task.templates)
  )
  kept = files.from_files({'train': f'{tmp_path}/train.jsonl'}, **how)
  assert kept.texts('train') == task.texts('train')
  assert task.texts('train')['targets'] == ['yes', '<unk>', 'no']


class Dataset:
  """The parts of a Hugging Face Dataset that ptune reads: rows, label names."""

  def __init__(self, rows):
    label = types.SimpleNamespace(names=LABELS)
    self.rows, self.features = rows, {'l': label, 't': object()}

  def __iter__(self):
    return iter(self.rows)


def test_a_temporary_run_is_the_same_run_and_goes_with_its_model(base, run):
  tuned = ptune.tune(base, TRAIN, validation=DEV, steps=4, **SMALL)
  np.testing.assert_array_equal(tuned.prompt, run.prompt)
  directory = tuned.directory
  # A temporary run draws no curves, because nobody would look at them.
  files = {path.name for path in run.directory.iterdir()} - {'curves.png'}
  assert {path.name for path in directory.iterdir()} == files
  del tuned
  assert not directory.exists()


def test_rows_of_every_kind_are_the_same_texts(tmp_path, base):
  pandas = pytest.importorskip('pandas')
  dicts = [{'t': text, 'l': label} for text, label in PAIRS]
  frame = pandas.DataFrame(dicts)
  numbered = [{**row, 'l': LABELS.index(row['l'])} for row in dicts]
  # The last kind imitates a Dataset, with labels as numbers and their names.
  named = {'inputs': '{t}', 'targets': '{l}'}
  for rows, templates in (
    *((PAIRS, {}), (tuple(map(list, PAIRS)), {}), (dicts, named)),
    *((iter(dicts), named), (frame, named), (Dataset(numbered), named)),
  ):
    given = {'train': rows_lib.taken('train', rows)['train']}
    settings = rows_lib.prepared(templates, given, 'run')
    assert settings.pop('train') == 'run/rows/train.jsonl'
    task = files.from_rows(
      given,
      settings['inputs'],
      settings['targets'],
      settings.get('labels', LABELS),
      vocabulary=base.vocabulary,
    )
    texts = task.texts('train')
    assert list(zip(texts['inputs'], texts['targets'], strict=True)) == PAIRS


def test_pairs_are_trained_on_and_asked_without_tensorflow():
  loaded, _ = loaded_by(
    'import ptune\n'
    "rows = [('so good', 'yes'), ('so bad', 'no')] * 4\n"
    "tuned = ptune.tune('ptune://tiny', rows, validation=rows, steps=1,\n"
    "  batch_size=8, prompt_length=2, labels=['no', 'yes'])\n"
    "assert isinstance(tuned.predict('so good'), str)\n"
    "assert sum(tuned.classify('so good').values()) > 0.99\n",
    tiny.environment(),
  )
  assert loaded == ['jax', 'orbax']


def test_gin_has_what_it_had_before(run):
  gin.clear_config()
  gin.bind_parameter('optim.schedule.warmup_steps', 7)
  before = gin.config_str()
  run._read()
  assert gin.config_str() == before
  gin.clear_config()


@pytest.mark.slow
def test_a_loss_is_chosen_by_its_name(base, tmp_path):
  private = ptune.tune(
    base,
    TRAIN,
    steps=2,
    loss='private',
    class_labels=LABELS,
    noise_multiplier=4.0,
    delta=0.01,
    model_dir=tmp_path / 'private',
    **SMALL,
  )
  facts = json.loads(
    (private.directory / 'prompts' / 'step_2.json').read_text()
  )
  assert facts['privacy']['epsilon'] > 0
  swapped = [(text, {'yes': 'no', 'no': 'yes'}[label]) for text, label in TRAIN]
  one, other = (
    ptune.tune(
      base,
      rows,
      steps=2,
      method='from_context',
      loss='distill',
      context='so very good',
      dropout_rate=0.0,
      **SMALL,
    ).prompt
    for rows in (TRAIN, swapped)
  )
  assert np.array_equal(one, other)  # Distillation ignores targets.


# --------------------------------------------------------------------- asking


def test_a_list_gives_a_list_and_a_text_a_text(run):
  answers = run.predict(TEXTS)
  assert len(answers) == 3 and all(isinstance(x, str) for x in answers)
  assert run.predict(TEXTS[1]) == answers[1]
  assert run.predict({'inputs': TEXTS[1]}) == answers[1]


def test_an_evaluation_is_that_of_training(run):
  (recorded,) = [r for r in run.history if 'task' in r]
  about = ('step', 'split', 'task')
  expected = {k: v for k, v in recorded.items() if k not in about}
  assert run.evaluate(DEV) == pytest.approx(expected, rel=1e-6)
  # The recorded scores are of a split in a file with the same rows.
  assert run.step == recorded['step'] == 4


def test_probabilities_of_labels_are_those_of_the_model(run):
  told = run.classify(TEXTS)
  assert [list(row) for row in told] == [LABELS] * 3
  assert [sum(row.values()) for row in told] == pytest.approx([1.0] * 3)
  other = run.classify(TEXTS[0], labels=['yes', 'no', 'maybe'])
  # In the model, the ratio of two labels does not depend on other labels.
  assert other['yes'] / other['no'] == pytest.approx(
    told[0]['yes'] / told[0]['no'], rel=1e-4
  )


def test_what_is_written_is_read_back(base, run, tmp_path):
  expected = run.predict(TEXTS)
  run.save(tmp_path / 'prompt.npy')
  run.export(tmp_path / 'peft')
  assert np.array_equal(np.load(tmp_path / 'prompt.npy'), run.prompt)
  for name in ('prompt.npy', 'peft'):
    assert ptune.load(tmp_path / name, base).predict(TEXTS) == expected
  loaded = ptune.load(run.directory / 'prompts/best.npy')  # Its run says more.
  assert ptune.load(run.directory).predict(TEXTS) == expected
  told, ours = loaded.evaluate(DEV), run.evaluate(DEV)
  for metric in ('loss', 'token_accuracy'):
    assert told[metric] == pytest.approx(ours[metric], rel=1e-5)
  with pytest.raises(UserError, match='does not name its base'):
    ptune.load(tmp_path / 'prompt.npy')


def test_a_bank_answers_each_text_by_its_own_prompt(base, run, tmp_path):
  other = np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)
  np.save(tmp_path / 'other.npy', other)
  bank = ptune.bank(base, one=run, two=tmp_path / 'other.npy')
  one, two = (bank.predict(TEXTS, name) for name in ('one', 'two'))
  assert one == run.predict(TEXTS)
  assert two == ptune.load(tmp_path / 'other.npy', base).predict(TEXTS)
  assert bank.predict(TEXTS, ['one', 'two', 'one']) == [one[0], two[1], one[2]]
  bank.add('three', other)
  assert bank.vote(TEXTS) == two  # Two of the three agree.
  bank.remove('three')
  assert bank.names == ['one', 'two']


def test_names_in_a_bank_are_texts(base):
  bank = ptune.bank(base)
  for act in (bank.remove, lambda name: bank.add(name, np.ones((2, 96)))):
    for name in ([], None, '\ud800'):
      with pytest.raises(UserError, match='the name of a prompt is'):
        act(name)


@pytest.mark.parametrize('path', ['', 5, [], '\0'])
def test_a_vocabulary_is_a_path(path):
  with pytest.raises(UserError, match=r'vocabulary is .*; expected a path'):
    ptune.load('ptune://tiny', vocabulary=path)


def test_history_is_drawn(run):
  figure = run.plot()
  assert [axes.get_xlabel() for axes in figure.axes] == ['step', 'step']
  assert [r['split'] for r in run.history] == ['train', 'validation']


def test_a_prompt_goes_to_the_hub(run, monkeypatch):
  def push(path, name, *, base, private):
    assert path == run.directory and base == 'ptune://tiny' and private
    return ['wrote ...', f'hf://{name}']

  monkeypatch.setattr(publish, 'push', push)  # See publish_test.
  assert run.push_to_hub('me/prompt', private=True) == 'hf://me/prompt'


# ------------------------------------------------------------------ bad input


def test_a_run_resumes_only_with_the_same_texts(base, tmp_path):
  rows = tmp_path / 'train.csv'
  rows.write_text('inputs,targets\nso good,1\nso dull,0\n')

  def tune(**changes):
    given = {**SMALL, 'steps': 1, 'batch_size': 2, **changes}
    return ptune.tune(base, str(rows), model_dir=tmp_path / 'run', **given)

  tune()
  for changes in ({'labels': LABELS[::-1]}, {'inputs': 'it is {inputs}'}):
    with pytest.raises(UserError, match='training texts') as error:
      tune(steps=2, **changes)
    assert 'Nothing was changed' in str(error.value)
  with rows.open('a') as f:
    f.write('fine,1\n')
  for steps in (1, 2):  # A run that is finished does not hide the change.
    with pytest.raises(UserError, match='training texts'):
      tune(steps=steps)
  rows.write_text('inputs,targets\nso good,yes\nso dull,no\n')
  assert tune(steps=2).step == 2  # The texts are the same.


def test_a_run_resumes_only_with_comparable_scores(base, tmp_path, caplog):
  rows = tmp_path / 'train.csv'
  rows.write_text('inputs,targets\nso good,yes\nso dull,no\n')
  dev, other = tmp_path / 'dev.csv', tmp_path / 'other.csv'
  dev.write_text('inputs,targets\nso good,yes\n')
  other.write_text('inputs,targets\nso dull,no\n')

  def tune(**changes):
    given = {**SMALL, 'validation': dev, 'steps': 1, 'batch_size': 2}
    given |= changes
    return ptune.tune(base, rows, model_dir=tmp_path / 'run', **given)

  tune()
  for changes, message in (
    ({'rank': True}, 'rank: False there, True here'),
    ({'metrics': ['macro_f1']}, r"metrics: \['accuracy'\] there"),
    ({'best_metric': 'accuracy'}, "best_metric: None there, 'accuracy' here"),
    ({'validation': other}, 'texts that are evaluated'),
    ({'loss': 'perceptron', 'class_labels': LABELS}, 'loss: .*perceptron'),
  ):
    with pytest.raises(UserError, match=message):
      tune(**changes)
  caplog.clear()
  tune(learning_rate=0.1, bindings=["optim.schedule.decay = 'linear'"])
  tune(steps=2, learning_rate=0.1)
  first, second = (
    record.getMessage()
    for record in caplog.records
    if 'not those of the last start' in record.getMessage()
  )
  assert first.endswith(
    ": learning_rate 0.3 before, 0.1 now; optim.schedule.decay 'constant'"
    " before, 'linear' now"
  )
  assert second.endswith(
    ': learning_rate 0.3 before, 0.1 now; steps 1 before, 2 now'
  )


class DataSet(list):
  """Rows with the names of their labels, as a Hugging Face Dataset has them."""

  def __init__(self, names):
    super().__init__([{'t': 'so good', 'l': 1}, {'t': 'so bad', 'l': 0}])
    self.features = {'t': None, 'l': types.SimpleNamespace(names=names)}


def test_numbers_of_a_data_set_keep_their_meaning(base, tmp_path):
  ours, swapped = DataSet(LABELS), DataSet(LABELS[::-1])
  own = {k: v for k, v in SMALL.items() if k != 'labels'}

  def tune(train=ours, validation=None, targets='{l}', **more):
    columns = {'inputs': '{t}', 'targets': targets, 'steps': 1}
    return ptune.tune(
      base, train, validation=validation, **columns, **own, **more
    )

  with pytest.raises(
    UserError, match=r'^validation has the labels .* one order'
  ):
    tune(validation=swapped)
  with pytest.raises(UserError, match=r'^train has the labels .* one order'):
    tune(labels=LABELS[::-1])
  with pytest.raises(UserError, match=r'^test has the labels .* one order'):
    tune().evaluate(swapped)
  told = tune(targets='it is {l}', labels=['bad', 'good']).classify('a')
  assert list(told) == ['it is bad', 'it is good']
  assert list(tune(targets='it is {l}').classify('a')) == [
    'it is no',
    'it is yes',
  ]


def test_a_dict_of_splits_is_told_from_rows(base):
  with pytest.raises(UserError, match=r"such as train=data\['train'\]"):
    ptune.tune(base, {'train': DataSet(LABELS), 'test': DataSet(LABELS)})


def test_the_columns_of_a_frame_are_texts(base):
  pandas = pytest.importorskip('pandas')
  frame = pandas.DataFrame([['so good', 'yes'], ['so bad', 'no']])
  assert rows_lib.Rows('train', frame)[0] == {'0': 'so good', '1': 'yes'}
  frame.columns = ['text', 'text']
  with pytest.raises(UserError, match='train has columns of the same name'):
    rows_lib.Rows('train', frame)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'train': []}, 'train has no rows'),
    ({'validation': []}, 'validation has no rows'),
    ({'train': 5}, 'train is int 5; expected pairs of input'),
    ({'train': [('a', 'yes'), ('b',)]}, r'train\[1\].* is not a row; expected'),
    ({'train': [('a', 'yes'), ('b', 'good')]}, r"train\[1\]: .*'good'"),
    ({'train': [('a', 'yes'), (float('nan'), 'no')]}, r'train\[1\].* is nan'),
    ({'inputs': '{text}'}, r"train\[0\].*: no column 'text', it has: inputs"),
    ({'validation': 'dev.csv'}, "'train'] are rows, and .'validation'] files"),
    ({'train': 'no.csv', 'validation': None}, 'no.csv'),
    ({'base': 'no/model'}, 'base: Nothing is at no/model'),
    ({'base': None}, "base is NoneType 'None'; expected a base model"),
    ({'method': 'promt'}, "no method 'promt'; did you mean prompt"),
    ({'promt_length': 5}, "no setting 'promt_length'; did you mean prompt_len"),
    ({'num_virtual_tokens': 5}, 'did you mean prompt_length'),
    (
      {'inputs': '{a}', 'targets': '{b}'},
      'rows, and train has no good one; na',
    ),
    ({'steps': 'many'}, "^steps .* is 'many'; expected a whole number"),
    ({'labels': ['yes']}, '^labels .*; expected a list with at least 2'),
    ({'learning_rate': float('nan')}, '^learning_rate .* is nan; expected a'),
    ({'method': 3}, '^method .* is 3; expected a text, such as .lora'),
    ({'model_dir': 3}, '^model_dir .* is 3; expected a path'),
    ({'bindings': 'optim.x = 1'}, 'No configurable matching .optim.; did'),
    ({'bindings': 5}, 'bindings is int 5; expected a list of texts'),
    ({'labels': ['a', 'a']}, 'two different names$'),
    ({'model_dir': 'hf://me/x'}, 'which cannot be written; choose a local dir'),
    ({'train': 'dev.cvs', 'validation': None}, "'dev.cvs', .* its own labels;"),
    ({'train': 'empty.csv', 'validation': None}, 'with no rows'),
    ({'bindings': {}}, 'bindings is dict {}; expected a list of texts'),
    ({'bindings': 0}, 'bindings is int 0; expected a list of texts'),
    ({'initial_checkpoint_path': 'x'}, 'initial_checkpoint_path exclude each'),
    ({'mixture_or_task_name': 'x'}, 'mixture_or_task_name exclude each other'),
    ({'train_steps': 3}, 'steps and train_steps exclude each other'),
  ],
)
def test_bad_input_is_named_and_nothing_is_written(
  base, change, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty.csv').write_text('inputs,targets\n')
  run = tmp_path / 'run'
  given = {'base': base, 'train': TRAIN, 'validation': DEV, 'steps': 2, **SMALL}
  with pytest.raises((UserError, FileNotFoundError), match=message):
    ptune.tune(**{**given, 'model_dir': run, **change})
  assert [path.name for path in tmp_path.iterdir()] == ['empty.csv']


def test_a_frame_with_a_hole_is_named_by_its_row(base):
  pandas = pytest.importorskip('pandas')
  named = {'inputs': '{t}', 'targets': '{l}', 'labels': LABELS}
  frame = pandas.DataFrame({'t': ['a', float('nan')], 'l': ['yes', 'no']})
  with pytest.raises(UserError, match=r"train\[1\]: column 't' is nan"):
    ptune.tune(base, frame, **named)
  frame = pandas.DataFrame({'t': ['a', 'b'], 'l': [1, float('nan')]})
  with pytest.raises(
    UserError, match=r"train\[1\]: .*'l' is nan, .* -1 or null"
  ):
    ptune.tune(base, frame, **named)


NAN = float('nan')


@pytest.mark.parametrize(
  ('ask', 'message'),
  [
    (lambda run: run.predict([]), 'inputs has no rows'),
    (lambda run: run.predict(None), 'inputs is NoneType None; expected a text'),
    (
      lambda run: run.predict(b'a'),
      "inputs is bytes b'a'; expected a text, or",
    ),
    (
      lambda run: run.predict(np.array('a')),
      'inputs is ndarray .*; expected a',
    ),
    (
      lambda run: run.predict(['a', 5]),
      r'inputs\[1\] is 5; expected a text, or',
    ),
    (lambda run: run.predict(['a', 'b\0']), r'inputs\[1\]: .* 2 is NUL'),
    (lambda run: run.predict([{'x': 1}]), r"inputs\[0\]: no column 'inputs'"),
    (lambda run: run.predict({'inputs': NAN}), r'inputs\[0\]: .* is nan'),
    (lambda run: run.classify('a', ['yes']), 'expected a list of two texts'),
    (lambda run: run.classify('a', 'yes'), "labels is str 'yes'; expected a"),
    (lambda run: run.classify('a', ['a', 0]), r'labels\[1\] is 0; expected a'),
    (lambda run: run.classify('a', ['a', 'b', 'a']), r"apart .*\['a', 'a'\]"),
    (lambda run: run.classify('a', ['a', '']), 'cannot write .*choose other'),
    (
      lambda run: run.classify('a', ['a', 'b ' * 40]),
      'do not fit task_feature',
    ),
    (lambda run: run.evaluate([('a', 'maybe')]), r"test\[0\]: .*'maybe'"),
    (
      lambda run: run.evaluate([('a', NAN)]),
      r'test\[0\]: .* nan, .* -1 or null',
    ),
    (lambda run: run.evaluate(None), 'test is NoneType None; expected pairs'),
    (lambda run: run.evaluate('tset'), "'tset'; .* a split of the task: train"),
    (lambda run: run.evaluate('no.csv'), 'no.csv.*, which does not exist'),
    (
      lambda run: run.evaluate(pathlib.Path('x')),
      "test is 'x'; .* ends in .tsv",
    ),
    (lambda run: run.save(None), 'path is None; expected that of a local file'),
    (lambda run: run.save('\ud800'), 'expected that of a local file'),
    (
      lambda run: run.export('x', overwrite='no'),
      "overwrite is 'no'; expected",
    ),
    (lambda run: run.save(''), "path is ''; expected that of a local file"),
    (lambda run: run.save('x.txt'), "path is 'x.txt'; .* ends in .npy"),
    (lambda run: run.save('d.npy'), 'd.npy is a directory with nothing in it'),
    (lambda run: run.export('x', format='pfet'), "format is 'pfet'; expected"),
    (lambda run: run.export(5), 'path is 5; expected that of a local file'),
    (lambda run: run.export('d.npy', 'npy'), 'exists already.*overwrite=True'),
    (lambda run: run.push_to_hub('hf://a'), "'hf://a'; expected user/name"),
    (lambda _: ptune.load(5), "path is int '5'; expected that of a base model"),
    (lambda _: ptune.load('none'), 'Nothing is at none'),
    (
      lambda _: ptune.load('wide.npy', 'no/base'),
      '^base: Nothing is at no/base',
    ),
    (
      lambda run: ptune.load('wide.npy', run),
      '^base is Tuned .*; expected a bas',
    ),
    (
      lambda _: ptune.load('wide.npy', 'ptune://tiny'),
      '2, 97.* is 96 wide; give',
    ),
    (lambda _: ptune.load('wide.npy'), 'does not name its base; give the base'),
    (lambda _: ptune.load('broken'), 'run.json is damaged'),
    (
      lambda _: ptune.load('moved'),
      r"at no/base(.|\n)*ptune.load\('moved', base=",
    ),
    (
      lambda run: ptune.load('ptune://tiny', run),
      'is neither a run nor a prompt',
    ),
  ],
)
def test_a_bad_question_is_named_and_nothing_is_written(
  run, ask, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  np.save('wide.npy', np.zeros((2, 97), np.float32))
  for name, text in (
    ('broken', '{'),
    ('moved', '{"initial_checkpoint_path": "no/base"}'),
  ):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'run.json').write_text(text)
  (tmp_path / 'd.npy').mkdir()
  before = tiny.files(tmp_path)
  with pytest.raises((UserError, FileNotFoundError), match=message):
    ask(run)
  assert tiny.files(tmp_path) == before


def test_a_bad_bank_is_named(base, run):
  bank = ptune.bank(base, one=run)
  for ask, message in (
    (lambda: bank.add('two', None), "prompt 'two' is NoneType None; expected"),
    (lambda: bank.add(5, run), 'the name of a prompt is 5; expected a text'),
    (lambda: bank.add('two', np.zeros((2, 97))), r'must be \[prompt, 96\]'),
    (lambda: bank.remove('two'), "there is no prompt 'two'; there are one"),
    (lambda: bank.predict('a', 'one'), "inputs is str 'a'; expected a list of"),
    (lambda: bank.predict(['\0'], 'one'), r'inputs\[0\]: .* 1 is NUL'),
    (lambda: bank.predict([5], 'one'), r'inputs\[0\] is 5; expected a text'),
    (lambda: bank.predict(['a'], None), 'prompts is NoneType None; expected a'),
    (
      lambda: bank.predict(['a'], ['one'] * 2),
      '2 names for 1 inputs; expected',
    ),
    (lambda: bank.predict(['a'], 'two'), "there is no prompt 'two'"),
    (lambda: bank.vote(['a'], ['two']), "there is no prompt 'two'; there are"),
    (lambda: ptune.bank(base).vote(['a']), 'the bank has no prompts; add some'),
    (lambda: ptune.bank(base, lengths=5), 'lengths is 5; expected tokens by'),
    (lambda: ptune.bank(base, lengths={'inputs': 0}), "'inputs'] is 0; expec"),
  ):
    with pytest.raises(UserError, match=message):
      ask()
  assert bank.names == ['one']


# ------------------------------------------------------------------ the names


def test_examples_of_docstrings_run(base, run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run.save('sst2.npy')
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs/rte').symlink_to(run.directory)
  names = {'ptune': ptune, 'base': base, 'tuned': run}
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  found = 0
  for module in (calls, prompt_bank, tuned):
    for example in doctest.DocTestFinder().find(module, extraglobs=names):
      found += len(example.examples)
      runner.run(example)
  assert found > 5 and not runner.failures


def test_public_names_are_few_and_typed():
  assert ptune.__all__ == ['Bank', 'Base', 'Tuned', 'bank', 'load', 'tune']
  for name in ptune.__all__:
    assert getattr(ptune, name).__doc__
  assert (pathlib.Path(ptune.__file__).parent / 'py.typed').is_file()
  with pytest.raises(AttributeError, match="no attribute 'tun'"):
    ptune.tun  # noqa: B018


def test_import_loads_nothing_heavy():
  loaded, seconds = loaded_by('import ptune')
  assert not loaded and seconds < 1
