"""Multi-task prompts: the prompt of each row, and how it is composed."""

import argparse
import functools
import json

import jax
import numpy as np
import pytest

from ptune import evaluate, infer
from ptune.convert import commands
from ptune.methods import causal_prompts, multitask, prompt, prompt_init
from ptune.model import network, parameters, structure
from ptune.serving import trained_model
from ptune.tasks import glue, registry
from ptune.training.settings import Trained
from tests import methods_test, tiny
from tests.network_test import SHALLOW, forward, make_batch, random_params
from tests.state_test import ONE

import seqio  # isort: skip  (after seqio_task, which quiets TensorFlow)
import tensorflow as tf  # isort: skip

VOCAB = SHALLOW.vocab_size
make = functools.partial(multitask.multitask, 4, vocab_size=VOCAB, tasks=3)
combines = pytest.mark.parametrize('combine', multitask.COMBINE)


def trained(method, params):
  flat = parameters.flatten(params)
  return {k: np.asarray(v) for k, v in flat.items() if method.trains(k)}


# --------------------------------------------------- equal to the reference


@pytest.mark.parametrize(
  ('combine', 'sizes'),
  {
    'add': {},
    'concat': {'length': 8, 'task_length': 3},
    'concat_features': {'shared_features': 14},
    'project': {'shared_features': 14},
  }.items(),
)
def test_equals_the_reference_implementation(numerics, combine, sizes):
  sizes = {'length': 5, 'tasks': 4, 'vocab_size': 128, **sizes}
  method = multitask.multitask(combine=combine, **sizes)
  methods_test.test_golden_values_and_gradients(
    numerics, f'multitask_{combine}', method
  )


# -------------------------------------------------------------- composition


def by_hand(combine, shared, own, embed):
  """Composes one task's prompt in loops; shared [rows, features], own [n]."""
  rows, features = shared.shape
  if combine == 'concat':
    return np.vstack([shared, own.reshape(-1, embed)])
  result = np.zeros((rows, embed))
  for i in range(rows):
    for j in range(embed):
      if combine == 'add':
        result[i, j] = shared[i, j] + own[i * embed + j]
      elif combine == 'scale':
        result[i, j] = shared[i, j] * own[i] * own[rows + j]
      elif combine == 'project':
        column = own[j * features : (j + 1) * features]
        result[i, j] = shared[i] @ column + own[embed * features + j]
      elif j < features:
        result[i, j] = shared[i, j]
      else:
        result[i, j] = own[i * (embed - features) + j - features]
  return result


@pytest.mark.parametrize(
  ('combine', 'causal'),
  [(combine, i in (0, 3)) for i, combine in enumerate(multitask.COMBINE)],
)
def test_a_row_is_answered_with_the_prompt_of_its_task(combine, causal):
  # Rows of tasks 2, 0, 0 and 1 in one batch; then each row alone, with a plain
  # prompt and without the task token.
  method = make(combine=combine, causal=causal)
  net = network.Transformer(SHALLOW, method.placements)
  params = random_params(net)
  tasks = [2, 0, 0, 1]
  inputs = [[20, 21, 22, 1], [23, 24, 1], [25, 1], [1]]
  first = [[VOCAB - 1 - task] for task in tasks]
  joined = [a + b for a, b in zip(first, inputs, strict=True)]
  targets = [3, 2, 1, 2]
  _, got = forward(net)(params, make_batch(joined, targets, 5, 3))
  plain = network.Transformer(
    SHALLOW, prompt.prompt(4, causal=causal).placements
  )
  want = make_batch(inputs, targets, 4, 3)
  values = trained(method, params)
  base = {
    k: v for k, v in parameters.flatten(params).items() if k not in values
  }
  for row, task in enumerate(tasks):
    value = multitask.task_prompt(method.settings, values, task)
    np.testing.assert_allclose(
      value,
      by_hand(
        combine,
        values[multitask.SHARED],
        values[multitask.TASKS][task],
        SHALLOW.emb_dim,
      ),
      atol=1e-5,
    )
    params = parameters.unflatten({**base, prompt.PATH: value})
    _, logits = forward(plain)(params, want)
    real = want['decoder_target_tokens'][row] > 0
    np.testing.assert_allclose(got[row][real], logits[row][real], atol=2e-5)


