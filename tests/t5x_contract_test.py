"""What T5X needs from ptune's network, tested without T5X.

`t5x_host_test` runs T5X itself if it is installed. The calls here have the same
form as those of T5X's EncoderDecoderModel.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import pathlib
import re
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning

from ptune.config import gin_files, gin_source
from ptune.model import network, partitioning, sizes
from ptune.model.adapters import Method
from tests import methods_test, readme_test

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = sizes.T5Config(
  vocab_size=96,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=1,
  num_decoder_layers=1,
)
BATCH, INPUTS, TARGETS, BEAMS = 2, 6, 3, 2
# The axes of T5X's standard_logical_axis_rules; t5x_host adds the others.
STANDARD_AXES = {
  *('batch', 'vocab', 'embed', 'mlp', 'heads', 'kv', 'joined_kv'),
  *('relpos_buckets', 'abspos_buckets', 'length', 'layers', 'stack'),
  'mlp_activations',
}
# Leaves that beam search does not copy for each beam.
SHARED_CACHE = {'cache_index', 'cached_bias', 'position_embedder_index'}


METHODS = pytest.mark.parametrize(
  'method', methods_test.METHODS.values(), ids=methods_test.METHODS
)


# Methods that change the contents of the cache, or the decoder's input.
DECODED = ['prompt', 'decoder_prompt', 'multitask', 'prefix', 'prompt+lora']


def tokens():
  rng = np.random.default_rng(0)
  inputs = rng.integers(2, 64, (BATCH, INPUTS), np.int32)
  inputs[1, 4:] = 0
  targets = rng.integers(2, 64, (BATCH, TARGETS), np.int32)
  shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  return jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(shifted)


def abstract(method: Method):
  """Returns the module, and shapes of the variables that T5X first makes."""
  module = network.Transformer(CONFIG, method.placements)
  inputs, targets, _ = tokens()
  init = functools.partial(
    module.init,
    encoder_positions=None,
    decoder_positions=None,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    decode=False,
    enable_dropout=False,
  )
  return module, jax.eval_shape(
    init, jax.random.key(0), inputs, targets, targets
  )


def test_the_calls_have_the_names_that_t5x_uses():
  call = inspect.signature(network.Transformer.__call__).parameters
  assert list(call)[1:] == [
    'encoder_input_tokens',
    'decoder_input_tokens',
    'decoder_target_tokens',
    'encoder_segment_ids',
    'decoder_segment_ids',
    'encoder_positions',
    'decoder_positions',
    'enable_dropout',
    'decode',
  ]
  for keyword in ('enable_dropout', 'decode'):
    assert call[keyword].kind is inspect.Parameter.KEYWORD_ONLY
  encode = inspect.signature(network.Transformer.encode).parameters
  assert list(encode)[1:] == [
    'encoder_input_tokens',
    'encoder_segment_ids',
    'enable_dropout',
  ]
  decode = inspect.signature(network.Transformer.decode).parameters
  assert list(decode)[1:5] == [
    'encoded',
    'encoder_input_tokens',
    'decoder_input_tokens',
    'decoder_target_tokens',
  ]
  assert {'enable_dropout', 'decode', 'max_decode_length'} <= set(decode)
  # If T5X found this name, it would fill the cache before decoding.
  assert 'prefill' not in decode


@METHODS
def test_every_parameter_names_its_axes(method):
  _, variables = abstract(method)
  assert set(variables) == {'params', 'params_axes'}
  params = traverse_util.flatten_dict(variables['params'], sep='/')
  axes = flax_partitioning.get_axis_names(variables['params_axes'])
  axes = traverse_util.flatten_dict(axes, sep='/')
  assert set(axes) == set(params)
  for path, x in params.items():
    assert len(axes[path]) == x.ndim, path


@METHODS
def test_every_axis_has_a_rule_and_those_of_adapters_are_replicated(method):
  _, variables = abstract(method)
  axes = flax_partitioning.get_axis_names(variables['params_axes'])
  rules = dict(partitioning.LOGICAL_AXIS_RULES)
  for path, names in traverse_util.flatten_dict(axes, sep='/').items():
    for name in names:
      assert name in rules, f'{path}: no rule for {name}'
      assert name in STANDARD_AXES or rules[name] is None, (path, name)


def test_the_prompt_is_replicated():
  rules = dict(partitioning.LOGICAL_AXIS_RULES)
  assert rules['prompt'] is None
  assert rules['prompt_embed'] is None


@pytest.mark.parametrize('name', DECODED)
def test_cached_decoding_of_beams_equals_teacher_forcing(name):
  module, variables = abstract(methods_test.METHODS[name])
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), variables['params']
  )
  inputs, targets, shifted = tokens()

  @jax.jit
  def forced(params):
    return module.apply(
      {'params': params},
      inputs,
      shifted,
      targets,
      encoder_segment_ids=None,
      decoder_segment_ids=None,
      encoder_positions=None,
      decoder_positions=None,
      decode=False,
      enable_dropout=False,
      rngs=None,
      mutable=False,
    )

  @jax.jit
  def decoded(params):
    encoded = module.apply(
      {'params': params}, inputs, enable_dropout=False, method=module.encode
    )
    _, made = module.apply(
      {'params': params},
      encoder_input_tokens=jnp.ones_like(inputs),
      decoder_input_tokens=jnp.ones_like(targets),
      decoder_target_tokens=jnp.ones_like(targets),
      mutable=['cache'],
      decode=True,
      enable_dropout=False,
    )
    flat = traverse_util.flatten_dict(made['cache'])
    for path, x in flat.items():
      if path[-1] not in SHARED_CACHE:
        assert x.shape[0] == BATCH, f'{path} {x.shape} is not a row for a row'
        flat[path] = jnp.repeat(x, BEAMS, axis=0)
    cache, steps = traverse_util.unflatten_dict(flat), []
    for step in range(TARGETS):
      ids = jnp.repeat(shifted[:, step : step + 1], BEAMS, axis=0)
      logits, made = module.apply(
        {'params': params, 'cache': cache},
        jnp.repeat(encoded, BEAMS, axis=0),
        jnp.repeat(inputs, BEAMS, axis=0),
        ids,
        ids,
        enable_dropout=False,
        decode=True,
        max_decode_length=TARGETS,
        mutable=['cache'],
        method=module.decode,
      )
      cache = made['cache']
      steps.append(logits)
    return jnp.stack(steps)

  got, expected = decoded(params), forced(params)
  assert np.isfinite(expected).all()
  assert got.shape == (TARGETS, BATCH * BEAMS, 1, CONFIG.vocab_size)
  for beam in range(BEAMS):
    np.testing.assert_allclose(
      got[:, beam::BEAMS, 0].swapaxes(0, 1), expected, atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize('installed', ['nothing', 'the empty placeholder'])
def test_without_t5x_the_host_says_what_is_needed(installed, monkeypatch):
  for name in [name for name in sys.modules if name.split('.')[0] == 't5x']:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.delitem(sys.modules, 'ptune.t5x_host', raising=False)
  fake = None
  if installed != 'nothing':
    fake = type(sys)('t5x')
  monkeypatch.setitem(sys.modules, 't5x', fake)
  message = r'needs T5X.*github.com/google-research/t5x.*ptune train'
  with pytest.raises(ImportError, match=message):
    importlib.import_module('ptune.t5x_host')


def test_the_order_of_gin_files_cannot_matter():
  """No macro is set both by a file of gin/t5x/ and by one used with it."""
  sets = re.compile(r'^([A-Z][A-Z0-9_]*) *=', re.M)
  hosts = sorted((ROOT / 'gin' / 't5x').glob('*.gin'))
  assert [path.name for path in hosts] == [
    'eval.gin',
    'finetune.gin',
    'infer.gin',
  ]
  macros = {m for path in hosts for m in sets.findall(path.read_text())}
  for kind in ('models', 'methods', 'prompts'):
    for path in sorted((ROOT / 'gin' / kind).glob('*.gin')):
      both = macros & set(sets.findall(path.read_text()))
      assert not both, f'{path.name} sets {both} too'


# ------------------------------------- what `t5x_host_test` and docs/t5x.md say


def command():
  """Returns the command line of docs/t5x.md."""
  (line,) = (
    line
    for line in readme_test.commands('docs/t5x.md')
    if line.startswith('python -m t5x')
  )
  return line


def test_the_command_of_the_page_names_what_is_there():
  line = command()
  own = gin_files.own_directory()
  assert 'from ptune.config import gin_files; print(' in line
  files = re.findall(r'--gin_file=(\S+)', line)
  assert [file.split('/')[0] for file in files] == ['models', 'prompts', 't5x']
  read = set()
  for file in files:
    source = gin_source.read_file(own / file)
    read |= source.reads
    for included in source.includes:
      if not included.startswith('t5x/'):  # These are T5X's own.
        read |= gin_source.read_file(own / included).reads
  bindings = [
    word.removeprefix('--gin.')
    for word in shlex.split(line)
    if word.startswith('--gin.')
  ]
  assert len(bindings) > 4
  for binding in bindings:
    (name,) = gin_source.read_flag(binding).macros
    # T5X's own finetune.gin reads these.
    theirs = {'MIXTURE_OR_TASK_MODULE', 'TRAIN_STEPS', 'MODEL_DIR'}
    assert name in read | theirs, name


@pytest.mark.parametrize('name', ['eval', 'finetune', 'infer'])
def test_a_gin_file_for_t5x_names_what_ptune_has(name):
  """Modules and functions exist; the test does not import t5x_host."""
  source = gin_source.read_file(ROOT / 'gin' / 't5x' / f'{name}.gin')
  host = ast.parse((ROOT / 'ptune' / 't5x_host.py').read_text())
  hosted = {getattr(node, 'name', None) for node in host.body}
  modules, used = {}, set(re.findall(r'@(\w+)\.(\w+)', source.text))
  for statement in source.statements:
    module = getattr(statement, 'module', '')
    if module.startswith('ptune.'):
      assert importlib.util.find_spec(module), module
      modules[module.split('.')[-1]] = module
    used.add(tuple(getattr(statement, 'selector', '').split('.')))
  for module, function in (pair for pair in used if len(pair) == 2):
    if module == 't5x_host':
      assert function in hosted, function
    elif module in modules:
      assert hasattr(importlib.import_module(modules[module]), function)


def test_the_tests_that_need_t5x_call_what_there_is():
  """Without T5X these tests do not run, so this test checks their calls."""
  tree = ast.parse((ROOT / 'tests' / 't5x_host_test.py').read_text())
  ours = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      if node.module.split('.')[0] in ('ptune', 'tests'):
        module = importlib.import_module(node.module)
        for alias in node.names:
          if alias.name != 't5x_host':
            full = f'{node.module}.{alias.name}'
            found = getattr(module, alias.name, None)
            found = found or importlib.import_module(full)
            ours[alias.asname or alias.name] = found
  assert {'cli', 'open_checkpoint', 'readme_test', 'tiny'} <= set(ours)
  seen = 0
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      module = ours.get(node.value.id)
      if inspect.ismodule(module):
        assert hasattr(module, node.attr), ast.unparse(node)
    if not isinstance(node, ast.Call):
      continue
    function = None
    if isinstance(node.func, ast.Name):
      function = ours.get(node.func.id)
    elif isinstance(node.func, ast.Attribute):
      if isinstance(node.func.value, ast.Name):
        module = ours.get(node.func.value.id)
        function = getattr(module, node.func.attr, None)
    if function is None or any(isinstance(a, ast.Starred) for a in node.args):
      continue
    if any(k.arg is None for k in node.keywords):
      continue
    seen += 1
    # Raises TypeError if an argument is missing or superfluous.
    inspect.signature(function).bind(
      *node.args, **{k.arg: k for k in node.keywords}
    )
  assert seen > 10
