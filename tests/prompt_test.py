"""The soft prompt: its positions, its values, and refused settings.

network_test compares its values with the reference implementation.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ptune.methods import full, prompt, prompt_init
from ptune.model import network, parameters, structure
from ptune.model.adapters import PADDING
from tests.network_test import (
  SHALLOW,
  TINY,
  forward,
  make_batch,
  random_params,
)

EOS = 1
# A full row, a shorter one, one token, and an empty filler row.
ROWS = [[7, 8, 9, 10, 11, EOS], [7, 8, 9, EOS], [EOS], []]
# The result for each position; p, q and r are the prompt.
P, Q, R = 'pqr'
INSERTED = {
  'start': [
    [P, Q, R, 7, 8, 9, 10, 11, EOS],
    [P, Q, R, 7, 8, 9, EOS, 0, 0],
    [P, Q, R, EOS, 0, 0, 0, 0, 0],
    [P, Q, R, 0, 0, 0, 0, 0, 0],
  ],
  'after_first': [
    [7, P, Q, R, 8, 9, 10, 11, EOS],
    [7, P, Q, R, 8, 9, EOS, 0, 0],
    [EOS, P, Q, R, 0, 0, 0, 0, 0],
    [P, Q, R, 0, 0, 0, 0, 0, 0],
  ],
  'before_eos': [
    [7, 8, 9, 10, 11, P, Q, R, EOS],
    [7, 8, 9, P, Q, R, EOS, 0, 0],
    [P, Q, R, EOS, 0, 0, 0, 0, 0],
    [P, Q, R, 0, 0, 0, 0, 0, 0],
  ],
}
positions = pytest.mark.parametrize('position', INSERTED)


def tokens_of(rows, length=6):
  return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


def insert(position, dtype=np.float32):
  """Returns the output of the adapter and the expected output."""
  rng = np.random.default_rng(0)
  table = {token: rng.normal(size=4) for token in [*range(12), P, Q, R]}
  tokens = tokens_of(ROWS)
  embedded = np.array([[table[t] for t in row] for row in tokens], dtype)
  value = np.array([table[t] for t in (P, Q, R)], np.float32)
  out = prompt.InsertPrompt(length=3, position=position).apply(
    {'params': {'prompt': {'prompt': value}}},
    np.where(tokens == 0, PADDING, tokens),
    embedded,
  )
  want = [[table[t] for t in row] for row in INSERTED[position]]
  return out, np.array(want, np.float32).astype(dtype)


@positions
def test_the_prompt_stands_where_it_should_in_rows_of_every_length(position):
  out, want = insert(position)
  np.testing.assert_array_equal(out, want)


@positions
def test_in_bfloat16_only_a_rounded_copy_is_inserted(position):
  out, want = insert(position, jnp.bfloat16)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(out), want)
  net = network.Transformer(
    dataclasses.replace(TINY, dtype='bfloat16'),
    prompt.prompt(3, position=position).placements,
  )
  assert structure.parameters(net)[prompt.PATH].dtype == jnp.float32


@positions
def test_a_prompt_of_embeddings_is_those_tokens(position):
  # A prompt made of the embeddings of three tokens has the same effect as these
  # tokens in the input, on positions, masks and cross-attention too.
  net = network.Transformer(
    SHALLOW, prompt.prompt(3, position=position).placements
  )
  plain = network.Transformer(SHALLOW)
  base = random_params(plain)
  ids = {P: 20, Q: 21, R: 22}
  value = base['token_embedder']['embedding'][[20, 21, 22]]
  params = parameters.merge(base, parameters.unflatten({prompt.PATH: value}))
  targets = [10, 4, 1, 10]
  batch = make_batch(ROWS, targets, encoder_length=6)
  spelled = make_batch(
    [[ids.get(t, t) for t in row] for row in INSERTED[position]],
    targets,
    encoder_length=9,
  )
  np.testing.assert_array_equal(
    batch['decoder_target_tokens'], spelled['decoder_target_tokens']
  )
  _, got = forward(net)(params, batch)
  _, want = forward(plain)(base, spelled)
  real = batch['decoder_loss_weights'] > 0
  np.testing.assert_allclose(got[real], want[real], atol=2e-5)


def test_only_the_prompt_is_trained():
  method = prompt.prompt(5)
  paths = structure.parameters(network.Transformer(TINY, method.placements))
  assert [p for p in paths if method.trains(p)] == [prompt.PATH]
  assert paths[prompt.PATH].shape == (5, 32)
  assert prompt.PATH == 'encoder/prompt/prompt/prompt'  # T5X's path.
  assert method.prompt == prompt.PATH
  added = set(paths) - set(structure.parameters(network.Transformer(TINY)))
  assert added == {prompt.PATH}
  assert all(full.full().trains(p) for p in paths)


def test_runs_of_different_positions_have_different_names():
  names = [prompt.prompt(5, position=p).name for p in prompt.POSITIONS]
  assert names == ['prompt', 'prompt/after_first', 'prompt/before_eos']


def test_the_initialiser_is_the_papers_unless_given():
  base = prompt_init.Base(lambda ids: None, lambda: None, lambda: [])
  init = prompt.prompt(100).initial[prompt.PATH]
  value = init(np.random.default_rng(0), (100, 32), base)
  assert -0.5 <= value.min() < -0.49 < 0.49 < value.max() < 0.5
  given = prompt_init.from_array(np.zeros((100, 32)))
  assert prompt.prompt(100, given).initial == {prompt.PATH: given}


def test_errors_name_the_macro_and_the_choices():
  with pytest.raises(ValueError, match=r'PROMPT_LENGTH is 0; .* at least 1'):
    prompt.prompt(0)
  for wrong in ('20', 20.0):
    with pytest.raises(ValueError, match=f'PROMPT_LENGTH is {wrong!r}'):
      prompt.prompt(wrong)
  with pytest.raises(ValueError, match=r"'end' is not one of .*'before_eos'"):
    prompt.prompt(5, position='end')