@combines
def test_tasks_start_as_what_they_share_or_apart(combine):
  insert = make(combine=combine).placements[0].adapter(name='prompt')
  x, y = np.full((1, 2), VOCAB - 1, np.int32), np.zeros((1, 2, 32), np.float32)
  params = insert.init(jax.random.key(0), x, y)['params']
  values = trained(make(), {'encoder': {'prompt': params}})
  first, second = (
    multitask.task_prompt({'combine': combine}, values, task) for task in (0, 1)
  )
  if combine in ('add', 'scale'):
    np.testing.assert_array_equal(first, values[multitask.SHARED])
    np.testing.assert_array_equal(first, second)
  else:
    assert np.abs(first - second).max() > 0.1
    assert 0.1 < np.std(first) < 1


def test_causal_rows_see_those_before_them_and_all_of_the_input():
  mask = np.ones((1, 1, 1, 5), bool)
  mask[..., -1] = False  # Padding.
  seen = causal_prompts.CausalPrompt(length=3).apply({}, None, mask)
  want = [
    [1, 0, 0, 1, 0],
    [1, 1, 0, 1, 0],
    [1, 1, 1, 1, 0],
    [1, 1, 1, 1, 0],
    [1, 1, 1, 1, 0],
  ]
  np.testing.assert_array_equal(seen[0, 0], want)


# ------------------------------------------------------------------- the data


def test_the_tokens_of_a_task_index_task_choose_its_prompt():
  # Both sides of the contract: SeqIO's tasks put a token first, and the network
  # selects the prompt by this token.
  size = registry.vocabulary().vocab_size
  check = multitask.multitask(vocab_size=size).check
  for name, row in glue.TABLE.items():
    feature = {'inputs': registry.features()['inputs']}
    rows = tf.data.Dataset.from_tensors({'inputs': tf.constant([5, 6])})
    step = functools.partial(
      registry.prepend_sentinel, feature='inputs', offset=row[-1]
    )
    tokens = next(step(rows, feature).as_numpy_iterator())['inputs']
    check(tokens[None])
    assert size - 1 - tokens[0] == row[-1], name
    short = seqio.TaskRegistry.get(f'task_index_glue_{name}_v200')
    offsets = [
      p.keywords['offset']
      for p in short.preprocessors
      if getattr(p, 'func', None) is registry.prepend_sentinel
    ]
    assert offsets == [row[-1]], name


def test_other_tokens_are_refused_and_give_no_other_tasks_prompt():
  method = make()
  good = np.array([[VOCAB - 1, 5], [VOCAB - 3, 0]], np.int32)
  method.check(good)
  net = network.Transformer(SHALLOW, method.placements)
  params = random_params(net)
  for token in (VOCAB - 4, VOCAB, 0, 5):
    bad = good.copy()
    bad[1, 0] = token
    message = rf'\[{token}\].*127 \(task 0\) to 125'
    with pytest.raises(ValueError, match=message):
      method.check(bad)
    encoded = net.apply(
      {'params': params}, bad, enable_dropout=False, method='encode'
    )
    assert np.isfinite(encoded[0]).all()
    assert np.isnan(encoded[1]).any()


def _index(dataset, output_features):
  """Puts a task token first: 258 if a text begins with 'a', 257 with 'b'."""

  def add(example):
    first = 258 - (example['inputs'][:1] - 100)
    return {**example, 'inputs': tf.concat([first, example['inputs']], 0)}

  return dataset.map(add)


