"""`ptune train` as a program: its output, stopping, resuming, and refusals."""

import functools
import json
import logging
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import optax
import pytest

from ptune import convert, train
from ptune.data import batches
from ptune.methods import full, prompt, prompt_init
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.serving import evaluation, predictor
from ptune.training import (
  checkpoints,
  loop,
  losses,
  optim,
  report,
  selection,
  start,
  stopping,
)
from ptune.training.run import Run
from ptune.training.settings import Data
from tests import tiny


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """Returns the MODEL_DIR of an undisturbed run."""
  path = tmp_path_factory.mktemp('undisturbed') / 'run'
  tiny.run(path)
  return path


@pytest.fixture
def started(undisturbed, tmp_path):
  """Returns a copy of that run, which the test may change."""
  return shutil.copytree(undisturbed, tmp_path / 'run')


def sgd(rate):
  """Returns an optimizer with a learning rate for each step."""
  return lambda initial_step: optax.sgd(rate)


def final_prompt(model_dir, step=12):
  return np.load(pathlib.Path(model_dir, 'prompts', f'step_{step}.npy'))


def assert_same_run(left, right):
  """Compares prompts bit by bit, records, checkpoints and best prompts."""
  assert tiny.records(left) == tiny.records(right)
  for name in ('checkpoints', 'best'):
    steps = [checkpoints.finished_steps(d / name) for d in (left, right)]
    assert steps[0] == steps[1] != []
  for step in checkpoints.finished_steps(left / 'checkpoints'):
    assert np.array_equal(final_prompt(left, step), final_prompt(right, step))
  for name in ('best.npy', 'best.json'):
    got, expected = ((d / 'prompts' / name).read_bytes() for d in (left, right))
    assert got == expected


# -------------------------------------------------------------------- the loop


def test_steps_start_without_waiting_and_compile_once_for_each_shape(
  tmp_path, monkeypatch
):
  events, shapes, updates = [], set(), []
  compile_step, add_metrics = train.state_lib.compile_step, loop.Loop._add

  def watched(*args):
    update = compile_step(*args)

    def call(state, frozen, batch):
      shapes.add(tuple(x.shape for x in batch.values()))
      with jax.transfer_guard('disallow'):  # All arrays are there.
        result = update(state, frozen, batch)
      events.append('start')
      return result

    updates.append(update)
    return call

  def fetched(this, metrics, step):
    events.append(step)
    return add_metrics(this, metrics, step)

  monkeypatch.setattr(train.state_lib, 'compile_step', watched)
  monkeypatch.setattr(loop.Loop, '_add', fetched)
  tiny.run(
    tmp_path,
    eval_split=None,
    bucket_multiple=16,
    log_period=12,
    checkpoint_period=12,
  )
  # Metrics are read two steps late, except recorded ones.
  first, rest = ['start'] * 3, []
  for step in range(1, 10):
    rest += [step, 'start']
  assert events == [*first, *rest, 10, 11, 12]
  assert len(shapes) == 2
  assert updates[0]._cache_size() == len(shapes)


# ------------------------------------------------------------- results of a run


