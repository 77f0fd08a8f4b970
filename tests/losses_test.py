"""Objectives: values and gradients computed by hand, and every method."""

import copy
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

import gin
from ptune.config import gin_files
from ptune.data import seqio_task
from ptune.methods import lora, prompt
from ptune.model import frozen_weights, network, parameters
from ptune.model.models import EncoderDecoderModel
from ptune.training import losses
from tests import tiny
from tests.network_test import SHALLOW, make_batch, random_params
from tests.state_test import BATCH, ONE, TOKENS

NET = network.Transformer(SHALLOW, prompt.prompt(5).placements)
IDS = [20, 21, 22, 23, 24]
LABELS = [[30, 1], [31, 32, 1], [33, 34, 35, 1]]
PLAIN = EncoderDecoderModel(NET)
EMBEDDING = 'token_embedder/embedding'


def value_and_grads(model, params, batch=BATCH):
  """Returns the loss, sums, and gradients of the prompt and the embedding."""
  flat = parameters.flatten(params)
  some = {path: flat[path] for path in (prompt.PATH, EMBEDDING)}

  def loss(some):
    return model.loss(parameters.unflatten({**flat, **some}), batch)

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, sums), grads = jax.device_get(run(some))
  return value, sums, grads


def model_of(objective):
  return EncoderDecoderModel(NET, objective=objective)


# ----------------------------------------------------------------- wayward


def test_without_weight_it_is_the_cross_entropy():
  params = random_params(NET)
  want = value_and_grads(PLAIN, params)
  got = value_and_grads(model_of(losses.wayward(IDS, 0.0)), params)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_text_draws_the_prompt_by_the_formula():
  params = random_params(NET)
  gamma = 0.5
  flat = parameters.flatten(params)
  value = np.asarray(flat[prompt.PATH], np.float64)
  apart = value - flat[EMBEDDING][IDS]
  want, plain_sums, plain = value_and_grads(PLAIN, params)
  got, sums, grads = value_and_grads(
    model_of(losses.wayward(IDS, gamma)), params
  )
  added = TOKENS * gamma / 5 * np.sum(apart**2)
  assert added > 0.1 * want
  np.testing.assert_allclose(got, want + added, rtol=1e-6)
  assert sums['loss'] == got
  assert {k for k in sums if sums[k] != plain_sums[k]} == {'loss'}
  pull = TOKENS * gamma * 2 / 5 * apart
  np.testing.assert_allclose(
    grads[prompt.PATH], plain[prompt.PATH] + pull, rtol=1e-4, atol=1e-4
  )
  # The text's embedding gets no gradient from the distance.
  np.testing.assert_allclose(
    grads[EMBEDDING],
    plain[EMBEDDING],
    atol=1e-5 * np.abs(plain[EMBEDDING]).max(),
  )


def test_the_text_of_an_int8_base_is_that_of_its_scales():
  config = dataclasses.replace(SHALLOW, frozen_dtype='int8')
  plan = parameters.plan(config, prompt.prompt(5), ONE)
  flat = parameters.flatten(random_params(NET))
  placed = {p: parameters.place(v, plan.params[p]) for p, v in flat.items()}
  frozen = frozen_weights.freeze(plan, {p: placed[p] for p in plan.frozen})
  assert f'{EMBEDDING}_scale' in frozen
  held = parameters.unflatten({**frozen, prompt.PATH: flat[prompt.PATH]})
  apart = []
  for params in (held, random_params(NET)):
    far, near = (
      model_of(losses.wayward(IDS, gamma)).loss(params, BATCH)[0]
      for gamma in (0.5, 0.0)
    )
    apart.append(far - near)
  np.testing.assert_allclose(*apart, rtol=0.01)


def test_the_weight_is_the_same_in_microbatches():
  run = jax.jit(model_of(losses.wayward(IDS, 0.5)).loss)
  batch = make_batch([16, 9, 1, 5], [10, 4, 1, 3])
  whole, first, second = (
    run(random_params(NET), {k: x[rows] for k, x in batch.items()})[0]
    for rows in ([0, 1, 2, 3], [0, 2], [1, 3])
  )
  np.testing.assert_allclose(first + second, whole, rtol=1e-5)


def test_a_prompt_of_another_length_or_none_is_refused():
  params = random_params(NET)
  with pytest.raises(ValueError, match=r'4 pieces .* 5 rows; .*_LENGTH to 4'):
    model_of(losses.wayward(IDS[:4])).loss(params, BATCH)
  net = network.Transformer(SHALLOW, lora.lora(2).placements)
  model = EncoderDecoderModel(net, objective=losses.wayward(IDS))
  message = r'method has no such parameter; .*prompt\.gin'
  with pytest.raises(ValueError, match=message):
    model.loss(random_params(net), BATCH)


# ----------------------------------------------------------------- distill

CONTEXT = (40, 41, 42, 43)
LENGTHS = {'inputs': 16, 'targets': 6}


