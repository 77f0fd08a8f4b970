"""A model's own ids for padding, end and start apply from data to answer."""

import dataclasses

import jax
import numpy as np
import pytest

from ptune.data import batches as data
from ptune.data import packing, seqio_task
from ptune.methods import prompt
from ptune.model import parameters, partitioning, sizes
from ptune.model.adapters import VIRTUAL
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import TokenIds
from ptune.serving.evaluation import Evaluation
from ptune.training import losses, many
from tests import tiny

LENGTHS = {'inputs': 32, 'targets': 6}
IDS = TokenIds(pad=5, eos=1, start=7)
CONFIG = dataclasses.replace(tiny.CONFIG, ids=IDS)


@pytest.fixture(scope='module')
def task():
  return seqio_task.load('tiny', 'tests.tiny')


def renamed(batch, weights):
  """Converts a batch with T5's ids to `IDS`."""
  found = dict(batch)
  for name in ('encoder_input_tokens', 'decoder_target_tokens'):
    found[name] = np.where(batch[name] == 0, IDS.pad, batch[name])
  read = batch['decoder_input_tokens']
  # In the decoder's input, 0 means padding after the first position.
  found['decoder_input_tokens'] = np.where(read == 0, IDS.pad, read)
  found['decoder_input_tokens'][:, 0] = IDS.start
  assert (found['decoder_loss_weights'] == weights).all()
  return found


def test_batches_are_padded_and_start_as_the_model_says(task):
  plain = data.Batches(task, LENGTHS, 8)
  own = data.Batches(task, LENGTHS, 8, ids=IDS)
  for step in (0, 3):
    got, before = own(step), plain(step)
    want = renamed(before, before['decoder_loss_weights'])
    for name in want:
      np.testing.assert_array_equal(got[name], want[name], err_msg=name)
  joined = many.joined([own(0), plain(1)], IDS.pad)
  assert joined['encoder_input_tokens'].shape[0] == 16


def test_packed_rows_are_padded_and_start_as_the_model_says(task):
  method = prompt.prompt(3)
  plain, own = (
    packing.PackedBatches(task, LENGTHS, 2, method, pack=2, **ids)(0)
    for ids in ({}, {'ids': IDS})
  )
  for side, tokens in (
    ('encoder', 'encoder_input_tokens'),
    ('decoder', 'decoder_target_tokens'),
  ):
    real = own[f'{side}_segment_ids'] > 0
    assert (own[tokens][~real] == IDS.pad).all() and (~real).any()
    np.testing.assert_array_equal(own[tokens][real], plain[tokens][real])
  segments = own['decoder_segment_ids']
  first = np.diff(segments, axis=1, prepend=0) > 0
  read = own['decoder_input_tokens']
  assert (read[first] == IDS.start).all()
  assert (own['encoder_input_tokens'] >= VIRTUAL).any()
  for name in ('decoder_loss_weights', 'decoder_segment_ids'):
    np.testing.assert_array_equal(own[name], plain[name])


@pytest.fixture(scope='module')
def models():
  """Returns one network for T5's ids and one for others; both share tokens."""
  made = {}
  for name, config in (('plain', tiny.CONFIG), ('own', CONFIG)):
    plan = parameters.plan(
      config,
      prompt.prompt(3),
      partitioning.make_mesh(devices=jax.devices()[:1]),
    )
    made[name] = plan
  params = parameters.initialize(made['plain'], made['plain'].params, seed=0)
  params = {path: np.array(x) for path, x in params.items()}
  table = params['token_embedder/embedding']
  # Copies the start token's row, so that the loss is the same.
  table[IDS.start] = table[0]
  return made, parameters.unflatten(params)


def test_padding_and_start_of_another_id_change_no_loss(task, models):
  plans, params = models
  plain = data.Batches(task, LENGTHS, 8)(0)
  own = data.Batches(task, LENGTHS, 8, ids=IDS)(0)
  loss = lambda name, batch: jax.jit(
    EncoderDecoderModel(plans[name].network).loss
  )(params, batch)
  want, sums = loss('plain', plain)
  got, found = loss('own', own)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert found['tokens'] == sums['tokens'] > 0
  # Read with the wrong ids, the batch has another loss.
  assert abs(loss('plain', own)[0] - want) > 1e-2


def test_evaluations_read_the_model_s_ids(task, models):
  plans, params = models
  scores = {}
  for name, plan in plans.items():
    evaluation = Evaluation(
      task,
      plan,
      EncoderDecoderModel(plan.network),
      split='validation',
      feature_lengths=LENGTHS,
      batch_size=8,
    )
    (dataset,) = evaluation.datasets.values()
    rows = [batch for _, batch in evaluation.batches(dataset)]
    start = plan.network.config.ids.start
    for batch in rows:
      assert (np.asarray(batch['decoder_input_tokens'])[:, 0] == start).all()
    scores[name] = evaluation.losses((params,))
  (want,), (got,) = scores['plain'].values(), scores['own'].values()
  np.testing.assert_allclose(got['loss'], want['loss'], rtol=1e-5)


def test_ranked_targets_are_padded_as_the_model_says(task, models):
  plans, params = models
  targets = [(100, 101, 1), (100, 1)]
  found = {}
  for name, ids in (('plain', TokenIds()), ('own', IDS)):
    batch = data.Batches(task, LENGTHS, 8, ids=ids)(0)
    model = EncoderDecoderModel(
      plans[name].network, objective=losses.perceptron(targets)
    )
    found[name] = float(jax.jit(model.loss)(params, batch)[0])
  np.testing.assert_allclose(found['own'], found['plain'], rtol=1e-5)


def test_a_vocabulary_of_another_end_is_refused(task):
  size = seqio_task.vocabulary(task).vocab_size
  seqio_task.check_vocabulary(task, size, IDS)
  with pytest.raises(ValueError, match='ends texts with the token 1, and the'):
    seqio_task.check_vocabulary(task, size, TokenIds(eos=2))


def test_ids_of_a_gin_file_are_checked():
  given = {'pad': 1, 'eos': 2, 'start': 0}
  config = sizes.t5('t5_1_1_small', ids=given)
  assert config.ids == TokenIds(pad=1, eos=2)
  assert hash(config) != hash(sizes.t5('t5_1_1_small'))
  several = sizes.t5('t5_1_1_small', ids={'also_ends': [107]})
  assert several.ids.also_ends == (107,) and str(several.ids).endswith('(107,)')
  for wrong in (
    {'bos': 1},
    {'pad': True},
    {'eos': '2'},
    {'eos': [1, 2]},
    {'also_ends': ['a']},
  ):
    with pytest.raises(ValueError, match='ids has'):
      sizes.t5('t5_1_1_small', ids=wrong)
  for outside in ({'eos': 40000}, {'also_ends': [1, 40000]}):
    with pytest.raises(
      ValueError, match='rows of the embedding, from 0 to 32127'
    ):
      sizes.t5('t5_1_1_small', ids=outside)