def test_a_run_leaves_what_it_promises(tmp_path):
  tiny.run(
    tmp_path,
    mixture_or_task_name='tiny_mixture',
    train_steps=8,
    eval_period=6,
    eval_steps=2,
  )
  assert {path.name for path in tmp_path.iterdir()} == {
    *('best', 'checkpoints', 'config.gin', 'curves.png', 'eval'),
    *('metrics.jsonl', 'model-info.txt', 'prompts', 'run.json', 'train'),
  }
  steps = checkpoints.finished_steps(tmp_path / 'checkpoints')
  assert steps == [4, 8]
  for step in steps:
    array = final_prompt(tmp_path, step)
    assert array.shape == (3, 16) and array.dtype == np.float32
    facts = json.loads((tmp_path / f'prompts/step_{step}.json').read_text())
    assert facts['step'] == step and facts['task'] == 'tiny_mixture'
  every_task_has = {'loss', 'token_accuracy', 'accuracy'}
  assert set(facts['scores']['tiny']) == {*every_task_has, 'mean_score'}
  assert set(facts['scores']['tiny_b']) == every_task_has
  info = (tmp_path / 'model-info.txt').read_text()
  assert info.startswith('prompt: trainable 48 parameters (192 bytes)')
  assert 'token_embedder/embedding' in info
  kinds = [
    (r['step'], r.get('task', r['split'])) for r in tiny.records(tmp_path)
  ]
  assert kinds == [
    *((3, 'train'), (6, 'train'), (6, 'tiny'), (6, 'tiny_b')),
    *((8, 'train'), (8, 'tiny'), (8, 'tiny_b')),
  ]
  for task in ('tiny', 'tiny_b'):
    for step in (6, 8):
      lines = (tmp_path / f'eval/{task}/predictions-{step}.jsonl').read_text()
      assert len(lines.splitlines()) == 16
    assert list((tmp_path / 'eval' / task).glob('events*'))


def test_only_what_is_trained_is_in_a_checkpoint(undisturbed):
  # The 59 kB of frozen weights are not stored; Orbax's own files are small.
  state = undisturbed / 'checkpoints' / '12'
  assert sum(map(len, tiny.files(state).values())) < 30_000
  text = (state / 'state' / '_METADATA').read_text()
  assert 'prompt' in text and 'attention' not in text


def test_the_best_prompt_is_that_of_the_best_score(undisturbed):
  losses = {
    r['step']: r['loss'] for r in tiny.records(undisturbed) if 'task' in r
  }
  assert list(losses) == [5, 10, 12]
  best = min(losses, key=losses.get)
  facts = json.loads((undisturbed / 'prompts' / 'best.json').read_text())
  assert facts['step'] == best
  assert facts['scores']['tiny_no_metrics']['loss'] == losses[best]
  assert checkpoints.finished_steps(undisturbed / 'best') == [best]


def test_the_best_metric_can_be_named_and_less_can_be_better():
  scores = {'a': {'f1': 2.0, 'loss': 3.0}, 'b': {'f1': 4.0, 'loss': 1.0}}
  assert selection.score('f1', scores) == 3
  assert selection.score('-loss', scores) == -2
  assert selection.score(None, scores) == 3
  assert (
    selection.score(None, {'a': {'loss': 3.0, 'token_accuracy': 9.0}}) == -3
  )
  with pytest.raises(ValueError, match=r"'acc' is not among .*'f1', 'loss'"):
    selection.score('acc', scores)
  with pytest.raises(ValueError, match=r"highest value is the worst.*'-loss'"):
    selection.score('loss', scores)


@pytest.mark.slow
def test_every_parameter_can_be_trained_from_random_weights(tmp_path):
  state = tiny.run(
    tmp_path,
    method=full.full(),
    optimizer=sgd(0.01),
    initial_checkpoint_path=None,
    train_steps=3,
    eval_split=None,
  )
  assert len(jax.tree.leaves(state.trainable)) == 29
  assert not (tmp_path / 'prompts').exists()
  # Its checkpoint can be a base model.
  source = convert.open_checkpoint(tmp_path)
  assert source.step == 3 and len(source.leaves) == 29


def test_a_task_without_a_validation_split_is_trained(tmp_path, caplog):
  tiny.run(tmp_path, mixture_or_task_name='tiny_no_validation', train_steps=2)
  assert 'nothing is evaluated' in caplog.text
  assert final_prompt(tmp_path, 2).shape == (3, 16)
  assert not (tmp_path / 'best').exists()


# ------------------------------------------------------- stopping and going on


class Killed(BaseException):
  """Ends a run at once."""