def log_softmax(x):
  x = np.asarray(x, np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize('answers', ['targets', 'teacher'])
def test_distillation_is_the_divergence_from_the_model_with_the_text(answers):
  params = random_params(NET)
  plain = EncoderDecoderModel(network.Transformer(SHALLOW))
  batch = make_batch([16, 9, 1], [4, 3, 1], 16, 6)
  tokens = batch['encoder_input_tokens']
  long = np.concatenate([np.tile(CONTEXT, (3, 1)), tokens], axis=1)
  teacher = {**batch, 'encoder_input_tokens': long}
  student = dict(batch)
  if answers == 'teacher':
    said, _ = jax.jit(plain.predict, static_argnums=2)(params, long, 6)
    said = np.asarray(said)
    shifted = np.pad(said, ((0, 0), (1, 0)))[:, :-1]
    for one in (teacher, student):
      one |= {
        'decoder_target_tokens': said,
        'decoder_input_tokens': shifted,
        'decoder_loss_weights': said > 0,
      }
  wanted = log_softmax(plain.logits(params, teacher))
  got = log_softmax(PLAIN.logits(params, student))
  real = np.asarray(student['decoder_loss_weights'], bool)
  apart = np.sum(np.exp(wanted) * (wanted - got), axis=-1)
  same = wanted.argmax(-1) == got.argmax(-1)
  model = model_of(losses.distill(CONTEXT, LENGTHS, answers))
  loss, sums, grads = value_and_grads(model, params, batch)
  np.testing.assert_allclose(loss, apart[real].sum(), rtol=1e-4)
  assert apart[real].sum() > 0.5
  assert sums['correct'] == same[real].sum()
  assert sums['tokens'] == real.sum()
  assert np.abs(grads[prompt.PATH]).max() > 1e-3


def test_rows_that_fill_up_a_batch_have_no_part_in_distillation():
  params = random_params(NET)
  batch = make_batch([16, 9, 1], [4, 3, 1], 16, 6)
  batch['decoder_loss_weights'] = batch['decoder_loss_weights'].copy()
  batch['decoder_loss_weights'][2] = 0
  model = model_of(losses.distill(CONTEXT, LENGTHS))
  run = jax.jit(model.loss)
  _, sums = run(params, batch)
  _, fewer = run(params, {k: x[:2] for k, x in batch.items()})
  np.testing.assert_allclose(sums['loss'], fewer['loss'], rtol=1e-5)
  assert sums['tokens'] == fewer['tokens']


def test_what_cannot_be_distilled_is_refused():
  with pytest.raises(ValueError, match='CONTEXT is empty'):
    losses.distill((), LENGTHS)
  with pytest.raises(ValueError, match="answers is 'x'; it must be 'teacher'"):
    losses.distill(CONTEXT, LENGTHS, 'x')
  objective = losses.distill(CONTEXT, LENGTHS)
  plain = network.Transformer(SHALLOW)
  with pytest.raises(ValueError, match='method trains the model itself'):
    EncoderDecoderModel(plain, objective=objective).loss({}, BATCH)
  packed = {**BATCH, 'encoder_segment_ids': BATCH['encoder_input_tokens']}
  with pytest.raises(ValueError, match='turn packing off'):
    model_of(objective).loss({}, packed)
  for settings in ({'text': None}, {'text': 'a', 'file': 'b'}):
    with pytest.raises(ValueError, match='give CONTEXT, a text, or CONTEXT_F'):
      seqio_task.text_ids(**settings, mixture_or_task_name='tiny')


def test_a_context_is_read_from_a_file(tmp_path):
  file = tmp_path / 'context.txt'
  file.write_text('ab')
  texts = {'text': None, 'file': file}, {'text': 'ab', 'file': None}
  ids = [seqio_task.text_ids(mixture_or_task_name='tiny', **x) for x in texts]
  assert ids[0] == ids[1] == tuple(b + 3 for b in b'ab')


# -------------------------------------------------------------- perceptron

RIGHT = [1, 0, 2, 0]
ROWS = make_batch([16, 9, 1, 5], [LABELS[i] for i in RIGHT], 16, 6)


@functools.cache
def ranked():
  """Returns {(class, row): (score, gradient)}, computed one at a time."""
  params = random_params(NET)

  def score(value, batch, row):
    flat = parameters.flatten(params) | {prompt.PATH: value}
    return PLAIN.score(parameters.unflatten(flat), batch)[row]

  run = jax.jit(jax.value_and_grad(score))
  value = params['encoder']['prompt']['prompt']['prompt']
  table = {}
  for label, row in itertools.product(range(3), range(4)):
    # The batch gives a row the correct label; here each row gets each label.
    batch = make_batch([16, 9, 1, 5], [LABELS[label]] * 4, 16, 6)
    table[label, row] = jax.device_get(run(value, batch, row))
  return table


@pytest.mark.parametrize('margin', [0.0, 3.0])
def test_the_right_one_is_ranked_by_the_formula(margin):
  table, want, want_grad, active = ranked(), 0.0, np.zeros((5, 32)), 0
  for row, right in enumerate(RIGHT):
    wrong = max(
      (label for label in range(3) if label != right),
      key=lambda label: table[label, row][0],
    )
    loss = margin + table[wrong, row][0] - table[right, row][0]
    if loss > 0:
      active += 1
      want += loss
      want_grad += table[wrong, row][1] - table[right, row][1]
  assert 0 < active < 4 or margin  # Correctly ranked rows have no loss.
  got, sums, grads = value_and_grads(
    model_of(losses.perceptron(LABELS, margin)), random_params(NET), ROWS
  )
  np.testing.assert_allclose(got, want, rtol=1e-4)
  np.testing.assert_allclose(
    grads[prompt.PATH], want_grad, atol=1e-4 * np.abs(want_grad).max()
  )
  assert sums['loss'] == got
  plain = value_and_grads(PLAIN, random_params(NET), ROWS)[1]
  assert {k: sums[k] for k in ('correct', 'tokens')} == {
    k: plain[k] for k in ('correct', 'tokens')
  }


def test_rows_that_fill_up_a_batch_and_padding_count_nothing():
  model = model_of(losses.perceptron(LABELS, 5.0))
  run = jax.jit(model.loss)
  want, sums = run(random_params(NET), ROWS)
  longer = make_batch([16, 9, 1, 5, 5], [LABELS[i] for i in [*RIGHT, 0]], 20, 8)
  longer['decoder_loss_weights'][4] = 0
  got, more = run(random_params(NET), longer)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert more['tokens'] == sums['tokens']


# --------------------------------------------------------------------- files

NEEDED = [
  'MODEL_DIR="m"',
  'INITIAL_CHECKPOINT_PATH="b"',
  'MIXTURE_OR_TASK_NAME="tiny"',
  'MIXTURE_OR_TASK_MODULE="tests.tiny"',
  'TRAIN_STEPS=1',
  f'TASK_FEATURE_LENGTHS={tiny.LENGTHS}',
]


@pytest.mark.parametrize(
  ('name', 'setting'),
  [
    ('wayward', 'TARGET_TEXT="abcde"'),
    ('perceptron', 'CLASS_LABELS=["a", "b"]'),
  ],
)
def test_a_file_of_losses_goes_with_any_method(name, setting):
  files = [f'losses/{name}.gin', 'models/t5_1_1_small.gin', 'runs/train.gin']
  for method in ('methods/prompt.gin', 'methods/prompt_and_lora.gin'):
    gin.clear_config()
    gin_files.parse([*files, method], [*NEEDED, setting])
    objective = copy.deepcopy(
      gin.query_parameter('models.EncoderDecoderModel.objective')
    )
    # A piece is a byte: 'a' has id 100.
    if name == 'wayward':
      params = random_params(NET)
      table = params['token_embedder']['embedding'].copy()
      table[100:105] = params['encoder']['prompt']['prompt']['prompt']
      params = {**params, 'token_embedder': {'embedding': table}}
      want = PLAIN.loss(params, BATCH)[0]
      got = model_of(objective).loss(params, BATCH)[0]
      np.testing.assert_array_equal(got, want)  # The distance is 0.
  gin.clear_config()


def test_targets_are_what_the_task_makes_of_labels():
  how = {'mixture_or_task_name': 'tiny', 'mixture_or_task_module': 'tests.tiny'}
  found = seqio_task.target_ids(['ab', 'b'], {'inputs': 8, 'targets': 4}, **how)
  assert found == ((100, 101, 1), (101, 1))
  assert seqio_task.text_ids('ab', **how) == (100, 101)
  with pytest.raises(
    ValueError, match=r"'ab', 'aa'\] do not fit .* need 3 tok"
  ):
    seqio_task.target_ids(['ab', 'aa'], {'inputs': 8, 'targets': 2}, **how)
  for labels in (None, 'no', ['no'], ['no', 'no']):
    with pytest.raises(ValueError, match=r'CLASS_LABELS is .* all targets'):
      seqio_task.target_ids(labels, tiny.LENGTHS, **how)


def test_a_run_learns_to_rank(tmp_path):
  targets = [[*label.encode(), 1] for label in tiny.LABELS]
  targets = [[token + 3 * (token > 1) for token in ids] for ids in targets]
  objective = losses.perceptron(targets, margin=1.0)
  tiny.run(
    tmp_path / 'run',
    model=functools.partial(EncoderDecoderModel, objective=objective),
    config=tiny.CONFIG,
    eval_split=None,
    train_steps=30,
    log_period=10,
  )
  first, *_, last = [r['loss'] for r in tiny.records(tmp_path / 'run')]
  assert last < first
