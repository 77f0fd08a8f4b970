"""A bank of prompts on one model answers each row as if it were alone."""

import functools
import logging
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptune.convert.prompts import read_prompt
from ptune.convert.trained import dump
from ptune.methods import prompt, row_prompts, smop
from ptune.model import network, parameters, partitioning, structure
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.serving import bank as bank_lib
from ptune.serving import trained_model
from ptune.serving.bank import PromptBank
from ptune.serving.predictor import Predictor
from tests import tiny

LENGTHS = {'five': 5, 'three': 3}
TARGETS = 6


def drawn(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BASE = {
  path: 0.3 * drawn(i, *x.shape)
  for i, (path, x) in enumerate(
    structure.parameters(network.Transformer(tiny.CONFIG)).items()
  )
}
PROMPTS = {
  name: 2 * drawn(length, length, tiny.CONFIG.emb_dim)
  for name, length in LENGTHS.items()
}
NAMES = ['five', 'three', 'three', 'five', 'five', 'three', 'three', 'five']


def make(devices=1, **settings):
  """Returns a bank without prompts."""
  mesh = partitioning.make_mesh(devices=jax.devices()[:devices])
  return PromptBank(tiny.CONFIG, BASE, TARGETS, mesh=mesh, **settings)


def filled(**settings):
  bank = make(**settings)
  for name, array in PROMPTS.items():
    bank.add(name, array)
  return bank


def batch_of(rows=8):
  """Returns rows of different lengths; the last one is all padding."""
  rng = np.random.default_rng(7)
  lengths = np.linspace(9, 0, rows).astype(int)
  tokens = rng.integers(3, 264, (rows, 9)) * (np.arange(9) < lengths[:, None])
  targets = rng.integers(3, 264, (rows, 4))
  return {
    'encoder_input_tokens': tokens.astype(np.int32),
    'decoder_target_tokens': targets.astype(np.int32),
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': np.ones_like(targets),
  }


def alone(name, ask, how=Decoding()):
  """Returns the model's result with one prompt for all rows."""
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  method = prompt.prompt(LENGTHS[name])
  plan = parameters.plan(tiny.CONFIG, method, mesh)
  model = EncoderDecoderModel(plan.network)
  params = parameters.unflatten({**BASE, prompt.PATH: PROMPTS[name]})
  return ask(Predictor(plan, model, TARGETS, how), (params,))


def own_rows(by_name):
  """Returns each row's result with its own prompt."""
  return [by_name[name][i] for i, name in enumerate(NAMES)]


@pytest.mark.parametrize(
  'how',
  [
    Decoding(),
    Decoding(num_beams=3),
    Decoding(temperature=0.8, top_k=20),
  ],
)
def test_mixed_rows_are_answered_as_if_they_were_alone(how):
  batch = batch_of()
  bank = filled(decoding=how)
  tokens, scores = bank.predict(NAMES, batch['encoder_input_tokens'])
  single = {
    name: alone(name, lambda p, t: p.predict(t, batch, np.arange(8)), how)
    for name in PROMPTS
  }
  np.testing.assert_array_equal(
    tokens, own_rows({name: said for name, (said, _) in single.items()})
  )
  np.testing.assert_allclose(
    scores, own_rows({n: s for n, (_, s) in single.items()}), rtol=1e-5
  )
  # Another order of names gives other answers, so the prompts have an effect.
  other, _ = bank.predict(NAMES[1:] + NAMES[:1], batch['encoder_input_tokens'])
  assert (other != tokens).any()


def test_mixed_rows_are_scored_as_if_they_were_alone_on_all_devices():
  batch = batch_of()
  got = filled(devices=8).score(NAMES, batch)
  single = {n: alone(n, lambda p, t: p.score(t, batch)) for n in PROMPTS}
  np.testing.assert_allclose(got, own_rows(single), rtol=1e-5)


ROUTED = {
  name: smop.Routed(
    2 * drawn(choices, choices, length, tiny.CONFIG.emb_dim),
    30 * drawn(7, tiny.CONFIG.emb_dim, choices),
  )
  for name, choices, length in (('of two', 2, 4), ('of three', 3, 6))
}


def routed_alone(name, ask):
  """Returns the model's result with the prompts of SMoP for all rows."""
  choices, length, embed = ROUTED[name].prompts.shape
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(tiny.CONFIG, smop.smop(length, choices), mesh)
  params = {
    **BASE,
    smop.PATH: ROUTED[name].prompts.reshape(-1, embed),
    smop.ROUTER: ROUTED[name].router,
  }
  model = EncoderDecoderModel(plan.network)
  return ask(Predictor(plan, model, TARGETS), (parameters.unflatten(params),))


@pytest.mark.parametrize('devices', [1, 8])
def test_rows_with_a_router_are_answered_as_if_they_were_alone(devices):
  batch, names = batch_of(), ['of two', 'of three', 'five', 'three'] * 2
  bank = filled(devices=devices)
  bank.add('of two', ROUTED['of two'])
  plain = bank.score(NAMES, batch)
  bank.add('of three', ROUTED['of three'])  # The longest: the bank grows.
  got = bank.score(names, batch)
  ask = lambda p, t: p.score(t, batch)
  single = {name: routed_alone(name, ask) for name in ROUTED}
  single |= {name: alone(name, ask) for name in PROMPTS}
  want = [single[name][i] for i, name in enumerate(names)]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  # The router selects different prompts for its rows.
  mean = smop.mean_token(
    batch['encoder_input_tokens'],
    BASE[parameters.EMBEDDING][batch['encoder_input_tokens']],
  )
  picked = np.argmax(mean @ ROUTED['of three'].router, axis=1)[1::4]
  assert len(set(picked.tolist())) == 2
  assert bank.lengths == {**LENGTHS, 'of two': 4, 'of three': 6}
  # Batches without a router do not change, and a name may get a new prompt.
  np.testing.assert_allclose(bank.score(NAMES, batch), plain, rtol=1e-5)
  bank.add('of two', PROMPTS['five'])
  got = bank.score(['of two'] * 8, batch)
  np.testing.assert_allclose(got, single['five'], rtol=1e-5)
  bank.remove('of three')
  assert 'of three' not in bank.names


def test_a_run_of_smop_is_read(tmp_path):
  routed, file = ROUTED['of two'], tmp_path / 'smop.safetensors'
  flat = routed.prompts.reshape(-1, tiny.CONFIG.emb_dim)
  file.write_bytes(dump({smop.PATH: flat, smop.ROUTER: routed.router}))
  read, given = make(), make()
  read.add('a', file)
  given.add('a', routed)
  batch = batch_of()
  np.testing.assert_array_equal(
    read.score(['a'] * 8, batch), given.score(['a'] * 8, batch)
  )
  wrong = smop.Routed(routed.prompts[..., :3], routed.router[:3])
  with pytest.raises(ValueError, match=r'has shape \[4, 3\]'):
    given.add('b', wrong)


def test_gradients_of_the_prompts_are_those_of_single_runs():
  batch = batch_of()
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  longest = max(LENGTHS.values())
  plan = parameters.plan(tiny.CONFIG, bank_lib.METHOD, mesh)
  model = EncoderDecoderModel(plan.network)
  lengths = jnp.array([LENGTHS[name] for name in NAMES])
  rows = np.zeros((len(NAMES), longest, tiny.CONFIG.emb_dim), np.float32)
  for row, name in zip(rows, NAMES, strict=True):
    row[longest - LENGTHS[name] :] = PROMPTS[name]

  def loss(prompts):
    own = row_prompts.row_parameters(prompts, lengths)
    return model.loss(parameters.unflatten({**BASE, **own}), batch)[0]

  gradients = jax.jit(jax.grad(loss))(rows)

  def single(values, name):
    params = parameters.unflatten({**BASE, prompt.PATH: values})
    placements = prompt.prompt(LENGTHS[name]).placements
    own = np.array([n == name for n in NAMES])
    weights = batch['decoder_loss_weights'] * own[:, None]
    return EncoderDecoderModel(
      network.Transformer(tiny.CONFIG, placements)
    ).loss(params, {**batch, 'decoder_loss_weights': weights})[0]

  for name, length in LENGTHS.items():
    expected = jax.jit(jax.grad(functools.partial(single, name=name)))(
      PROMPTS[name]
    )
    mine = [i for i, n in enumerate(NAMES) if n == name]
    got = np.sum(gradients[np.array(mine)], axis=0)
    np.testing.assert_allclose(
      got[longest - length :], expected, rtol=1e-4, atol=1e-5
    )
    # Masked prompt rows get no gradient.
    assert np.all(got[: longest - length] == 0)
    assert np.abs(expected).max() > 0


def test_a_program_stays_as_prompts_come_and_go():
  bank = filled(prompt_length=5)
  tokens = batch_of()['encoder_input_tokens']
  before = bank.predict(NAMES, tokens)
  for i in range(20):  # Exceeds the capacity several times.
    bank.add(f'other {i}', drawn(i, 4, tiny.CONFIG.emb_dim))
  for i in range(0, 20, 2):
    bank.remove(f'other {i}')
  bank.add('other 1', drawn(99, 2, tiny.CONFIG.emb_dim))
  bank.predict(['other 1'] * 8, tokens)
  np.testing.assert_array_equal(before[0], bank.predict(NAMES, tokens)[0])
  assert bank.predictor._predict._cache_size() == 1
  # A longer prompt makes the batch longer.
  bank.add('long', drawn(0, 6, tiny.CONFIG.emb_dim))
  np.testing.assert_array_equal(before[0], bank.predict(NAMES, tokens)[0])
  assert bank.predictor._predict._cache_size() == 2


def test_a_table_holds_what_was_put_there_last():
  rng = random.Random(0)
  bank, expected = make(), {}
  for i in range(60):
    name = rng.choice('abcdefg')
    if name in expected and rng.random() < 0.5:
      bank.remove(name)
      del expected[name]
    else:
      expected[name] = drawn(i, rng.randint(1, 6), tiny.CONFIG.emb_dim)
      bank.add(name, expected[name])
    assert bank.names == sorted(expected)
    assert bank.lengths == {n: len(expected[n]) for n in sorted(expected)}
    for name, array in expected.items():
      own = parameters.flatten(bank.trees([name])[1])
      length = int(own[row_prompts.LENGTHS[0]][0])
      assert length == len(array)
      np.testing.assert_array_equal(own[row_prompts.ROWS][0, -length:], array)


def test_what_is_no_prompt_is_refused_and_changes_nothing(tmp_path):
  bank = filled()
  good = PROMPTS['three']
  (tmp_path / 'damaged.npy').write_bytes(b'no numbers')
  np.save(tmp_path / 'pickled.npy', np.array([{}]), allow_pickle=True)
  for wrong, message in (
    (good[0], r'shape \[16\]; .* must be \[prompt, 16\]'),
    (good[:, :4], r'shape \[3, 4\]'),
    (good[:0], r'shape \[0, 16\]'),
    (good.astype(str), 'not numbers'),
    (np.full_like(good, np.nan), 'NaN or infinity'),
    (np.full(good.shape, 1e300), 'NaN or infinity'),
    (tmp_path / 'damaged.npy', 'damaged'),
    (tmp_path / 'pickled.npy', 'pickled'),
  ):
    with pytest.raises(ValueError, match=message):
      bank.add('three', wrong)
  with pytest.raises(FileNotFoundError):
    bank.add('three', tmp_path / 'none.npy')
  with pytest.raises(ValueError, match='name of a prompt'):
    bank.add('', good)
  with pytest.raises(bank_lib.UnknownPrompt, match="'thre'; did you mean thre"):
    bank.trees(['thre'])
  with pytest.raises(bank_lib.UnknownPrompt, match='there are five, three'):
    bank.remove('xyz')
  with pytest.raises(ValueError, match='a multiple of the 8 devices'):
    filled(devices=8).trees(['five'])
  assert bank.lengths == dict(sorted(LENGTHS.items()))
  with pytest.raises(ValueError, match='the base does not fit the config'):
    PromptBank(tiny.CONFIG, dict(list(BASE.items())[1:]), TARGETS)


def test_a_prompt_of_another_base_is_refused_or_told(tmp_path, caplog):
  run = tiny.trained()
  load = lambda base, **prompts: trained_model.load_bank(
    tiny.CONFIG, base, 4, prompts, mesh=make().plan.mesh
  )
  with caplog.at_level(logging.WARNING):
    bank = load(tiny.base(), tiny=run, file=run / 'prompts' / 'best.npy')
  assert bank.names == ['file', 'tiny'] and 'another' not in caplog.text
  other = tiny.make_base(tmp_path / 'other', seed=1)
  with pytest.raises(ValueError, match=r"'tiny' .* another base model"):
    load(other, tiny=run)
  with caplog.at_level(logging.WARNING):
    load(other, tiny=run / 'prompts' / 'best.npy')
  assert 'another base model' in caplog.text


def test_prompts_that_are_read_otherwise_are_refused(tmp_path):
  np.save(tmp_path / 'a.npy', PROMPTS['three'])
  (tmp_path / 'a.json').write_text('{"method": "prompt/causal"}')
  with pytest.raises(ValueError, match="method 'prompt/causal'"):
    make().add('a', tmp_path / 'a.npy')


def test_a_flag_names_files_runs_and_directories(tmp_path):
  for name in ('b', 'a'):
    np.save(tmp_path / f'{name}.npy', PROMPTS['three'])
  at = lambda name: str(tmp_path / name)
  assert bank_lib.parse('x=a.npy, y=runs/b') == {'x': 'a.npy', 'y': 'runs/b'}
  assert bank_lib.parse('p/a.npy,runs/b') == {'a': 'p/a.npy', 'b': 'runs/b'}
  assert bank_lib.parse('r/lr0.1,r/lr0.3') == {
    'lr0.1': 'r/lr0.1',
    'lr0.3': 'r/lr0.3',
  }
  home = os.path.expanduser('~/a.npy')
  assert bank_lib.parse('~/a.npy,b=~/a.npy') == {'a': home, 'b': home}
  assert bank_lib.parse(f'{tmp_path},c.npy') == {
    'a': at('a.npy'),
    'b': at('b.npy'),
    'c': 'c.npy',
  }
  assert bank_lib.parse(f'{tmp_path}/a.npy')['a'] == at('a.npy')
  (tmp_path / 'lr=0.3').mkdir()
  with pytest.raises(ValueError, match=r"\['lr=0.3'\] are not names"):
    bank_lib.parse(at('lr=0.3'))
  assert bank_lib.parse(f'x={at("lr=0.3")}') == {'x': at('lr=0.3')}
  run = tmp_path / 'run' / 'prompts'
  run.mkdir(parents=True)
  for name in ('best', 'step_4'):
    np.save(run / f'{name}.npy', PROMPTS['three'])
  assert bank_lib.parse(str(run)) == {'run': str(run)}
  assert read_prompt(run).path == str(run / 'best.npy')
  for wrong, message in (
    ('x=a.npy,x=b.npy', r"\['x'\] name several"),
    ('', 'no prompts'),
    ('x=', 'no prompts'),
    ('=a.npy', 'no prompts'),
    ('glue/sst2=a.npy', r"\['glue/sst2'\] are not names"),
  ):
    with pytest.raises(ValueError, match=message):
      bank_lib.parse(wrong)