@pytest.mark.parametrize(
  ('owner', 'name', 'call', 'after'),
  [
    (evaluation.Evaluation, '__call__', 2, True),
    (checkpoints, 'save_best', 1, True),
    (report.Report, 'evaluate', 1, True),
    (checkpoints.Checkpoints, 'save', 3, False),
    (Run, 'write_prompt', 3, False),
    (loop.Loop, '_add', 11, True),
  ],
)
def test_a_run_cut_short_anywhere_ends_with_the_same_bits(
  undisturbed, tmp_path, monkeypatch, owner, name, call, after
):
  original, calls = getattr(owner, name), 0

  def cut(*args, **kwargs):
    nonlocal calls
    calls += 1
    if calls == call and not after:
      raise Killed
    result = original(*args, **kwargs)
    if calls == call:
      raise Killed
    return result

  with monkeypatch.context() as patch:
    patch.setattr(owner, name, cut)
    with pytest.raises(Killed):
      tiny.run(tmp_path)
  tiny.run(tmp_path)
  assert_same_run(tmp_path, undisturbed)


def test_a_second_ctrl_c_is_not_waited_with():
  handler = signal.getsignal(signal.SIGINT)
  with stopping.signals() as asked:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked.received == ['SIGTERM', 'SIGTERM']
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) == handler


def test_a_stop_during_an_evaluation_loses_nothing(
  undisturbed, tmp_path, monkeypatch
):
  original = predictor.Predictor.sums

  def interrupted(self, *args):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(predictor.Predictor, 'sums', interrupted)
    tiny.run(tmp_path)
  assert checkpoints.finished_steps(tmp_path / 'checkpoints') == [4, 5]
  assert not any('task' in r for r in tiny.records(tmp_path))
  assert np.array_equal(final_prompt(tmp_path, 4), final_prompt(undisturbed, 4))
  tiny.run(tmp_path)
  assert tiny.records(tmp_path) == tiny.records(undisturbed)
  assert np.array_equal(final_prompt(tmp_path), final_prompt(undisturbed))


def test_a_stop_during_the_last_evaluation_leaves_it_to_be_done(
  undisturbed, tmp_path, monkeypatch, caplog
):
  original, calls = evaluation.Evaluation.__call__, 0

  def interrupted(self, *args):
    nonlocal calls
    calls += 1
    if calls == 3:
      os.kill(os.getpid(), signal.SIGINT)
    return original(self, *args)

  caplog.set_level(logging.INFO)
  with monkeypatch.context() as patch:
    patch.setattr(evaluation.Evaluation, '__call__', interrupted)
    tiny.run(tmp_path)
  assert 'stopped at step 12, which is saved' in caplog.text
  tiny.run(tmp_path)
  assert_same_run(tmp_path, undisturbed)


def test_a_finished_run_says_so_and_reads_no_model(
  started, monkeypatch, caplog
):
  def fail(*args, **kwargs):
    raise AssertionError

  monkeypatch.setattr(start, 'restore', fail)
  monkeypatch.setattr(batches, 'Batches', fail)
  caplog.set_level(logging.INFO)
  before = tiny.files(started)
  state = tiny.run(started)
  assert int(state.step) == 12
  assert 'is finished, at step 12; for more steps raise TRAIN_STEPS' in (
    caplog.text
  )
  assert tiny.files(started) == before


def test_a_finished_run_goes_on_with_more_steps(undisturbed, started):
  tiny.run(started, train_steps=16)
  assert tiny.records(started)[: len(tiny.records(undisturbed))] == (
    tiny.records(undisturbed)
  )
  assert final_prompt(started, 16).shape == (3, 16)
  # With fewer steps, the run is finished too.
  before = tiny.files(started)
  tiny.run(started, train_steps=10)
  assert tiny.files(started) == before


