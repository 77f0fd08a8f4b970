"""Padding positions to a device's tiles: ModelConfig.length_multiple."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ptune.methods import prompt
from ptune.model import layers, network, parameters, t5, tpu
from ptune.model.models import EncoderDecoderModel
from tests.network_test import SHALLOW, make_batch, random_params

# 21 positions with a prompt of five, which need two tiles of 16.
BATCH = make_batch([16, 9, 1], [10, 4, 1])
FILLED = dataclasses.replace(SHALLOW, length_multiple=16)


@functools.cache
def found(config):
  """Returns loss, the prompt's gradient, logits, and greedy answers."""
  net = network.Transformer(config, prompt.prompt(5).placements)
  model = EncoderDecoderModel(net)
  params = parameters.flatten(random_params(net))

  def loss(trained):
    whole = parameters.unflatten({**params, prompt.PATH: trained})
    return model.loss(whole, BATCH)[0], model.logits(whole, BATCH)

  grads = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, logits), gradient = grads(params[prompt.PATH])
  whole, tokens = parameters.unflatten(params), BATCH['encoder_input_tokens']
  answers = jax.jit(model.predict, static_argnums=2)(whole, tokens, 6)
  return jax.device_get((value, gradient, logits, answers))


def test_filling_tiles_changes_no_result():
  for got, want in zip(
    jax.tree.leaves(found(FILLED)), jax.tree.leaves(found(SHALLOW)), strict=True
  ):
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-5)


def test_packed_rows_are_filled_too():
  batch = make_batch([[5, 6, 7, 8, 9]], [[5, 6, 7]], 5, 3)
  segments = {
    'encoder_segment_ids': np.int32([[1, 1, 1, 2, 2]]),
    'decoder_segment_ids': np.int32([[1, 2, 2]]),
  }

  def logits(config):
    net = network.Transformer(config)
    model = EncoderDecoderModel(net)
    return jax.jit(model.logits)(random_params(net), batch | segments)

  np.testing.assert_allclose(logits(FILLED), logits(SHALLOW), atol=1e-4)


def lengths_of_layers(config, monkeypatch):
  """Returns the positions in encoder layers and after the encoder."""
  seen = []
  call = t5.EncoderLayer.__call__

  def watched(self, x, *args, **kwargs):
    seen.append(x.shape[1])
    return call(self, x, *args, **kwargs)

  monkeypatch.setattr(t5.EncoderLayer, '__call__', watched)
  net = network.Transformer(config, prompt.prompt(5).placements)
  params = jax.eval_shape(lambda: random_params(net))
  seen.clear()  # Those were of random_params.
  out = jax.eval_shape(
    lambda params: net.apply(
      {'params': params},
      BATCH['encoder_input_tokens'],
      enable_dropout=False,
      method='encode',
    ),
    params,
  )
  return {*seen}, out.shape[1]


@pytest.mark.parametrize(
  ('multiple', 'platform', 'expected'),
  [(None, 'cpu', 21), (None, 'tpu', 32), (8, 'cpu', 24), (1, 'tpu', 21)],
)
def test_prompt_and_inputs_together_are_rounded_up(
  multiple, platform, expected, monkeypatch
):
  config = dataclasses.replace(SHALLOW, length_multiple=multiple)
  monkeypatch.setattr(tpu, 'platform', lambda: platform)
  assert lengths_of_layers(config, monkeypatch) == ({expected}, 21)
  assert layers.fill_tiles(612, 16) == 624


def test_a_multiple_must_be_positive():
  with pytest.raises(ValueError, match='length_multiple'):
    dataclasses.replace(SHALLOW, length_multiple=0)
