"""The network against the reference implementations, and its invariants."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ptune import network
from ptune.methods import prompt
from ptune.models import EncoderDecoderModel

TINY = network.T5Config(
  vocab_size=128,
  emb_dim=32,
  num_heads=4,
  head_dim=8,
  mlp_dim=64,
  num_encoder_layers=2,
  num_decoder_layers=3,
)


def load(path):
  with np.load(path) as f:
    return dict(f)


def nested(flat):
  return traverse_util.unflatten_dict(
    {k: jnp.asarray(v) for k, v in flat.items()}, sep='/'
  )


def prompted(config, length):
  return network.Transformer(config, prompt.prompt(length).placements)


@pytest.mark.parametrize('case', ['noprompt', 'p5', 'p100', 'p5_long_targets'])
def test_equals_the_reference_implementation(numerics, case):
  folder = numerics / 'prompt_encoder'
  params = load(folder / 'params.npz')
  want = load(folder / f'case_{case}.npz')
  length = {'noprompt': 0, 'p100': 100}.get(case, 5)
  if length:
    params[prompt.PATH] = load(folder / 'prompts.npz')[f'prompt_p{length}']
    net = prompted(TINY, length)
  else:
    net = network.Transformer(TINY)
  check(net, params, want, with_gradient=bool(length))


def check(net, params, want, with_gradient):
  model = EncoderDecoderModel(net)
  params = nested(params)
  batch = {k: jnp.asarray(v) for k, v in want.items() if 'coder_' in k}
  batch.pop('encoder_outputs', None)
  real = np.asarray(batch['decoder_loss_weights']) > 0

  if 'encoder_outputs' in want:
    encoded = net.apply(
      {'params': params},
      batch['encoder_input_tokens'],
      enable_dropout=False,
      method='encode',
    )
    # The reference zeroes padded positions; ours may hold anything there.
    valid = np.any(want['encoder_outputs'] != 0, axis=-1)
    np.testing.assert_allclose(
      np.where(valid[..., None], encoded, 0),
      want['encoder_outputs'],
      atol=5e-5,
    )
  logits = np.asarray(model.logits(params, batch))
  np.testing.assert_allclose(logits[real], want['logits'][real], atol=5e-5)
  loss, sums = model.loss(params, batch)
  np.testing.assert_allclose(loss, want['loss'], rtol=2e-6)
  if 'z_loss' in want:
    np.testing.assert_allclose(sums['z_loss'], want['z_loss'], rtol=2e-5)
  np.testing.assert_allclose(
    model.score(params, batch), want['score_batch'], atol=1e-4, rtol=1e-6
  )
  if with_gradient:
    grads = jax.jit(jax.grad(lambda p: model.loss(p, batch)[0]))(params)
    got = traverse_util.flatten_dict(grads, sep='/')[prompt.PATH]
    scale = np.abs(want['grad_prompt']).max()
    np.testing.assert_allclose(got, want['grad_prompt'], atol=2e-5 * scale)
