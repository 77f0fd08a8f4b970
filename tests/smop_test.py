"""Prompts with a router: how it selects a row's prompt, and how it learns."""

import dataclasses

import jax
import numpy as np
import pytest

from ptune.convert.prompts import read_prompt, read_routed
from ptune.convert.trained import dump
from ptune.methods import smop
from ptune.model.adapters import PADDING

ROUTER = smop.ROUTER


def by_hand(prompts, router, x, real):
  """Returns [p_c P_c; X] in float64, and the index of each row's prompt."""
  mean = np.sum(x * real[..., None], axis=1) / real.sum(1)[:, None]
  logits = mean @ router
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  best = np.argmax(p, axis=1)
  rows = np.arange(len(x))
  picked = p[rows, best][:, None, None] * prompts[best]
  return np.concatenate([picked, x], axis=1), best


def test_a_row_has_the_prompt_that_the_formula_picks():
  draw = np.random.default_rng(0)
  prompts, router, x = (
    draw.normal(size=shape) for shape in ((3, 2, 8), (8, 3), (20, 5, 8))
  )
  real = np.arange(5) < draw.integers(1, 6, 20)[:, None]
  want, best = by_hand(prompts, router, x, real)
  assert set(best) == {0, 1, 2}
  got = smop.RoutedPrompts(3, 2).apply(
    {
      'params': {
        'prompts': prompts.reshape(6, 8).astype(np.float32),
        'router': {'kernel': router.astype(np.float32)},
      }
    },
    np.where(real, 7, PADDING),
    x.astype(np.float32),
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_noise_tries_other_prompts_in_training_only():
  module = smop.RoutedPrompts(4, 1)
  tokens, x = np.full((64, 3), 5), np.ones((64, 3, 8), np.float32)
  params = module.init(jax.random.key(0), tokens, x)['params']
  params['prompts'] = np.arange(1.0, 5)[:, None] * np.ones((4, 8), np.float32)
  answers = [
    module.apply({'params': params}, tokens, x, rngs=rngs)[:, 0, 0]
    for rngs in ({}, {'dropout': jax.random.key(1)})
  ]
  assert len(set(np.asarray(answers[0]))) == 1
  # The noise selects several prompts: outputs are 1, 2, 3 or 4 times a
  # probability.
  assert len(np.unique(np.round(answers[1], 3))) > 8
  quiet = dataclasses.replace(module, noise=0.0).apply(
    {'params': params}, tokens, x, rngs={'dropout': jax.random.key(1)}
  )
  np.testing.assert_allclose(quiet[:, 0, 0], answers[0], rtol=1e-6)


def test_it_is_no_plain_prompt_and_a_damaged_file_is_told(tmp_path):
  file = tmp_path / 'smop.safetensors'
  file.write_bytes(dump({smop.PATH: np.ones((6, 8)), ROUTER: np.ones((8, 3))}))
  with pytest.raises(ValueError, match=r'prompts and a router, .*input'):
    read_prompt(file)
  routed, facts = read_routed(file)
  assert routed.prompts.shape == (3, 2, 8) and routed.router.shape == (8, 3)
  assert facts == {}
  file.write_bytes(dump({smop.PATH: np.ones((7, 8)), ROUTER: np.ones((8, 3))}))
  with pytest.raises(ValueError, match=r'prompts \[7, 8\] and a router \[8, 3'):
    read_routed(file)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: smop.smop(0), 'PROMPT_LENGTH is 0'),
    (lambda: smop.smop(prompts=0), 'SMoP has 0 prompts'),
    (lambda: smop.smop(noise=-1), 'noise -1'),
  ],
)
def test_sizes_that_cannot_be_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
