"""A prompt before the decoder's input: its definition, and its decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptune.methods import decoder_prompt, prompt, prompt_init
from ptune.model import adapters, decoding, network, parameters, structure
from ptune.model.models import Decoding, EncoderDecoderModel
from tests.network_test import SHALLOW, forward, make_batch, random_params

METHODS = {
  'alone': decoder_prompt.decoder_prompt(3),
  'with the encoder': adapters.combine(
    [prompt.prompt(2), decoder_prompt.decoder_prompt(3)]
  ),
}
methods = pytest.mark.parametrize('name', METHODS)


@methods
def test_a_prompt_of_embeddings_is_those_tokens(name):
  net = network.Transformer(SHALLOW, METHODS[name].placements)
  flat = parameters.flatten(random_params(net))
  table = flat['token_embedder/embedding']
  flat[decoder_prompt.PATH] = table[[20, 21, 22]]
  if prompt.PATH in flat:
    flat[prompt.PATH] = table[[30, 31]]
  batch = make_batch([4, 2, 1], [5, 3, 1], 4, 5)
  _, got = forward(net)(parameters.unflatten(flat), batch)

  spelled = dict(batch)
  for key in ('decoder_input_tokens', 'decoder_target_tokens'):
    before = np.tile(np.array([20, 21, 22], np.int32), (3, 1))
    spelled[key] = np.concatenate([before, batch[key]], axis=1)
  if prompt.PATH in flat:
    before = np.tile(np.array([30, 31], np.int32), (3, 1))
    inputs = np.concatenate([before, batch['encoder_input_tokens']], axis=1)
    spelled['encoder_input_tokens'] = inputs
  plain = network.Transformer(SHALLOW)
  base = {k: flat[k] for k in structure.parameters(plain)}
  _, want = forward(plain)(parameters.unflatten(base), spelled)
  assert got.shape == (3, 5, SHALLOW.vocab_size)
  real = batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(got[real], want[:, 3:][real], atol=2e-5)


@methods
def test_a_beam_search_is_the_same_without_a_cache(name):
  net = network.Transformer(SHALLOW, METHODS[name].placements)
  params = random_params(net)
  inputs = make_batch([6, 3, 1], [1, 1, 1], 6)['encoder_input_tokens']
  rows, length = len(inputs), 5

  @jax.jit
  def cached(params):
    how = Decoding(num_beams=3, alpha=0.6)
    return EncoderDecoderModel(net).predict(params, inputs, length, how)

  @jax.jit
  def uncached(params):
    variables = {'params': params}
    encoded = net.apply(
      variables, inputs, enable_dropout=False, method='encode'
    )

    def step(ids, cache):
      """Feeds the tokens so far; attention masks later positions."""
      index = cache['cache_index']
      fed = cache['fed'].at[:, index].set(ids[:, 0])
      beams = len(ids) // rows
      logits = net.apply(
        variables,
        jnp.repeat(encoded, beams, axis=0),
        jnp.repeat(inputs, beams, axis=0),
        fed,
        jnp.ones_like(fed),
        enable_dropout=False,
        method='decode',
      )
      logits = jax.lax.dynamic_slice_in_dim(logits, index, 1, axis=1)
      return logits, {'cache_index': index + 1, 'fed': fed}

    cache = {
      'cache_index': jnp.int32(0),
      'fed': jnp.zeros((rows, length), jnp.int32),
    }
    tokens, scores = decoding.beam_search(
      step, cache, rows, length, num_beams=3, alpha=0.6
    )
    return tokens[:, -1], scores[:, -1]

  tokens, scores = cached(params)
  want, want_scores = uncached(params)
  np.testing.assert_array_equal(tokens, want)
  np.testing.assert_allclose(scores, want_scores, atol=1e-4)
  assert np.count_nonzero(tokens) > 2 * rows  # Long enough for beams to cross.


def test_it_is_trained_alone_or_with_the_encoders():
  for name, paths in (
    ('alone', {decoder_prompt.PATH}),
    ('with the encoder', {decoder_prompt.PATH, prompt.PATH}),
  ):
    method = METHODS[name]
    net = network.Transformer(SHALLOW, method.placements)
    trained = {p for p in structure.parameters(net) if method.trains(p)}
    assert trained == paths == set(method.initial)


def test_arguments_are_those_of_a_prompt():
  given = prompt_init.from_array(np.zeros((3, 32)))
  method = decoder_prompt.decoder_prompt(3, given)
  assert method.initial == {decoder_prompt.PATH: given}
  with pytest.raises(ValueError, match='PROMPT_LENGTH is 0'):
    decoder_prompt.decoder_prompt(0)
