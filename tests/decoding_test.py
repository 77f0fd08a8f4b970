"""Decoding, checked against searches written by hand."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ptune.model import decoding

EOS = 1


class HistoryModel:
  """A language model whose logits depend on all tokens of a row.

  The model sees these tokens only in its cache. So if a beam gets the cache of
  another beam, its logits change. `logits` computes the correct ones.
  """

  def __init__(self, seed=0, rows=3, vocab=6, length=7, eos_bias=0.0):
    rng = np.random.default_rng(seed)
    shape = (length, vocab, vocab)  # [position, its token, next token]
    self.weights = rng.normal(0, 1.5, shape).astype(np.float32)
    self.bias = rng.normal(0, 1.5, (rows, vocab)).astype(np.float32)
    self.bias[:, EOS] += eos_bias
    self.rows, self.length = rows, length

  def cache(self):
    return {
      'cache_index': jnp.int32(0),
      'decoder': {
        'cached_tokens': jnp.full((self.rows, self.length), -1, jnp.int16),
        'row_bias': jnp.asarray(self.bias),
        # This array has no row axis, and decoding must not add one.
        'relpos': {'cached_bias': jnp.asarray(self.weights)},
      },
    }

  def step(self, tokens, cache):
    index, decoder = cache['cache_index'], cache['decoder']
    fed = tokens[:, 0].astype(jnp.int16)
    history = decoder['cached_tokens'].at[:, index].set(fed)
    positions = jnp.arange(self.length)
    terms = decoder['relpos']['cached_bias'][positions, history]
    terms = jnp.where((positions <= index)[None, :, None], terms, 0)
    logits = decoder['row_bias'] + jnp.sum(terms, axis=1)
    decoder = decoder | {'cached_tokens': history}
    return logits[:, None], {'cache_index': index + 1, 'decoder': decoder}

  def logits(self, row, tokens):
    """Returns the logits [vocab] of the token after `tokens`, in float64."""
    fed = (0, *tokens)
    terms = self.weights[range(len(fed)), fed].astype(np.float64)
    return self.bias[row] + terms.sum(0)

  def log_probs(self, row, tokens):
    logits = self.logits(row, tokens)
    return logits - np.log(np.exp(logits).sum())

  def log_prob(self, row, tokens):
    """Returns the log probability of `tokens`, with the EOS if there is one."""
    return sum(
      self.log_probs(row, tokens[:i])[token] for i, token in enumerate(tokens)
    )


def sample(model, **settings):
  def decode(cache):
    return decoding.sample(
      model.step, cache, model.rows, model.length, **settings
    )

  return jax.tree.map(np.asarray, jax.jit(decode)(model.cache()))


def beam_search(model, **settings):
  def decode(cache):
    return decoding.beam_search(
      model.step, cache, model.rows, model.length, **settings
    )

  return jax.tree.map(np.asarray, jax.jit(decode)(model.cache()))


def generated(tokens):
  """[4, 0, 1, 0, 0] -> (4, 0, 1): up to the EOS, or all without one."""
  tokens = tokens.tolist()
  return tuple(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)


def score(model, row, tokens, alpha):
  return model.log_prob(row, tokens) / ((5 + len(tokens)) / 6) ** alpha


def greedy_by_hand(model, row):
  tokens = ()
  while len(tokens) < model.length and EOS not in tokens:
    tokens += (int(np.argmax(model.logits(row, tokens))),)
  return tokens


def beams_by_hand(model, row, num_beams, alpha):
  """Returns [(score, tokens)], best first; the search never stops early."""
  live, finished = [(0.0, ())], []
  for _ in range(model.length):
    candidates = []
    for total, tokens in live:
      for token, log_p in enumerate(model.log_probs(row, tokens)):
        candidates.append((total + log_p, (*tokens, token)))
    candidates = sorted(candidates, reverse=True)[: 2 * num_beams]
    live = [c for c in candidates if c[1][-1] != EOS][:num_beams]
    finished += [
      (score(model, row, tokens, alpha), tokens)
      for _, tokens in candidates
      if tokens[-1] == EOS
    ]
    finished = sorted(finished, reverse=True)[:num_beams]
  return finished or live


def assert_beams(model, row, tokens, scores, expected):
  """Expects these [(score, tokens)], best first, then empty slots."""
  tokens, scores = tokens[::-1], scores[::-1]
  count = len(expected)
  assert [generated(t) for t in tokens[:count]] == [t for _, t in expected], row
  np.testing.assert_allclose(scores[:count], [s for s, _ in expected], 1e-5)
  assert (scores[count:] == decoding.EMPTY_SCORE).all()
  assert (tokens[count:] == 0).all()


def test_argmax_is_the_first_of_the_largest():
  rng = np.random.default_rng(0)
  logits = rng.integers(-3, 3, (64, 2, 7)).astype(np.float32)  # With many ties.
  logits[0] = -np.inf
  want = np.argmax(logits, axis=-1)
  got = jax.jit(decoding.argmax)(logits)
  np.testing.assert_array_equal(got, want)
  assert got.dtype == jnp.int32


def test_greedy_takes_the_most_probable_token_at_every_step():
  model = HistoryModel(rows=8)
  tokens, log_probs = sample(model)
  expected = [greedy_by_hand(model, row) for row in range(8)]
  assert [generated(t) for t in tokens] == expected
  assert {len(t) for t in expected} > {model.length}  # Some rows end.
  by_hand = [model.log_prob(row, t) for row, t in enumerate(expected)]
  np.testing.assert_allclose(log_probs, by_hand, 1e-5)


def test_log_probs_are_the_models_own_whatever_the_sampling():
  model = HistoryModel(rows=8)
  tokens, log_probs = sample(
    model, rng=jax.random.key(0), temperature=2.0, top_k=4, top_p=0.9
  )
  by_hand = [model.log_prob(row, generated(t)) for row, t in enumerate(tokens)]
  np.testing.assert_allclose(log_probs, by_hand, 1e-5)


def test_only_zeros_follow_the_eos():
  model = HistoryModel(rows=16, eos_bias=1.0)
  sampled, _ = sample(model, rng=jax.random.key(1), temperature=1.0)
  beams, _ = beam_search(model)
  for tokens in (sample(model)[0], sampled, beams.reshape(-1, model.length)):
    lengths = [len(generated(t)) for t in tokens]
    assert min(lengths) < model.length - 2  # Some end early.
    for t, length in zip(tokens, lengths, strict=True):
      assert (t[length:] == 0).all()


def test_draws_follow_the_sampling_probabilities():
  # All rows are equal, so each row is one draw. Each draw has two tokens, which
  # also reveals dependence between the draws of a row.
  draws = 20_000
  settings = {'temperature': 1.4, 'top_k': 4, 'top_p': 0.95}
  model = HistoryModel(seed=2, rows=draws, vocab=5, length=2)
  model.bias[:] = model.bias[0]
  tokens, _ = sample(model, rng=jax.random.key(0), **settings)

  def probs(*tokens):
    logits = jnp.asarray(model.logits(0, tokens), jnp.float32)
    return np.asarray(decoding.sampling_probabilities(logits, **settings))

  impossible = 0
  for a, b in itertools.product(range(5), range(5)):
    p = probs()[a] * ((b == 0) if a == EOS else probs(a)[b])
    frequency = np.mean((tokens[:, 0] == a) & (tokens[:, 1] == b))
    assert abs(frequency - p) <= 4 * np.sqrt(p * (1 - p) / draws), (a, b)
    impossible += p == 0
  assert 5 < impossible < 20


def test_sampling_from_one_token_is_greedy():
  model = HistoryModel()
  expected = sample(model)
  rng = jax.random.key(0)
  for settings in ({'top_k': 1}, {'top_p': 1e-6}, {'temperature': 1e-4}):
    actual = sample(model, rng=rng, **({'temperature': 1.0} | settings))
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], expected[1])


def test_top_k_beyond_the_vocabulary_and_top_p_of_one_keep_every_token():
  logits = jnp.asarray([[0.0, -30.0, 2.0, 5.0]])
  expected = jax.nn.softmax(logits)
  for kept in ({'top_k': 100}, {'top_p': 1.0}, {}):
    actual = decoding.sampling_probabilities(logits, 1.0, **kept)
    np.testing.assert_allclose(actual, expected, 1e-6)


def test_top_p_counts_what_top_k_left():
  logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
  # Among the top 2, the first token has 0.57 of the probability (0.4 of 0.7).
  actual = decoding.sampling_probabilities(logits, 1.0, top_k=2, top_p=0.5)
  np.testing.assert_allclose(actual, [1.0, 0.0, 0.0, 0.0])
  actual = decoding.sampling_probabilities(logits, 1.0, top_p=0.5)
  np.testing.assert_allclose(actual, [4 / 7, 3 / 7, 0.0, 0.0], 1e-6)


def test_zero_temperature_gives_all_to_the_most_probable_token():
  actual = decoding.sampling_probabilities(jnp.asarray([[1.0, 3.0, 2.0]]), 0)
  np.testing.assert_array_equal(actual, [[0.0, 1.0, 0.0]])


def test_a_sample_depends_only_on_its_own_row_and_key():
  settings = {'temperature': 1.0, 'top_p': 0.9}
  batch = HistoryModel(rows=4)
  key = jax.random.key(3)
  tokens, log_probs = sample(batch, rng=key, **settings)

  padded = HistoryModel(rows=4)
  padded.rows = 6
  padded.bias = np.concatenate([batch.bias, np.zeros((2, 6), np.float32)])
  actual = sample(padded, rng=key, **settings)
  np.testing.assert_array_equal(actual[0][:4], tokens)
  np.testing.assert_array_equal(actual[1][:4], log_probs)

  # Each row has its own key, so rows may change places.
  order = np.asarray([2, 0, 3, 1])
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(order))
  moved = HistoryModel(rows=4)
  moved.bias = batch.bias[order]
  np.testing.assert_array_equal(
    sample(moved, rng=keys, **settings)[0], tokens[order]
  )

  same = HistoryModel(rows=50)
  same.bias[:] = same.bias[0]
  assert len(np.unique(sample(same, rng=key, **settings)[0], axis=0)) > 10


def test_both_kinds_of_random_keys_give_the_same_sample():
  model = HistoryModel()
  typed, raw = jax.random.key(5), jax.random.PRNGKey(5)
  for keys in (lambda rng: rng, lambda rng: jax.random.split(rng, 3)):
    expected, _ = sample(model, rng=keys(typed), temperature=1.0)
    actual, _ = sample(model, rng=keys(raw), temperature=1.0)
    np.testing.assert_array_equal(actual, expected)


def test_beam_search_with_a_beam_for_all_is_an_exhaustive_search():
  model = HistoryModel(rows=2, vocab=4, length=3)
  # 3 * 3 * 3 beams hold all prefixes without an EOS.
  tokens, scores = beam_search(model, num_beams=27, alpha=0.6)
  prefixes = [
    prefix
    for length in range(3)
    for prefix in itertools.product((0, 2, 3), repeat=length)
  ]
  for row in range(2):
    everything = [
      (score(model, row, (*prefix, EOS), 0.6), (*prefix, EOS))
      for prefix in prefixes
    ]
    expected = sorted(everything, reverse=True)
    assert_beams(model, row, tokens[row], scores[row], expected)


@pytest.mark.parametrize(
  'num_beams, alpha, eos_bias',
  [(1, 0.0, 0), (2, 1.0, 0), (3, 0.6, 2), (4, 0.6, -3), (5, 2.0, 0)],
)
def test_beam_search_matches_one_by_hand_that_never_stops_early(
  num_beams, alpha, eos_bias
):
  # The vocabulary of 6 is smaller than 2 * num_beams, so there are fewer
  # candidates than slots at first.
  model = HistoryModel(rows=1, eos_bias=eos_bias)
  decode = jax.jit(
    lambda cache: decoding.beam_search(
      model.step, cache, 1, model.length, num_beams=num_beams, alpha=alpha
    )
  )
  # One row at a time, so that no other row hides a search that stops too early.
  for seed in range(20):
    model = HistoryModel(seed, rows=1, eos_bias=eos_bias)
    tokens, scores = map(np.asarray, decode(model.cache()))
    expected = beams_by_hand(model, 0, num_beams, alpha)
    assert_beams(model, 0, tokens[0], scores[0], expected)


def test_any_of_several_tokens_ends_an_answer():
  model, ends = HistoryModel(vocab=5, length=4), (EOS, 3)

  def complete(row):
    """Returns {answer, ended by EOS: [its log p with each end token]}."""
    found = {}
    for length in range(1, model.length + 1):
      for head in itertools.product((0, 2, 4), repeat=length - 1):
        log_p = [model.log_prob(row, (*head, end)) for end in ends]
        found[(*head, EOS)] = log_p
    return found

  tokens, scores = beam_search(model, num_beams=90, alpha=0.0, also_ends=(3,))
  greedy, log_probs = sample(model, also_ends=(3,))
  for row in range(model.rows):
    answers = complete(row)
    assert generated(tokens[row, -1]) == max(
      answers, key=lambda x: max(answers[x])
    )
    best = max(max(log_p) for log_p in answers.values())
    np.testing.assert_allclose(scores[row, -1], best, rtol=1e-5)
    own = ()
    while len(own) < model.length and not set(ends) & set(own):
      own += (int(np.argmax(model.logits(row, own))),)
    ended = (*own[:-1], EOS if own[-1] in ends else own[-1])
    assert generated(greedy[row]) == ended
    np.testing.assert_allclose(log_probs[row], model.log_prob(row, own), 1e-5)


def test_one_beam_is_greedy_where_eos_is_the_first_choice_or_the_last():
  model = HistoryModel(rows=8, eos_bias=-100.0)
  model.weights[3, :, EOS] += 200.0
  model.weights[4:, :, EOS] -= 200.0
  expected, log_probs = sample(model)
  tokens, scores = beam_search(model, num_beams=1, alpha=0.0)
  np.testing.assert_array_equal(tokens[:, 0], expected)
  np.testing.assert_allclose(scores[:, 0], log_probs, 1e-5)


def test_one_beam_may_end_where_greedy_goes_on():
  # After token 2, all tokens are equally likely, so EOS as the first token is
  # the second choice of a step and the best answer.
  model = HistoryModel(rows=1, vocab=8, length=4)
  model.weights[:] = 0
  model.bias[0] = np.log([0.01, 0.4, 0.53, 0.01, 0.01, 0.01, 0.01, 0.02])
  model.weights[1:] = -model.bias[0]
  assert generated(sample(model)[0][0])[0] == 2
  tokens, scores = beam_search(model, num_beams=1, alpha=0.0)
  assert generated(tokens[0, 0]) == (EOS,)
  np.testing.assert_allclose(scores, [[np.log(0.4)]], 1e-5)


def test_rows_that_never_finish_return_live_beams_with_raw_log_probs():
  # In this vocabulary, the first step finds 2 * num_beams candidates without an
  # EOS.
  model = HistoryModel(rows=4, vocab=8, eos_bias=-100.0)
  tokens, scores = beam_search(model, num_beams=3, alpha=0.6)
  assert not (tokens == EOS).any()
  by_hand = [
    [model.log_prob(row, tuple(beam)) for beam in tokens[row]]
    for row in range(4)
  ]
  np.testing.assert_allclose(scores, by_hand, 1e-5)
  assert (np.diff(scores, axis=1) >= 0).all()  # The best is last.


def test_impossible_sequences_fill_no_slot():
  model = HistoryModel(rows=2, vocab=4, length=1, eos_bias=-np.inf)
  tokens, scores = beam_search(model, num_beams=5)
  for row in range(2):
    expected = [
      (model.log_prob(row, (token,)), (token,)) for token in (0, 2, 3)
    ]
    expected = sorted(expected, reverse=True)
    assert_beams(model, row, tokens[row], scores[row], expected)


def test_beams_do_not_depend_on_the_other_rows():
  batch = HistoryModel(rows=4, eos_bias=2.0)
  batch.bias[3, EOS] = -100.0  # Keeps the search going.
  tokens, scores = beam_search(batch)
  for row in range(3):
    alone = HistoryModel(rows=1)
    alone.bias = batch.bias[row : row + 1]
    actual = beam_search(alone)
    np.testing.assert_array_equal(actual[0][0], tokens[row])
    np.testing.assert_allclose(actual[1][0], scores[row], 1e-6)


def steps_taken(model, decode, **settings):
  """Counts a decoder's calls of the step function, by cache_index."""
  steps = []

  def counted(tokens, cache):
    jax.debug.callback(lambda i: steps.append(int(i)), cache['cache_index'])
    return model.step(tokens, cache)

  jax.block_until_ready(
    decode(counted, model.cache(), model.rows, model.length, **settings)
  )
  jax.effects_barrier()
  assert sorted(steps) == list(range(len(steps)))
  return len(steps)


