"""Packed examples give the same results as single ones; none is lost."""

import functools
import itertools

import jax
import numpy as np
import pytest

from ptune.data import batches as data
from ptune.data import packing
from ptune.methods import (
  decoder_prompt,
  ia3,
  lora,
  per_layer,
  prefix,
  prompt,
)
from ptune.model import network, parameters, partitioning, structure
from ptune.model.adapters import VIRTUAL, combine
from ptune.model.models import EncoderDecoderModel
from ptune.training import losses
from tests import tiny
from tests.data_test import (
  LENGTHS,
  assert_same,
  make_mixture,
  make_task,
)
from tests.methods_test import METHODS
from tests.network_test import SHALLOW, random_params

PACKABLE = {
  **{
    f'prompt, {position}': prompt.prompt(3, position=position)
    for position in prompt.POSITIONS
  },
  'prompt, causal': prompt.prompt(3, causal=True),
  'both prompts': combine(
    [prompt.prompt(3), decoder_prompt.decoder_prompt(2), lora.lora(2)]
  ),
  # In these, a network makes the prompt, or (`full`) the whole base is trained.
  **{
    name: METHODS[name]
    for name in ('p_tuning', 'multitask', 'full', 'prefix', 'ia3')
  },
}
PROMPT = prompt.prompt(3)


def short_rows(count):
  rng = np.random.default_rng(0)
  return [
    {
      'inputs': f'{i:03d}' + 'x' * int(rng.integers(0, 20)),
      'targets': 'y' * int(rng.integers(1, 4)),
    }
    for i in range(count)
  ]


@pytest.fixture(scope='module')
def task():
  return make_task(short_rows(50))


@pytest.fixture(scope='module')
def few():
  return make_task(short_rows(9))


def numbers_of(batch):
  """Returns the numbers that the examples of each row begin with."""
  found = []
  for tokens, segments in zip(
    batch['encoder_input_tokens'], batch['encoder_segment_ids'], strict=True
  ):
    own = [tokens[(segments == s) & (tokens < VIRTUAL)] for s in set(segments)]
    text = [bytes((t[:3] - 3).tolist()) for t in own if t.any()]
    found.append(sorted(map(int, text)))
  return found


def plan_of(method):
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  return parameters.plan(SHALLOW, method, mesh)


# ------------------------------------------------------------------- exactness


@pytest.mark.parametrize(
  'name',
  [
    'prompt, start',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in PACKABLE
      if name != 'prompt, start'
    ),
  ],
)
def test_loss_and_gradients_are_those_of_the_examples_alone(name, few):
  method = PACKABLE[name]
  alone = data.Batches(few, LENGTHS, 9, bucket_multiple=None)(0)
  one = packing.PackedBatches(few, LENGTHS, 1, method)
  rows = round(9 / one.examples_per_step)
  assert 1 < rows <= 6, 'nothing was packed'
  packed = packing.PackedBatches(few, LENGTHS, rows, method)(0)
  plan = plan_of(method)
  # Halved, because less sharp softmaxes have smaller rounding errors.
  params = jax.tree.map(lambda x: x / 2, random_params(plan.network))
  params = parameters.flatten(params)
  trained = {path: params.pop(path) for path in plan.trainable}

  def of(model, batch):
    def loss(trained):
      return model.loss(parameters.unflatten(params | trained), batch)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)

  (want, sums), want_gradients = of(EncoderDecoderModel(plan.network), alone)
  model = packing.model_of(EncoderDecoderModel, plan)
  (got, got_sums), gradients = of(model, packed)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for key in ('tokens', 'correct', 'z_loss'):
    np.testing.assert_allclose(got_sums[key], sums[key], rtol=1e-5)
  assert gradients.keys() == plan.trainable
  for path, gradient in gradients.items():
    scale = np.abs(want_gradients[path]).max()
    assert scale > 0
    np.testing.assert_allclose(
      gradient / scale, want_gradients[path] / scale, atol=1e-5, err_msg=path
    )


