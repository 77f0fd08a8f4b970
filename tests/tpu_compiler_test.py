"""The TPU's own compiler, where libtpu is installed; no TPU is there."""

import json
import os
import subprocess
import sys

import pytest

from ptune.tools import tpu_compiler

# A program as XLA prints it: a loop of three, a kernel of ours, a collective.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %n = f32[8,128]{1,0:T(8,128)} negate(%p)
}

%products (a: bf16[32,16,64], k: bf16[64,256]) -> f32[32,16,256] {
  %a = bf16[32,16,64]{2,1,0} parameter(0)
  %k = bf16[64,256]{1,0} parameter(1)
  %z = bf16[1,64,256]{2,1,0} bitcast(%k)
  ROOT %c = f32[32,16,256]{2,1,0} convolution(%a, %z), window={size=1}, \
dim_labels=0bf_0io->0bf
}

%body (b: f32[8,128]) -> f32[8,128] {
  %b = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %f.1 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%b), kind=kLoop, \
calls=%fused, metadata={op_name="jit(step)/jvp(T)/encoder/layers_*/mlp/wo"}, \
backend_config={"estimated_cycles":"1000"}
}

%condition (c: f32[8,128]) -> pred[] {
  %c = f32[8,128]{1,0} parameter(0)
  ROOT %t = pred[] constant(true)
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %w = f32[8,128]{1,0:T(8,128)} while(%x), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %i = bf16[32,16,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %j = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(2)
  %o = f32[32,16,256]{2,1,0:T(8,128)} fusion(%i, %j), kind=kOutput, \
calls=%products, metadata={op_name="jit(step)/T/decoder/layers_1/mlp/wi"}, \
backend_config={"estimated_cycles":"100"}
  %q = bf16[4,256,1024]{2,1,0:T(8,128)(2,1)} fusion(%w), kind=kLoop, \
calls=%fused, backend_config={"estimated_cycles":"10"}
  %t5_attention.7 = (bf16[4,256,1024]{2,1,0:T(8,128)(2,1)}, \
f32[4,16,1,256]{3,2,1,0:T(1,128)}) custom-call(%q, %q, %q), \
custom_call_target="tpu_custom_call", operand_layout_constraints={\
bf16[4,256,1024]{2,1,0}, bf16[4,512,1024]{2,1,0}}, \
metadata={op_name="jit(step)/T/encoder/layers_0/attention/t5_attention"}
  %r = f32[8,128]{1,0:T(8,128)} all-reduce-start(%w), to_apply=%fused
  ROOT %d = f32[8,128]{1,0:T(8,128)} all-reduce-done(%r)
}
"""


def test_cycles_are_added_up_loops_as_often_as_they_run():
  found = tpu_compiler.estimate(PROGRAM, 'v5e')
  assert found.parts['encoder MLP'].cycles == 3 * 1000
  # Read from HBM, and written to memory on the chip.
  assert found.parts['encoder MLP'].bytes == 3 * 8 * 128 * 4
  assert found.parts[tpu_compiler.REST].cycles == 10
  assert found.collectives == {'all-reduce': (1, 8 * 128 * 4)}
  assert found.kernels == {'t5_attention': 1}
  # Two products of 4 rows, 256 queries, 512 keys and a width of 1024, at half
  # of the peak.
  flops = 2 * 2 * 4 * 256 * 512 * 1024
  chip = tpu_compiler.CHIPS['v5e']
  kernel = found.parts['encoder attention'].kernel_cycles
  assert kernel == pytest.approx(2 * flops / chip.flops * chip.clock)
  assert found.seconds('v5e') == pytest.approx((3110 + kernel) / chip.clock)
  assert not found.scheduled


def test_products_are_counted_where_they_are_fused():
  found = tpu_compiler.estimate(PROGRAM, 'v5e').parts
  assert found['decoder MLP'].flops == 2 * 32 * 16 * 64 * 256
  assert found['encoder MLP'].flops == 0  # Additions are no products.
  # The kernel's own, of 4 rows.
  assert found['encoder attention'].flops == 4 * 4 * 256 * 512 * 1024


@pytest.mark.parametrize(
  ('left', 'right', 'out', 'more', 'expected'),
  [
    # 32 rows and 16 heads are windows with zeros between their values.
    (
      *('32,10,16,64', '32,12,16,64', '32,16,10,12'),
      'window={size=32x16 stride=31x15 lhs_dilate=32x16},'
      ' dim_labels=0b1f_0o1i->01bf',
      32 * 16 * 10 * 12 * 64,
    ),
    # The same, read backwards.
    (
      *('32,16,10,12', '32,10,16,64', '32,16,64,12'),
      'window={size=32x16 stride=32x16 pad=31_31x15_15 lhs_dilate=31x15'
      ' rhs_reversal=1x1}, dim_labels=01fb_0i1o->01fb',
      32 * 16 * 10 * 12 * 64,
    ),
    # A matrix.
    ('8,64', '64,256', '8,256', 'dim_labels=bf_io->bf', 8 * 64 * 256),
  ],
)
def test_a_batched_product_counts_what_meets(left, right, out, more, expected):
  kinds = {'a': f'bf16[{left}]{{0}}', 'b': f'bf16[{right}]{{0}}'}
  flops = tpu_compiler._product_flops(
    f'f32[{out}]{{0}}', f'%a, %b), {more}', kinds
  )
  assert flops == 2 * expected


def test_a_kernels_schedule_is_counted_where_it_was_written(tmp_path):
  lines = ['// a schedule', *(f'  {hex(i)}   : > {{ x }}' for i in range(5000))]
  file = tmp_path / '12-t5_attention.7-72-final_bundles.txt'
  file.write_text('\n'.join(lines))
  (
    tmp_path / '12-t5_attention.7-71-schedule-analysis_final_bundles.txt'
  ).touch()
  found = tpu_compiler.estimate(PROGRAM, 'v5e', str(tmp_path))
  # Four rows, and pairs of 16 heads.
  assert found.total.kernel_cycles == 5000 * 4 * 8
  assert found.scheduled


def test_a_deeper_network_has_more_of_what_layers_cost():
  once = tpu_compiler.estimate(PROGRAM, 'v5e')
  deep = once.deepened(12)
  assert deep.parts['encoder MLP'].cycles == 36_000
  assert deep.parts[tpu_compiler.REST] == once.parts[tpu_compiler.REST]


def test_unknown_slices_are_refused_by_name():
  with pytest.raises(ValueError, match='knows no slice of 3 devices'):
    tpu_compiler.devices('v5e', 3)
  with pytest.raises(ValueError, match='v6e'):
    tpu_compiler.devices('h100', 8)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(tpu_compiler, 'available', lambda: False)
  with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]'"):
    tpu_compiler.devices('v5e', 8)


# ------------------------------------------------------------------- compiling

needs_libtpu = pytest.mark.skipif(
  not tpu_compiler.available(), reason="needs pip install 'jax[tpu]'"
)
# Compiles in a process of its own: libtpu and the tests' fake devices need not
# meet. It prints what is asked about each program.
SCRIPT = """
import json, sys
from ptune.methods import prompt
from ptune.model import parameters, partitioning, sizes, model_info
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.tools import memory, tpu_compiler
from ptune.training import optim

changes = json.loads(sys.argv[1])
decodes, model_parallel = changes.pop('decodes', 0), changes.pop('split', 2)
config = sizes.T5Config(**{
  'vocab_size': 512, 'emb_dim': 256, 'num_heads': 4, 'head_dim': 64,
  'mlp_dim': 512, 'num_encoder_layers': 2, 'num_decoder_layers': 1,
  'dtype': 'bfloat16', 'dropout_rate': 0.1, **changes})
mesh = partitioning.make_mesh(model_parallel, tpu_compiler.devices('v5e', 4))
made = parameters.plan(config, prompt.prompt(20), mesh)
run = memory.Workload(config, made.method, optim.adafactor, EncoderDecoderModel,
               {'inputs': 150, 'targets': 8}, 8)
if decodes:
  program = memory.compile_decoding(run, made, Decoding(decodes))
else:
  program = memory.compile_step(run, made)
found = tpu_compiler.estimate(program.as_text(), 'v5e')
held = program.memory_analysis()
print(json.dumps({
  'kernels': found.kernels,
  'collectives': {k: n for k, (n, _) in found.collectives.items()},
  'bytes': found.total.bytes, 'flops': program.cost_analysis()['flops'],
  'seconds': found.seconds('v5e'), 'aliased': held.alias_size_in_bytes,
  'state': sum(map(model_info.nbytes, made.select(made.trainable).values()))}))
"""


def compiled(**changes):
  """What the compiler says of a small network's step on a v5e 2x2."""
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  environment.pop('XLA_FLAGS', None)
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT, json.dumps(changes)],
    env=environment,
    capture_output=True,
    text=True,
    timeout=540,
  )
  assert not done.returncode, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@needs_libtpu
def test_a_step_calls_the_kernel_and_keeps_its_state_in_place():
  found = compiled()
  # Two encoder layers, forward and backward.
  assert found['kernels'] == {'t5_attention': 2, 't5_attention_backward': 2}
  # The state is donated: what is trained, at least, stays where it is.
  assert found['aliased'] >= found['state']
  assert found['seconds'] > 0


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
  'changes',
  [
    {'scan': True, 'remat': True},
    {'fsdp': True, 'frozen_dtype': 'int8'},
    {'fused_attention': False},
    {'decodes': 2},
  ],
  ids=str,
)
def test_options_compile_for_a_tpu(changes):
  found = compiled(**changes)
  assert found['seconds'] > 0
  assert bool(found['kernels']) == (changes.get('fused_attention') is None)
