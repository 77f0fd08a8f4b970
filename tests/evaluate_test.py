"""`ptune eval` evaluates every example once; settings do not change scores."""

import collections
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from seqio import TaskRegistry

from ptune import evaluate
from ptune.convert.pieces import Bytes
from ptune.data import padding, seqio_task
from ptune.errors import UserError
from ptune.methods import full, prompt
from ptune.model import parameters, partitioning
from ptune.model.models import EncoderDecoderModel
from ptune.serving import evaluation as evaluation_lib
from ptune.serving import trained_model
from ptune.tasks import files, registry, seqio_texts
from ptune.training import report
from ptune.training.settings import Trained
from tests import tiny


@pytest.fixture(scope='module')
def trained():
  """Returns the MODEL_DIR of a run."""
  return tiny.trained()


def run(output_dir, **changes):
  """Runs `evaluate`; returns the scores of one task, or those of all tasks."""
  scores = tiny.use(evaluate.evaluate, output_dir, **changes)
  return scores.get(changes.get('mixture_or_task_name', 'tiny'), scores)


def on_validation(task, plan, **settings):
  """Returns an evaluation of a task's validation split."""
  return evaluation_lib.Evaluation(
    task,
    plan,
    EncoderDecoderModel(plan.network),
    split='validation',
    feature_lengths=tiny.LENGTHS,
    batch_size=8,
    **settings,
  )


def seqio_twin(task, **settings):
  """Registers a SeqIO task `seqio_<name>` with the rows of a text task."""
  return TaskRegistry.add(
    f'seqio_{task.name}',
    source=seqio_texts.source(task),
    preprocessors=registry.tokenized([]),
    output_features=seqio_task.load('tiny').output_features,
    **settings,
  )


def predictions(output_dir, task='tiny'):
  (path,) = (output_dir / task).glob('predictions-*.jsonl')
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def reference(trained, tmp_path_factory):
  """Returns scores and predictions of an evaluation padded to full length."""
  path = tmp_path_factory.mktemp('reference')
  scores = run(path, model_dir=trained, bucket_multiple=None)
  return scores, predictions(path)


def assert_close(got, expected):
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    assert got[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
  ('batch_size', 'bucket_multiple'),
  [pytest.param(24, None, marks=pytest.mark.slow), (6, 16)],
)
def test_no_score_depends_on_the_batches(
  trained, reference, tmp_path, batch_size, bucket_multiple
):
  scores = run(
    tmp_path,
    model_dir=trained,
    batch_size=batch_size,
    bucket_multiple=bucket_multiple,
  )
  assert_close(scores, reference[0])
  assert [r['prediction'] for r in predictions(tmp_path)] == (
    [r['prediction'] for r in reference[1]]
  )


def test_every_example_is_there_once_in_order(reference):
  rows = tiny.rows('validation')
  assert [r['index'] for r in reference[1]] == list(range(len(rows)))
  assert [r['inputs'] for r in reference[1]] == [word for word, _ in rows]
  assert [r['target'] for r in reference[1]] == [label for _, label in rows]


def load(trained):
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(tiny.CONFIG, prompt.prompt(3), mesh)
  params, step = trained_model.load(plan, Trained(trained))
  return plan, params, step


def test_scores_equal_those_made_by_hand(trained, reference):
  plan, params, step = load(trained)
  assert step == 12
  model = EncoderDecoderModel(plan.network)
  loss = jax.jit(model.loss)
  score = jax.jit(model.score)
  totals: collections.Counter[str] = collections.Counter()
  scores = []
  examples = seqio_task.examples(
    seqio_task.load('tiny'), tiny.LENGTHS, 'validation'
  )
  for _, row in examples:  # One at a time.
    ((_, batch),) = padding.padded_batches([row], 1, None)
    batch = {
      k: np.pad(v, ((0, 0), (0, tiny.LENGTHS[side] - v.shape[1])))
      for k, v in batch.items()
      for side in ['inputs' if k.startswith('encoder') else 'targets']
    }
    with plan.scope():
      totals.update({k: float(v) for k, v in loss(params, batch)[1].items()})
      scores.append(float(score(params, batch)[0]))
  records = reference[1]
  np.testing.assert_allclose([r['score'] for r in records], scores, rtol=1e-5)
  right = [r['prediction'] == r['target'] for r in records]
  assert_close(
    reference[0],
    {
      'accuracy': 100 * np.mean(right),
      'mean_score': np.mean(scores),
      'loss': totals['loss'] / totals['tokens'],
      'token_accuracy': totals['correct'] / totals['tokens'],
    },
  )