def test_decoding_stops_when_no_row_can_change():
  model = HistoryModel(rows=5, length=12, eos_bias=-100.0)
  assert steps_taken(model, decoding.sample) == 12
  assert steps_taken(model, decoding.beam_search) == 12

  model.weights[3, :, EOS] += 200.0  # All beams of all rows end in step 4,
  assert steps_taken(model, decoding.sample) == 4
  assert steps_taken(model, decoding.beam_search) == 4

  model.bias[2, EOS] -= 200.0  # except those of one row.
  assert steps_taken(model, decoding.sample) == 12
  assert steps_taken(model, decoding.beam_search) == 12


def test_rows_on_several_devices_decode_alike_and_their_cache_stays_there():
  model = HistoryModel(rows=16)
  mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))

  def place(x):
    spec = P('data') if x.shape[:1] == (model.rows,) else P()
    return jax.device_put(x, NamedSharding(mesh, spec))

  cache = jax.tree.map(place, model.cache())
  decode = jax.jit(
    lambda cache: decoding.beam_search(model.step, cache, 16, model.length)
  )
  actual = decode(cache)
  for a, b in zip(actual, beam_search(model), strict=True):
    np.testing.assert_allclose(a, b, 1e-6)

  moved = [
    line
    for line in decode.lower(cache).compile().as_text().splitlines()
    if re.search(' all-(gather|to-all)| collective-permute', line)
  ]
  # Only cached_tokens has the type int16.
  assert not [line for line in moved if 's16[' in line]