def test_training_ends_when_scores_get_no_better(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  # With a rate of 0 nothing is learned, so no later score beats the first.
  settings = {
    'early_stopping': 2,
    'eval_period': 2,
    'optimizer': lambda initial_step: optax.sgd(0.0),
  }
  state = tiny.run(tmp_path, **settings)
  assert int(state.step) == 6
  assert 'finished at step 6' in caplog.text
  assert checkpoints.finished_steps(tmp_path / 'checkpoints') == [4, 6]
  before = tiny.files(tmp_path)
  tiny.run(tmp_path, **settings)
  assert 'for more steps raise EARLY_STOPPING' in caplog.text
  assert tiny.files(tmp_path) == before
  assert int(tiny.run(tmp_path, **{**settings, 'early_stopping': 3}).step) == 8


# -------------------------------------------------------------------- refusing


def test_a_directory_with_another_run_is_refused_untouched(started, tmp_path):
  perceptron = losses.perceptron([[3], [4]])
  other_base = tiny.make_base(tmp_path / 'base', seed=1)
  # As after a hard stop: the records go beyond the last checkpoint.
  shutil.rmtree(started / 'checkpoints' / '12')
  before = tiny.files(started)
  for changes, message in (
    ({'initial_checkpoint_path': other_base}, 'INITIAL_CHECKPOINT_PATH'),
    (
      {'method': prompt.prompt(4)},
      r'trainable: .*\[3, 16\]}? there.*\[4, 16\]',
    ),
    ({'method': full.full()}, "method: 'prompt' there, 'full' here"),
    ({'mixture_or_task_name': 'tiny_b'}, "task: 'tiny_no_metrics' there"),
    ({'batch_size': 16}, 'batch_size: 8 there, 16 here'),
    ({'bucket_multiple': 8}, 'bucket_multiple: None there, 8 here'),
    ({'seed': 5}, 'seed: 1 there, 5 here'),
    ({'task_feature_lengths': {'inputs': 16, 'targets': 4}}, "'inputs': 32"),
    ({'optimizer': optax.sgd}, "optimizer: 'adafactor' there, 'sgd' here"),
    (
      {'model': functools.partial(EncoderDecoderModel, objective=perceptron)},
      "loss: 'cross_entropy' there, 'perceptron' here",
    ),
    ({'best_metric': '-loss'}, "BEST_METRIC: None there, '-loss' here"),
    ({'eval_split': 'test'}, "EVAL_SPLIT: 'validation' there, 'test' here"),
    ({'eval_steps': 1}, 'EVAL_STEPS and the batch size: None there, 8 here'),
    (
      {'decoding': Decoding(num_beams=2)},
      "decoding: {} there, {'num_beams': 2} here",
    ),
  ):
    with pytest.raises(ValueError, match=message) as error:
      tiny.run(started, **changes)
    assert 'Nothing was changed' in str(error.value)
    assert tiny.files(started) == before


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path):
  wrong_shape = tmp_path / 'prompt.npy'
  np.save(wrong_shape, np.zeros((4, 16), np.float32))
  pickled = tmp_path / 'pickled.npy'
  np.save(pickled, np.array([{}], object), allow_pickle=True)
  from_file = lambda path: {
    'method': prompt.prompt(3, prompt_init.from_file(path))
  }
  target = tmp_path / 'run'
  for changes, message in (
    ({'train_steps': 0}, 'TRAIN_STEPS is 0; expected a whole number of at'),
    ({'train_steps': 1e3, 'eval_period': None}, 'is 1000.0, EVAL_PERIOD is No'),
    ({'keep_checkpoints': 0}, 'KEEP_CHECKPOINTS is 0; .* or None'),
    ({'microbatches': 3}, '1 devices .* times 3 MICROBATCHES. Use 6 or 9'),
    (
      {'mixture_or_task_name': 'tinny'},
      'not among the .*; did you mean tiny',
    ),
    ({'mixture_or_task_module': 'no.such'}, "no module 'no'"),
    ({'task_feature_lengths': {'inputs': 8}}, "no length for 'targets'"),
    ({'task_feature_lengths': 8}, 'TASK_FEATURE_LENGTHS is 8, expected'),
    ({'mixture_or_task_name': 'tiny_large_vocabulary'}, 'vocabulary of 359'),
    ({'mixture_or_task_name': 'tiny_no_train_rows'}, 'has no examples'),
    ({'mixture_or_task_name': 'tiny_no_validation_rows'}, 'is empty'),
    ({'eval_split': 'valid'}, 'EVAL_SPLIT .* splits test, train, validation'),
    ({'eval_split': None, 'early_stopping': 3}, 'nothing is evaluated'),
    ({'initial_checkpoint_path': None}, 'INITIAL_CHECKPOINT_PATH is needed'),
    ({'config': None, 'model_dir': ''}, "MODEL_DIR is ''; it must be a dir"),
    (from_file(wrong_shape), r'has shape \[4, 16\].* \[3, 16\]'),
    (from_file(pickled), 'pickled objects, which are not loaded'),
  ):
    with pytest.raises(ValueError, match=message):
      tiny.run(**{'model_dir': target, **changes})
    assert not target.exists() or not tiny.files(target), changes
  with pytest.raises(FileNotFoundError, match=r'did you mean prompt.npy'):
    tiny.run(target, **from_file(tmp_path / 'promt'))
  with pytest.raises(FileNotFoundError, match='Nothing is at /nowhere'):
    tiny.run(target, initial_checkpoint_path='/nowhere')
  assert not tiny.files(target)