def test_a_run_scores_as_its_evaluation_while_it_trained(trained, reference):
  (trained_scores,) = (r for r in tiny.records(trained) if 'task' in r)
  for name, value in reference[0].items():
    assert trained_scores[name] == pytest.approx(value, rel=1e-5)


def test_a_prompt_file_on_its_base_is_the_run(trained, reference, tmp_path):
  scores = run(
    tmp_path,
    checkpoint_path=tiny.base(),
    prompt_file=str(trained / 'prompts' / 'best'),
    bucket_multiple=None,
  )
  assert scores == reference[0]
  assert predictions(tmp_path) == reference[1]
  (record,) = tiny.records(tmp_path)
  assert record['step'] == 12 and record['split'] == 'validation'


def test_a_prompt_of_another_base_is_evaluated_with_a_warning(
  trained, tmp_path, caplog
):
  path = tiny.make_base(tmp_path / 'other', seed=1)
  file = str(trained / 'prompts' / 'best.npy')
  settings = {'prompt_file': file, 'eval_steps': 1}
  run(tmp_path / 'a', checkpoint_path=str(path), **settings)
  assert 'was trained on another base model' in caplog.text
  caplog.clear()
  run(tmp_path / 'b', checkpoint_path=tiny.base(), **settings)
  assert 'another base model' not in caplog.text
  with pytest.raises(ValueError, match='holds a run that is not this one'):
    run(tmp_path / 'c', model_dir=trained, checkpoint_path=str(path))


def test_a_base_alone_is_evaluated_without_a_prompt(tmp_path):
  run(
    tmp_path,
    method=full.full(),
    checkpoint_path=tiny.base(),
    eval_steps=2,
    split='train',
  )
  assert len(predictions(tmp_path)) == 16


def test_what_a_task_does_not_define_is_left_out(trained, tmp_path):
  scores = run(tmp_path, model_dir=trained, mixture_or_task_name='tiny_mixture')
  assert set(scores['tiny']) > {'accuracy', 'mean_score'}
  assert set(scores['tiny_b']) == {'accuracy', 'loss', 'token_accuracy'}
  assert scores['tiny']['loss'] == scores['tiny_b']['loss']
  scores = run(
    tmp_path / 'a', model_dir=trained, mixture_or_task_name='tiny_no_metrics'
  )
  assert set(scores) == {'loss', 'token_accuracy'}


def test_metrics_may_read_scores_beside_predictions(trained, tmp_path):
  scores = run(tmp_path, model_dir=trained, mixture_or_task_name='tiny_aux')
  records = predictions(tmp_path, 'tiny_aux')
  assert len(records) == tiny.SIZES['validation']
  assert scores['right_score'] <= 0


def test_the_output_lies_in_model_dir_if_not_said_otherwise(trained, tmp_path):
  copy = shutil.copytree(trained, tmp_path / 'run')
  before = tiny.files(copy)
  run(None, model_dir=copy, split='test')
  added = {
    name: v for name, v in tiny.files(copy).items() if name not in before
  }
  assert sorted(added) == [
    'eval_test/metrics.jsonl',
    'eval_test/tiny/classes-12.csv',
    'eval_test/tiny/confusion-12.csv',
    'eval_test/tiny/confusion-12.png',
    'eval_test/tiny/predictions-12.jsonl',
  ]