def test_errors_name_what_is_wrong_and_what_to_give_instead():
  model = HistoryModel()
  key = jax.random.key(0)
  for settings, message in (
    ({'temperature': -1.0}, 'temperature=-1.0, expected 0'),
    ({'temperature': float('nan')}, 'temperature=nan, expected 0'),
    ({'temperature': 1.0, 'rng': None}, 'rng=None .* jax.random.key'),
    ({'temperature': 1.0, 'rng': jax.random.split(key, 2)}, r'\(2,\).* 3'),
    ({'top_k': -1, 'top_p': 1.5}, '(?s)top_k=-1.*top_p=1.5'),
  ):
    with pytest.raises(ValueError, match=message):
      sample(model, **settings)
  with pytest.raises(ValueError, match=r'top_p=-0\.1'):
    decoding.sampling_probabilities(jnp.zeros((2, 3)), 1.0, top_p=-0.1)
  with pytest.raises(ValueError, match=r'(?s)num_beams=0.*alpha=-1'):
    beam_search(model, num_beams=0, alpha=-1.0)
  for decode in (decoding.sample, decoding.beam_search):
    with pytest.raises(ValueError, match='max_decode_length=0'):
      decode(model.step, model.cache(), 3, 0)
    cache = model.cache() | {'lengths': jnp.int32(0)}
    with pytest.raises(ValueError, match=r"'row_bias'.*'lengths'\] \(\).* 4 "):
      decode(model.step, cache, 4, 7)