def test_a_batch_that_does_not_divide_is_refused_with_what_fits(tmp_path):
  with pytest.raises(ValueError, match=r'12, .* the 8 devices .* Use 8 or 16'):
    train.train(
      model_dir=str(tmp_path),
      data=Data('tiny', tiny.LENGTHS, batch_size=12),
      train_steps=1,
      config=tiny.CONFIG,
      method=prompt.prompt(3),
      initial_checkpoint_path=tiny.base(),
    )


def test_a_base_that_does_not_fit_is_refused_with_all_that_differs(tmp_path):
  config = type(tiny.CONFIG)(**{**vars(tiny.CONFIG), 'num_encoder_layers': 2})
  with pytest.raises(ValueError, match=r'num_encoder_layers +1 +2'):
    tiny.run(tmp_path, config=config)
  assert not tiny.files(tmp_path)


@pytest.mark.parametrize('model_dir', ['file', 'file/run', '/proc/run'])
def test_a_directory_that_cannot_be_written_is_refused(tmp_path, model_dir):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'MODEL_DIR .* cannot be written'):
    tiny.run(tmp_path / model_dir)


# --------------------------------------------------------------------- failing


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
  broken = sgd(lambda step: jax.numpy.where(step == 5, jax.numpy.inf, 0.01))
  with pytest.raises(
    FloatingPointError, match='the loss is nan at step 7'
  ) as e:
    tiny.run(tmp_path, optimizer=broken)
  assert 'The checkpoint of step 4 is good and was kept' in str(e.value)
  assert checkpoints.finished_steps(tmp_path / 'checkpoints') == [4]


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
  # The update of step 8 makes the prompt infinite; the loss before it is
  # finite.
  broken = sgd(lambda step: jax.numpy.where(step == 7, jax.numpy.inf, 0.01))
  with pytest.raises(FloatingPointError, match='not finite after step 8'):
    tiny.run(tmp_path, optimizer=broken)
  assert checkpoints.finished_steps(tmp_path / 'checkpoints') == [4]


def test_a_state_that_is_not_finite_is_never_the_best(tmp_path):
  # The evaluation finds this before the checkpoint would be saved.
  broken = sgd(lambda step: jax.numpy.where(step == 0, jax.numpy.inf, 0.01))
  with pytest.raises(FloatingPointError, match='not finite after step 1'):
    tiny.run(tmp_path, optimizer=broken, eval_period=1)
  assert not (tmp_path / 'prompts').exists()
  assert not (tmp_path / 'best').exists()


