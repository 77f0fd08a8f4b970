"""A decoder-only model: inputs are a prefix that every position attends to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptune.methods import (
  bottleneck,
  decoder_prompt,
  full,
  ia3,
  lora,
  norms,
  prompt,
)
from ptune.model import network, parameters, partitioning, structure
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.serving import bank
from tests import tiny
from tests.network_test import SHALLOW, forward, make_batch, random_params

ALONE = dataclasses.replace(SHALLOW, num_encoder_layers=0, num_decoder_layers=2)
TINY = dataclasses.replace(tiny.CONFIG, num_encoder_layers=0)
LENGTHS = [4, 2, 1], [5, 3, 1]


def model(*placements, config=ALONE):
  net = network.Transformer(config, placements)
  return net, random_params(net)


def logits(net, params, batch):
  return np.asarray(forward(net)(params, batch)[1])


def test_its_parameters_are_a_decoder_without_cross_attention():
  paths = structure.parameters(network.Transformer(ALONE))
  folders = {path.split('/')[0] for path in paths}
  assert folders == {'token_embedder', 'decoder'}
  assert not [path for path in paths if 'encoder' in path]
  whole = dataclasses.replace(ALONE, num_encoder_layers=2)
  of_t5 = structure.parameters(network.Transformer(whole))
  assert {p: x.shape for p, x in paths.items()}.items() <= {
    p: x.shape for p, x in of_t5.items()
  }.items()


def test_every_input_is_seen_by_all_and_a_target_by_later_ones_only():
  net, params = model()
  batch = make_batch([4], [5], 4, 5)
  before = logits(net, params, batch)
  for i in range(4):  # The first target attends to all inputs.
    changed = {k: v.copy() for k, v in batch.items()}
    changed['encoder_input_tokens'][0, i] += 1
    moved = np.abs(logits(net, params, changed) - before).max(-1)[0]
    assert (moved > 1e-5).all(), i
  for i in range(1, 5):
    changed = {k: v.copy() for k, v in batch.items()}
    changed['decoder_input_tokens'][0, i] += 1
    moved = np.abs(logits(net, params, changed) - before).max(-1)[0]
    assert (moved[:i] == 0).all() and (moved[i:] > 1e-5).all(), i
  # Inputs attend in both directions, so later inputs change earlier positions.

  def second_layer():
    _, sown = net.apply(
      {'params': params},
      batch['encoder_input_tokens'],
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      enable_dropout=False,
      mutable=['intermediates'],
    )
    return sown['intermediates']['decoder']['layers_1']['input_site'][0]

  sown = second_layer()
  batch['encoder_input_tokens'][0, 3] += 1
  other = second_layer()
  assert (np.abs(sown - other).max(-1)[0, :4] > 1e-6).all()


@pytest.mark.parametrize('position', prompt.POSITIONS)
def test_padding_changes_nothing(position):
  placements = prompt.prompt(3, position=position).placements
  net, params = model(*placements)
  narrow, wide = make_batch(*LENGTHS, 4, 5), make_batch(*LENGTHS, 9, 8)
  real = narrow['decoder_target_tokens'] > 0
  got = logits(net, params, wide)[:, :5]
  np.testing.assert_allclose(
    got[real], logits(net, params, narrow)[real], atol=2e-5
  )


def test_a_prompt_of_embeddings_is_those_tokens():
  net, params = model(*prompt.prompt(2).placements)
  flat = parameters.flatten(params)
  flat[prompt.PATH] = flat['token_embedder/embedding'][jnp.array([30, 31])]
  batch = make_batch(*LENGTHS, 4, 5)
  got = logits(net, parameters.unflatten(flat), batch)
  before = np.tile(np.array([30, 31], np.int32), (3, 1))
  inputs = np.concatenate([before, batch['encoder_input_tokens']], axis=1)
  plain = network.Transformer(ALONE)
  base = {k: flat[k] for k in structure.parameters(plain)}
  want = logits(
    plain,
    parameters.unflatten(base),
    batch | {'encoder_input_tokens': inputs},
  )
  real = batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(got[real], want[real], atol=2e-5)


@pytest.mark.parametrize('how', [Decoding(), Decoding(num_beams=3)])
@pytest.mark.parametrize('length', [0, 3])
def test_decoding_with_the_cache_is_decoding_without(how, length):
  placements = prompt.prompt(length).placements if length else ()
  net, params = model(*placements)
  inputs = make_batch([6, 3, 1], [1, 1, 1], 6)['encoder_input_tokens']
  steps = 5
  predicted, scores = jax.jit(
    lambda params: EncoderDecoderModel(net).predict(params, inputs, steps, how)
  )(params)
  # Scoring the answers in one pass gives the sum of the decoding steps' scores.
  targets = np.asarray(predicted)
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_target_tokens': targets,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': (targets > 0).astype(np.int32),
  }
  whole = EncoderDecoderModel(net).score(params, batch)
  if how.num_beams == 1:
    np.testing.assert_allclose(whole, scores, atol=1e-4)
    said = logits(net, params, batch).argmax(-1)
    np.testing.assert_array_equal(said[targets > 0], targets[targets > 0])
  else:
    ended = (targets == 1).any(-1)  # Others have no penalty.
    lengths = (targets > 0).sum(-1)
    penalty = np.where(ended, ((5 + lengths) / 6) ** how.alpha, 1.0)
    np.testing.assert_allclose(whole / penalty, scores, atol=1e-4)


def test_rows_with_prompts_of_their_own_are_those_of_single_prompts():
  _, params = model()
  base = parameters.flatten(params)
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  many = bank.PromptBank(ALONE, base, 4, mesh=mesh)
  rng = np.random.default_rng(0)
  prompts = {n: rng.normal(size=(n, ALONE.emb_dim)) for n in (2, 5)}
  for n, values in prompts.items():
    many.add(str(n), values.astype(np.float32))
  batch = make_batch([4, 2, 3], [3, 2, 1], 4, 4)
  names = ['2', '5', '2']
  got = many.score(names, batch)
  for i, name in enumerate(names):
    single = network.Transformer(ALONE, prompt.prompt(int(name)).placements)
    own = parameters.unflatten(base | {prompt.PATH: prompts[int(name)]})
    want = EncoderDecoderModel(single).score(own, batch)
    np.testing.assert_allclose(got[i], want[i], atol=1e-4)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """Returns a decoder trained from random weights by `ptune train`."""
  path = tmp_path_factory.mktemp('base') / 'run'
  tiny.run(path, config=TINY, method=full.full(), initial_checkpoint_path=None)
  return str(path)


@pytest.mark.slow
def test_a_prompt_trains_on_it(base, tmp_path):
  state = tiny.run(
    tmp_path, config=TINY, initial_checkpoint_path=base, eval_split=None
  )
  assert int(state.step) == 12
  assert list(parameters.flatten(state.trainable)) == [prompt.PATH]


@pytest.mark.slow
@pytest.mark.parametrize(
  'method',
  [lora.lora(), ia3.ia3(), bottleneck.bottleneck(), norms.norms()],
  ids=lambda m: m.name,
)
def test_methods_for_both_halves_train_on_it(method, base, tmp_path):
  state = tiny.run(
    tmp_path,
    config=TINY,
    method=method,
    initial_checkpoint_path=base,
    eval_split=None,
  )
  paths = parameters.flatten(state.trainable)
  assert paths and all(path.startswith('decoder/') for path in paths)


def test_what_has_no_place_in_it_is_refused():
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  with pytest.raises(ValueError, match='before the inputs'):
    parameters.plan(ALONE, decoder_prompt.decoder_prompt(3), mesh)
