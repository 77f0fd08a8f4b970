"""The benchmarks run, and their deterministic figures are as expected."""

import argparse
import json
import os
import runpy
import sys

import jax
import numpy as np
import pytest

from benchmarks import first_step, peers, startup
from ptune.model import parameters
from ptune.training import state as state_lib
from tests import tiny

pytestmark = pytest.mark.slow

FLAGS = {'size': 'toy', 'batch': 2, 'inputs': 16, 'targets': 4}
FLAGS |= {'prompt_length': 3, 'rounds': 1}


@pytest.fixture
def measure(monkeypatch, capsys):
  """Runs a benchmark; returns the JSON line that it prints."""
  monkeypatch.setattr(os, 'sched_setaffinity', lambda *_: None, raising=False)

  def run(script, *more, **flags):
    flags = {**FLAGS, **flags}
    monkeypatch.setattr(
      sys, 'argv', [script, *(f'--{k}={v}' for k, v in flags.items()), *more]
    )
    runpy.run_module(f'benchmarks.{script}', run_name='__main__')
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)

  return run


def test_step(measure):
  found = measure('step', versus='reference', reference_inputs=24)
  # In so small a model, much of the FLOP count is not matrix products.
  assert 1.5 < found['flops_ratio'] < 2.5
  assert found['reference_gflops'] * 1e9 > 1.3e9 * found['step_gflops']
  assert found['times_reference'] >= found['times_reference_min'] > 0
  assert 0 < found['matmul_share']
  assert 0 < found['model_gflops'] < found['step_gflops']
  assert 0 < found['model_share'] < found['matmul_share']


def test_on_an_accelerator_seconds_are_those_of_the_wall(measure, monkeypatch):
  monkeypatch.setattr(peers, 'on_cpu', lambda: False)
  monkeypatch.setattr(peers, 'LARGE', 64)
  found = measure('step', '--remat', '--fused_attention', dtype='bfloat16')
  assert found['clock'] == 'wall'
  assert found['remat'] and found['fused_attention']
  assert found['seconds']['ours'] > 0 and found['model_share'] > 0


@pytest.mark.filterwarnings('ignore')  # PyTorch's libraries warn.
@pytest.mark.parametrize('script', ['step', 'decode', 'multi_prompt'])
def test_beside_peft(measure, script):
  pytest.importorskip('peft')
  assert measure(script, versus='peft')['times_peft'] > 0


@pytest.mark.filterwarnings('ignore')
def test_pefts_model_is_of_our_size(measure):
  pytest.importorskip('peft')
  found = measure('memory', versus='peft')
  size = {k: v['frozen_bytes'] for k, v in found.items() if 'weights' in k}
  assert size['peft, float32 weights'] == size['float32, float32 weights']
  assert size['peft, bfloat16 weights'] <= size['bfloat16, bfloat16 weights']


def test_memory_is_a_half_and_a_quarter(measure):
  found = measure('memory')
  size = {k: v['frozen_bytes'] for k, v in found.items() if 'weights' in k}
  whole = size['float32, float32 weights']
  args = peers.parser('toy', **FLAGS).parse_args([])
  plan = peers.plan_of(args)
  assert whole == 4 * sum(x.size for x in plan.select(plan.base).values())
  assert 0.5 <= size['bfloat16, bfloat16 weights'] / whole < 0.51
  assert 0.25 < size['bfloat16, int8 weights'] / whole < 0.32
  for name, bytes_of in found.items():
    if 'weights' in name:
      assert bytes_of['argument_bytes'] > bytes_of['frozen_bytes']
      assert bytes_of['temporary_bytes'] > 0


def test_decode(measure):
  assert measure('decode')['seconds'].keys() == {'ours'}
  found = measure('decode', prompts=2)
  assert found['seconds'].keys() == {'together', 'separate'}


def test_several_prompts_cost_the_flops_of_each(measure):
  found = measure('multi_prompt', runs=2)
  assert 0.95 < found['flops_by_separate'] < 1.05
  assert found['times_separate'] > 0


def test_batches_of_like_lengths_and_packed_ones_are_padded_less(
  measure, tmp_path
):
  pytest.importorskip('seqio')
  rng = np.random.default_rng(0)
  rows = ['word ' * n for n in rng.integers(1, 80, 64)]
  lines = ['text\tlabel\n', *(f'{row.strip()}\tyes\n' for row in rows)]
  (tmp_path / 'train.tsv').write_text(''.join(lines))
  found = measure(
    'batching',
    data=tmp_path,
    inputs=96,
    batch=8,
    targets=8,
    checkpoint='ptune://tiny',
  )
  ways = ('bucketed', 'longest', 'full')
  padding = [found[k]['padding'] for k in ways]
  assert padding[0] < padding[1] < padding[2]
  assert found['packed']['padding'] < padding[2] / 2
  assert [found[k]['shapes'] for k in ('bucketed', 'full', 'packed')] == [
    *(3, 1, 1)
  ]
  assert found['packed']['steps'] < found['full']['steps']
  losses = [found[k]['loss'] for k in ways]
  np.testing.assert_allclose(losses, losses[0], rtol=0.2)


def test_batching_without_data_says_so(measure, tmp_path):
  with pytest.raises(SystemExit) as leaving:
    measure('batching', data=tmp_path)
  assert not leaving.value.code


def test_cost_is_what_the_formula_says(measure, tmp_path):
  found = measure('cost', output=tmp_path / 'cost.png')
  assert (tmp_path / 'cost.png').stat().st_size > 10_000
  for points in found['sweeps'].values():
    for point in points:
      assert 0.9 < point['gflops'] / point['analytic_gflops'] < 1.6


def test_startup(monkeypatch):
  pytest.importorskip('peft')
  monkeypatch.setattr(startup, 'STARTS', ('cold',))
  monkeypatch.setattr(startup, 'IMPORTS', ('json',))
  monkeypatch.setattr(os, 'environ', tiny.environment())
  found = startup.measure(argparse.Namespace(model='tiny', versus='peft'))
  assert found.keys() == {'cold', 'peft', 'import_json'}
  assert found['peft']['wall_seconds'] > 0
  assert found['import_json']['cpu_seconds'] < found['cold']['cpu_seconds']


def test_the_first_step_and_answer_from_python(monkeypatch):
  pytest.importorskip('peft')
  monkeypatch.setattr(os, 'environ', tiny.environment())
  found = first_step.measure(argparse.Namespace(model='tiny', repeats=1))
  assert found['lines']['ptune'] < found['lines']['peft'] / 2
  for name in ('cold', 'warm', 'peft'):
    assert 0 < found[name]['first_step'] < found[name]['first_answer']


def test_a_step_moves_nothing_between_host_and_device():
  args = peers.parser('toy', **FLAGS).parse_args([])
  ours = peers.ours(args)
  batch = peers.batch_of(ours.plan, 2, 16, 4)
  step, _, tx, abstract = peers.compile_step(ours.plan, batch)
  state = state_lib.first_state(tx, ours.trainable, abstract)
  call = peers.repeated(step, state, ours.frozen, batch)
  with jax.transfer_guard('disallow'):
    for _ in range(3):
      state, sums = call()
    with pytest.raises(Exception, match=r'[Dd]isallowed host-to-device'):
      jax.numpy.sin(np.ones(3))
  assert int(state.step) == 3
  assert parameters.flatten(state.trainable).keys() == ours.plan.trainable
  assert np.isfinite(float(sums['loss']))