_task = seqio.TaskRegistry.get('tiny')
seqio.TaskRegistry.add(
  'tiny_tasks',
  source=_task.source,
  preprocessors=[_task.preprocessors[0], _index, *_task.preprocessors[1:]],
  output_features=_task.output_features,
  metric_fns=_task.metric_fns,
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Returns a run on two tasks, and its method."""
  method = multitask.multitask(3, 'scale', tasks=2, vocab_size=259)
  path = tmp_path_factory.mktemp('multitask') / 'run'
  tiny.run(
    path,
    method=method,
    mixture_or_task_name='tiny_tasks',
    train_steps=2,
    eval_period=2,
  )
  return path, method


@pytest.mark.slow
def test_a_run_learns_both_and_one_is_exported(run, tmp_path, capsys):
  path, method = run
  out = tmp_path / 'one'
  arguments = f'--prompt={path} --format=npy --task=1 --output={out}'
  _export(arguments)
  facts = json.loads(out.with_suffix('.json').read_text())
  assert (facts['method'], facts['task_index']) == ('prompt/causal', 1)
  exported = np.load(out.with_suffix('.npy'))
  values = _run_values(path, method)
  assert not np.allclose(values[multitask.TASKS][0], values[multitask.TASKS][1])
  np.testing.assert_array_equal(
    exported, multitask.task_prompt(method.settings, values, 1)
  )
  for more in ('', ' --task=2'):
    with pytest.raises(ValueError, match=r'2 tasks.*0 \.\.\. 1'):
      _export(arguments.replace(' --task=1', more) + ' --overwrite')


def _export(arguments):
  parser = argparse.ArgumentParser()
  commands.add_arguments('export', parser)
  args = parser.parse_args(arguments.split())
  args.program = 'export'
  commands.run(args)


def _run_values(path, method):
  plan = parameters.plan(tiny.CONFIG, method, ONE)
  params, _ = trained_model.load(plan, Trained(path))
  return trained(method, jax.device_get(params))


def test_rows_without_a_task_end_every_program(run, tmp_path):
  path, method = run
  how = {
    'task_feature_lengths': tiny.LENGTHS,
    'config': tiny.CONFIG,
    'method': method,
    'mixture_or_task_name': 'tiny',
    'batch_size': 8,
    'model_dir': str(path),
    'split': 'validation',
  }
  with tiny.one_device():
    for program, output in (
      (evaluate.evaluate, 'eval'),
      (infer.infer, 'infer'),
    ):
      with pytest.raises(ValueError, match='task_index_'):
        program(
          **tiny.grouped(program, **how, output_dir=str(tmp_path / output))
        )
  with pytest.raises(ValueError, match='task_index_'):
    tiny.run(tmp_path / 'run', method=method)
  assert not (tmp_path / 'run' / 'checkpoints').exists()


# -------------------------------------------------------------------- errors


def test_what_all_share_starts_as_said():
  given = prompt_init.from_array(np.zeros((4, 32)))
  assert make(init=given).initial == {multitask.SHARED: given}


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'length': 0}, 'PROMPT_LENGTH is 0'),
    ({'combine': 'sum'}, "'sum'; it must be one of .*'add'"),
    ({'tasks': 0}, 'tasks is 0; it must be at least 1'),
    ({'tasks': 9, 'vocab_size': 9}, 'tasks is 9; .* less than vocab_size'),
    ({'combine': 'concat', 'length': 1}, 'less than PROMPT_LENGTH, .* 1'),
    ({'combine': 'concat', 'task_length': 0}, 'task_length is 0'),
    ({'shared_features': 0}, 'shared_features is 0; it must be at least 1'),
  ],
)
def test_sizes_that_cannot_be_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    multitask.multitask(**arguments)


def test_features_must_be_left_for_the_tasks():
  method = make(combine='concat_features', shared_features=32)
  with pytest.raises(ValueError, match='shared_features is 32, but d_model'):
    structure.parameters(network.Transformer(SHALLOW, method.placements))
  with pytest.raises(ValueError, match="at position 'start', and got 'before"):
    prompt.prompt(3, position='before_eos', causal=True)