def test_an_example_of_a_row_stands_with_its_prompt(task):
  method = prompt.prompt(3, position='before_eos')
  batch = packing.PackedBatches(task, LENGTHS, 4, method)(0)
  p = VIRTUAL + np.arange(3)
  for row in range(4):
    tokens, targets = (
      batch[f'{stack}_tokens'][row]
      for stack in ('encoder_input', 'decoder_target')
    )
    ids, segments = (
      batch[f'{stack}_segment_ids'][row] for stack in ('encoder', 'decoder')
    )
    assert set(ids) - {0} == set(segments) - {0} != set()
    for segment in set(ids) - {0}:
      own = tokens[ids == segment]
      np.testing.assert_array_equal(own[-4:], [*p, 1])
      assert (own[:-4] < VIRTUAL).all()
      wanted = targets[segments == segment]
      np.testing.assert_array_equal(
        batch['decoder_input_tokens'][row][segments == segment],
        [0, *wanted[:-1]],
      )
      assert batch['decoder_loss_weights'][row][segments == segment].all()
    assert not tokens[ids == 0].any() and not targets[segments == 0].any()


# ------------------------------------------------------------------ the batches


@pytest.mark.parametrize('in_memory', [True, False])
def test_a_batch_is_a_pure_function_of_the_step(task, in_memory):
  def make(seed=7):
    return packing.PackedBatches(
      task, LENGTHS, 4, PROMPT, seed=seed, window=3, in_memory=in_memory
    )

  first = make()
  expected = [first(step) for step in range(12)]
  assert len({batch['encoder_input_tokens'].shape for batch in expected}) == 1
  assert expected[0]['encoder_input_tokens'].shape == (4, first.shapes[0][0])
  for step in (11, 3):
    assert_same(make()(step), expected[step])
  other = make()
  for step in (9, 3, 0):
    assert_same(other(step), expected[step])
  assert numbers_of(make(seed=8)(0)) != numbers_of(expected[0])


@pytest.mark.parametrize('window', [4, 64])
@pytest.mark.parametrize('batch_size', [1, 4, 40])
def test_each_epoch_holds_each_example_exactly_once(task, batch_size, window):
  batches = packing.PackedBatches(
    task, LENGTHS, batch_size, PROMPT, window=window
  )
  rows = itertools.chain.from_iterable(
    numbers_of(batches(step)) for step in itertools.count()
  )
  epochs = []
  for _ in range(3):
    seen, order = [], []
    while len(seen) < 50:
      order.append(next(rows))
      seen += order[-1]
    assert sorted(seen) == list(range(50))
    epochs.append(order)
  assert epochs[0] != epochs[1] != epochs[2]
  assert len(epochs[0]) < 45


def test_a_mixture_is_packed_by_windows():
  mixture, length = make_mixture(), {'inputs': 96, 'targets': 16}
  make = lambda: packing.PackedBatches(mixture, length, 4, PROMPT, window=2)
  batches = make()
  expected = [batches(step) for step in range(6)]
  assert_same(make()(5), expected[5])
  assert 5 < batches.examples_per_step <= 8


def test_packed_windows_resume_from_a_kept_position(tmp_path, caplog):
  mixture, length = make_mixture(), {'inputs': 96, 'targets': 16}
  make = lambda **how: packing.PackedBatches(
    mixture, length, 4, PROMPT, window=2, **how
  )
  batches = make()
  expected = [batches(step) for step in range(16)]
  first = make(positions=tmp_path)
  for step in range(16):
    assert_same(first(step), expected[step])
  again = make(positions=tmp_path)
  with caplog.at_level('INFO', logger='absl'):
    assert_same(again(15), expected[15])
    assert_same(again(3), expected[3])
  assert 'skipping 128 rows to resume, of which 0 are read' in caplog.text