GOLDEN = 'the reference is T5X: change this file only if its decoding changed'


def test_golden_sampling_distributions(numerics):
  golden = np.load(numerics / 'decoding' / 'decoding.npz')
  logits = jnp.asarray(golden['sampling_step0_logits'])
  names = [name for name in golden.files if name.startswith('dist_')]
  assert len(names) == 6
  for name in names:
    found = re.fullmatch(r'dist_temp(.*)_topk(.*)_topp(.*)', name)
    temperature, top_k, top_p = map(float, found.groups())
    actual = decoding.sampling_probabilities(
      logits, temperature, int(top_k), top_p
    )
    np.testing.assert_allclose(
      actual, golden[name], 1e-5, 1e-7, err_msg=f'{name}: {GOLDEN}'
    )


def test_golden_greedy_from_recorded_logits(numerics):
  golden = np.load(numerics / 'decoding' / 'decoding.npz')

  def step(tokens, cache):
    index = cache['cache_index']
    logits = cache['logits'][:, index, None]
    return logits, cache | {'cache_index': index + 1}

  logits = jnp.asarray(golden['greedy_teacher_forced_logits'])
  cache = {'cache_index': jnp.int32(0), 'logits': logits}
  tokens, log_probs = decoding.sample(step, cache, *logits.shape[:2])
  np.testing.assert_array_equal(tokens, golden['greedy_tokens'], err_msg=GOLDEN)
  np.testing.assert_allclose(
    log_probs, golden['greedy_logprob'], 1e-5, 1e-5, err_msg=GOLDEN
  )