def test_a_wrong_best_metric_costs_no_steps(tmp_path):
  with pytest.raises(ValueError, match="BEST_METRIC 'f1' is not among"):
    tiny.run(tmp_path, best_metric='f1')
  assert not checkpoints.finished_steps(tmp_path / 'checkpoints')
  assert 'run.json' not in tiny.files(tmp_path)


# ---------------------------------------------- results of an earlier start


def killed_at(tmp_path, monkeypatch, evaluations, **changes):
  """Runs until a given number of evaluations, and then ends at once."""
  original, calls = report.Report.evaluate, 0

  def cut(self, *args):
    nonlocal calls
    original(self, *args)
    calls += 1
    if calls == evaluations:
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(report.Report, 'evaluate', cut)
    with pytest.raises(Killed):
      tiny.run(tmp_path, **changes)


def best_of(model_dir):
  """Returns the steps and prompt of best/, prompts/best.npy and its facts."""
  [step] = checkpoints.finished_steps(model_dir / 'best')
  source = convert.open_checkpoint(model_dir / 'best' / str(step))
  file = model_dir / 'prompts' / 'best.npy'
  facts = json.loads(file.with_suffix('.json').read_text())
  return step, source.leaves[prompt.PATH].read(), np.load(file), facts


@pytest.mark.parametrize(
  ('steps', 'scores', 'best'), [(3, [1], 2), (9, [6, 7, 8, 8.5], 9)]
)
def test_a_best_prompt_of_steps_that_are_taken_again_is_dropped(
  tmp_path, monkeypatch, steps, scores, best
):
  # The run saves at step 3 and is killed after the evaluation at 4, which is
  # best.
  how = {'checkpoint_period': 3, 'eval_period': 2, 'log_period': 2}
  given = iter([5, 9, *scores])
  original = evaluation.Evaluation.__call__

  def better(self, *args):
    scores = original(self, *args)
    return {name: {**own, 'good': next(given)} for name, own in scores.items()}

  monkeypatch.setattr(evaluation.Evaluation, '__call__', better)
  killed_at(tmp_path, monkeypatch, 2, **how)
  assert checkpoints.finished_steps(tmp_path / 'checkpoints') == [3]
  # Resumes from step 3 at another rate; later results no longer exist.
  slower = functools.wraps(optim.adafactor)(
    lambda initial_step: optim.adafactor(initial_step, learning_rate=0.001)
  )
  tiny.run(tmp_path, train_steps=steps, optimizer=slower, **how)
  step, held, written, facts = best_of(tmp_path)
  np.testing.assert_array_equal(held, written)
  assert facts['step'] == step == best
  records = tiny.records(tmp_path)
  assert max(r['step'] for r in records) == steps
  assert 9 not in [r.get('good') for r in records]
  own = [r for r in records if r['step'] == step and 'task' in r]
  assert facts['scores'] == {
    r['task']: {k: v for k, v in r.items() if k in r and k not in NOT_SCORES}
    for r in own
  }
  if best == steps:
    np.testing.assert_array_equal(written, final_prompt(tmp_path, 9))


NOT_SCORES = ('step', 'split', 'task')


def test_a_directory_that_was_replaced_is_not_written_to(tmp_path, monkeypatch):
  path, moved = tmp_path / 'run', tmp_path / 'moved'
  original = loop.Loop._add

  def replaced(this, metrics, step):
    if step == 5:
      this.run.last_good()  # Waits for the save of step 4.
      path.rename(moved)
      path.mkdir()
      (path / 'run.lock').write_text('of another run')
    return original(this, metrics, step)

  monkeypatch.setattr(loop.Loop, '_add', replaced)
  with pytest.raises(OSError, match='was deleted, renamed or replaced'):
    tiny.run(path)
  assert [file.name for file in path.iterdir()] == ['run.lock']
  assert checkpoints.finished_steps(moved / 'checkpoints') == [4]