def test_rows_have_room_for_the_longest_example_and_its_prompt(task):
  method = combine([prompt.prompt(3), decoder_prompt.decoder_prompt(2)])
  batches = packing.PackedBatches(task, LENGTHS, 4, method)
  assert batches.shapes == [(48 + 3, 8 + 2)]
  double = packing.PackedBatches(task, LENGTHS, 4, method, pack=2)
  assert double.shapes == [(2 * (48 + 3), 2 * (8 + 2))]
  assert double.examples_per_step > 1.5 * batches.examples_per_step
  plain = packing.PackedBatches(task, LENGTHS, 4, ia3.ia3())
  assert plain.shapes == [(48, 8)]


def test_first_fit_is_what_it_says():
  lengths = np.array([(5, 1), (3, 2), (2, 2), (3, 3)])
  rows = packing.first_fit(lengths, (8, 4))
  assert [row.tolist() for row in rows] == [[3, 0], [1, 2]]


def test_first_fit_loses_nothing_and_wastes_little():
  rng = np.random.default_rng(0)
  lengths = np.stack([rng.integers(1, 40, 500), np.ones(500, int)], 1)
  rows = packing.first_fit(lengths, (100, 10))
  assert sorted(np.concatenate(rows)) == list(range(500))
  sums = np.array([lengths[row].sum(axis=0) for row in rows])
  assert (sums <= (100, 10)).all()
  assert sums[:, 0].sum() > 0.95 * 100 * len(rows)


# --------------------------------------------------------------------- refusing


@functools.cache
def perceptron(network):
  return EncoderDecoderModel(
    network, objective=losses.perceptron([[3, 1], [4, 1]])
  )


@pytest.mark.parametrize(
  ('method', 'model', 'says'),
  [
    (per_layer.per_layer(3), EncoderDecoderModel, "'per_layer' .*Turn packing"),
    (PROMPT, perceptron, 'perceptron.gin scores .* turn packing off'),
    (
      combine([per_layer.per_layer(3), prefix.prefix(2)]),
      EncoderDecoderModel,
      'Turn packing off',
    ),
  ],
)
def test_what_cannot_be_packed_is_refused(method, model, says):
  with pytest.raises(ValueError, match=says):
    packing.model_of(model, plan_of(method))


def test_an_example_without_a_task_is_named(task):
  method = METHODS['multitask']
  insert = method.packed.insert['encoder'][1]
  assert insert(np.array([127, 5])).tolist() == [*VIRTUAL + np.arange(3), 5]
  assert insert(np.array([126, 5]))[0] == VIRTUAL + 3
  with pytest.raises(ValueError, match=r'begin with the tokens \[1\]'):
    insert(np.array([1, 5]))


# -------------------------------------------------------------------- the run


@pytest.mark.slow
def test_a_packed_run_resumes_with_the_same_bits(tmp_path):
  """Stops after step 5, with packed rows of several epochs."""
  run = functools.partial(tiny.run, eval_split=None, checkpoint_period=12)
  run(tmp_path / 'whole', pack=2)
  run(tmp_path / 'cut', pack=2, train_steps=5)
  run(tmp_path / 'cut', pack=2)
  whole, cut = (
    np.load(tmp_path / name / 'prompts' / 'step_12.npy')
    for name in ('whole', 'cut')
  )
  np.testing.assert_array_equal(whole, cut)
  first = tiny.records(tmp_path / 'whole')[0]
  assert np.isfinite(first['loss'])
  with pytest.raises(ValueError, match='pack: 2 there, 0 here'):
    run(tmp_path / 'cut')


def test_what_cannot_be_packed_ends_a_run_before_anything_is_written(tmp_path):
  with pytest.raises(ValueError, match='PACK is set'):
    tiny.run(tmp_path / 'run', pack=1, method=per_layer.per_layer(3))
  assert not (tmp_path / 'run').exists()


def test_packed_networks_have_the_parameters_of_the_method():
  for method in PACKABLE.values():
    if method.packed is None:
      continue
    nets = [
      network.Transformer(SHALLOW, placements)
      for placements in (method.placements, method.packed.placements)
    ]
    left, right = map(structure.parameters, nets)
    assert left == right
    assert structure.parameter_axes(nets[0]) == structure.parameter_axes(
      nets[1]
    )