def test_anything_becomes_a_line_of_json():
  record = {
    'a': b'\xc3\xa4',
    'b': np.array([1, 2]),
    'c': {(0, 1): np.float32(0.5), np.int64(3): [None, True, b'x']},
    'd': object,
  }
  assert json.loads(report.to_json(record)) == {
    'a': 'ä',
    'b': [1, 2],
    'c': {'[0, 1]': 0.5, '3': [None, True, 'x']},
    'd': str(object),
  }


def test_what_is_wrong_is_said(trained, tmp_path):
  base, file = tiny.base(), str(trained / 'prompts' / 'best.npy')
  (tmp_path / 'file').write_text('')
  elsewhere = str(tmp_path / 'p.npy')
  np.save(elsewhere, np.load(file))
  (tmp_path / 'p.json').write_text('{"method": "prompt/before_eos"}')
  (tmp_path / 'other').mkdir()
  recorded = json.loads((trained / 'run.json').read_text())
  recorded['initial_checkpoint_path'] = 'ptune://tiny'
  (tmp_path / 'other' / 'run.json').write_text(json.dumps(recorded))
  for changes, message in (
    ({'batch_size': 0}, 'BATCH_SIZE is 0'),
    ({'eval_steps': 0}, 'EVAL_STEPS is 0'),
    ({'split': 'dev', 'model_dir': trained}, "no split 'dev'; its splits: te"),
    (
      {'output_dir': None, 'prompt_file': file, 'checkpoint_path': base},
      'EVAL_OUTPUT_DIR is needed',
    ),
    (
      {'output_dir': tmp_path / 'file' / 'a', 'model_dir': trained},
      'EVAL_OUTPUT_DIR .* cannot be',
    ),
    ({}, 'set MODEL_DIR .* or PROMPT_FILE'),
    ({'model_dir': trained, 'prompt_file': file}, 'not both'),
    ({'prompt_file': file}, 'CHECKPOINT_PATH, the base model, is needed'),
    (
      {'prompt_file': elsewhere, 'checkpoint_path': base},
      "trained with method 'prompt/before_eos', and METHOD is 'prompt'",
    ),
    ({'method': full.full(), 'prompt_file': file}, 'has no prompt to be read'),
    (
      {'model_dir': tmp_path / 'other'},
      'the vocabulary is not that of the base model ptune://tiny',
    ),
    ({'model_dir': tmp_path}, r'has no run of ptune train \(run.json'),
    ({'model_dir': trained, 'method': prompt.prompt(4)}, r'\[4, 16\]'),
    (
      {
        'prompt_file': file,
        'checkpoint_path': base,
        'method': prompt.prompt(4),
      },
      r'prompt file .* has shape \[3, 16\]',
    ),
    (
      {'mixture_or_task_name': 'tiny_no_validation_rows', 'model_dir': trained},
      "'validation' of task 'tiny_no_validation_rows' is empty",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      run(**{'output_dir': tmp_path / 'out', **changes})
  with pytest.raises(FileNotFoundError, match='no prompt file'):
    run(tmp_path / 'o', prompt_file=f'{file}x', checkpoint_path=base)
  with pytest.raises(FileNotFoundError, match='Nothing is at /nowhere'):
    run(tmp_path / 'o', prompt_file=file, checkpoint_path='/nowhere')


def test_batches_are_split_over_all_devices(trained, reference, tmp_path):
  how = functools.partial(
    tiny.grouped,
    evaluate.evaluate,
    **{'mixture_or_task_name': 'tiny_no_metrics', 'config': tiny.CONFIG},
    **{'task_feature_lengths': tiny.LENGTHS, 'method': prompt.prompt(3)},
    **{'model_dir': trained, 'output_dir': str(tmp_path), 'model_parallel': 2},
  )
  with pytest.raises(ValueError, match=r'6, .* the 4 devices .* Use 4 or 8'):
    evaluate.evaluate(**how(batch_size=6))
  scores = evaluate.evaluate(**how(batch_size=8, bucket_multiple=None))
  expected = reference[0]['loss']
  assert scores['tiny_no_metrics']['loss'] == pytest.approx(expected, rel=1e-5)


def test_a_users_rows_are_evaluated_as_seqio_does(trained, tmp_path):
  plan, params, _ = load(trained)
  rows = {'validation': tiny.rows('validation')}
  names = sorted({label for _, label in rows['validation']})
  for name, settings in (
    ('labels', {'label_names': names, 'metrics': ['accuracy', 'f1']}),
    ('texts', {}),
    ('ranked', {'label_names': names, 'rank': True}),
  ):
    task = files.from_rows(rows, name=name, vocabulary=Bytes(), **settings)
    theirs = seqio_twin(
      task, postprocess_fn=task.postprocess_fn, metric_fns=list(task.metric_fns)
    )
    scores, written = [], []
    for one in (task, theirs):
      evaluation = on_validation(one, plan, directory=tmp_path)
      ((_, values),) = evaluation((params,), 1).items()
      scores.append(values)
      file = tmp_path / one.name / 'predictions-1.jsonl'
      written.append([json.loads(x) for x in file.read_text().splitlines()])
    assert scores[0] == scores[1]
    assert {'loss', 'token_accuracy'} < set(scores[0])
    for ours, other in zip(*written, strict=True):
      assert ours == other


def test_two_metrics_of_one_name_are_an_error_in_one_line(trained):
  plan, params, _ = load(trained)
  rows = {'validation': tiny.rows('validation')}
  task = files.from_rows(
    rows, name='twice', metrics=['squad', 'trivia_qa'], vocabulary=Bytes()
  )
  theirs = seqio_twin(task, metric_fns=[tiny.accuracy, tiny.accuracy])
  for one, message in (
    (task, r"two of METRICS give a score named \['em', 'f1'\]; remove"),
    (theirs, r"Duplicate metric key 'accuracy'.*; rename one"),
  ):
    evaluation = on_validation(one, plan, num_examples=8)
    with pytest.raises(UserError, match=message):
      evaluation((params,), 1)


def test_what_an_evaluation_cuts_is_counted_in_the_log(trained, caplog):
  plan, _, _ = load(trained)
  words = [('ab' * n, 'yes') for n in (1, 2, 50, 60)]
  task = files.from_rows({'validation': words}, name='cut', vocabulary=Bytes())
  theirs = seqio_twin(task)
  for one in (task, theirs):
    with caplog.at_level('WARNING', 'absl'):
      on_validation(one, plan)
    assert (
      f"{one.name}:validation: of 4 rows, {{'inputs': 2, 'targets': 0}}"
      ' were trimmed'
    ) in caplog.text


def test_an_evaluation_can_be_given_up(trained):
  plan, params, _ = load(trained)
  evaluation = evaluation_lib.Evaluation(
    seqio_task.load('tiny'),
    plan,
    EncoderDecoderModel(plan.network),
    split='validation',
    feature_lengths=tiny.LENGTHS,
    batch_size=8,
  )
  asked = iter([False, False, True])
  with pytest.raises(evaluation_lib.Stopped):
    evaluation((params,), 1, lambda: next(asked))
  assert evaluation((params,), 1)['tiny']['loss'] > 0


def test_json_has_null_for_nan():
  line = report.to_json({'score': np.float32('nan'), 'all': [1.0, -np.inf]})
  assert json.loads(line) == {'score': None, 'all': [1.0, None]}


def test_json_takes_what_tasks_hold():
  record = {'a': b'\xc3\xbc', 'b': np.float32(1.5), 'c': np.arange(2)}
  record['d'] = {'e': jax.numpy.ones(1)[0].item(), 'f': {1}}
  assert json.loads(report.to_json(record)) == {
    **{'a': 'ü', 'b': 1.5, 'c': [0, 1]},
    'd': {'e': 1.0, 'f': '{1}'},
  }
