"""Checkpoints from ptune and from other programs are read in the same way."""

import collections
import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tensorstore as ts
from flax import serialization, traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ptune.convert import Leaf, Source, open_checkpoint, restore
from ptune.convert import source as source_lib
from ptune.convert import t5x as t5x_lib
from ptune.convert.layout import layout
from tests import layouts

PROMPT = 'encoder/prompt/prompt/prompt'
LOGITS = 'decoder/logits_dense/kernel'
EMBEDDING = 'token_embedder/embedding'
QUERY = 'encoder/layers_0/attention/query/kernel'

# All sizes differ, so a mix-up of axes cannot go unnoticed.
VOCAB, EMBED, HEADS, HEAD, MLP, BUCKETS = 48, 16, 4, 6, 40, 32
CONFIG = {
  'model_type': 't5',
  'vocab_size': VOCAB,
  'd_model': EMBED,
  'num_heads': HEADS,
  'd_kv': HEAD,
  'd_ff': MLP,
  'num_layers': 2,
  'num_decoder_layers': 1,
  'relative_attention_num_buckets': BUCKETS,
  'feed_forward_proj': 'gated-gelu',
  'tie_word_embeddings': False,
}


def _shape(path):
  joined = HEADS * HEAD
  if path == EMBEDDING:
    return VOCAB, EMBED
  if path == LOGITS:
    return EMBED, VOCAB
  if path.endswith('rel_embedding'):
    return HEADS, BUCKETS
  if path.endswith('scale'):
    return (EMBED,)
  if '/mlp/' in path:
    return (MLP, EMBED) if '/wo/' in path else (EMBED, MLP)
  return (joined, EMBED) if '/out/' in path else (EMBED, joined)


@pytest.fixture(scope='module')
def params():
  """Returns a T5 1.1 with 2 encoder layers and 1 decoder layer, by path."""
  rng = np.random.default_rng(0)
  paths = [p for p in layout(range(2), range(1)) if '/wi/' not in p]
  return {
    path: rng.standard_normal(_shape(path)).astype(np.float32) for path in paths
  }


def _abstract(arrays, sharding=None):
  return {
    path: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=sharding(path) if sharding else None
    )
    for path, a in arrays.items()
  }


def _assert_same(restored, arrays):
  assert restored.keys() == arrays.keys()
  for path, array in arrays.items():
    got = np.asarray(restored[path])
    assert got.dtype == array.dtype, path
    np.testing.assert_array_equal(got, array, err_msg=path)


def _write_t5x(path, params, *, step=7, gcs=False):
  """Writes the older layout: small arrays in msgpack, matrices in zarr."""
  path.mkdir(parents=True)
  target = {}
  for name, array in params.items():
    if array.ndim < 2:
      target[name] = array
      continue
    directory = f'target.{name.replace("/", ".")}'
    metadata = {
      'shape': list(array.shape),
      'chunks': [max(1, array.shape[0] // 2), *array.shape[1:]],
      'compressor': {'id': 'gzip', 'level': 1},
    }
    store = {'driver': 'file', 'path': f'{path}/{directory}/'}
    spec = {'driver': 'zarr', 'dtype': array.dtype.name, 'metadata': metadata}
    ts.open({**spec, 'kvstore': store}, create=True).result().write(
      array
    ).result()
    if gcs:  # The form of 2021, with the path next to the store.
      store = {'driver': 'gcs', 'bucket': 't5x-dummy-bucket'}
      target[name] = {**spec, 'kvstore': store, 'path': directory}
    else:
      store = {'driver': 'file', 'path': f'{directory}/'}
      target[name] = {**spec, 'kvstore': store}
  tree = {
    'target': traverse_util.unflatten_dict(target, sep='/'),
    'state': {'step': np.int32(step), 'param_states': {'a': {'v': np.ones(3)}}},
  }
  _write_msgpack(path, {'version': 3, 'optimizer': tree})
  return path


def _write_msgpack(path, contents):
  data = serialization.msgpack_serialize(contents)
  (path / 'checkpoint').write_bytes(data)


def _edit_t5x(path, edit):
  contents = serialization.msgpack_restore((path / 'checkpoint').read_bytes())
  edit(contents)
  _write_msgpack(path, contents)


def _torch(params):
  """Returns the tensors of a Hugging Face model with these parameters."""
  tensors = {}
  for ours, (theirs, transposed) in layout(range(2), range(1)).items():
    if ours in params:
      array = params[ours].T if transposed else params[ours]
      tensors[theirs] = np.ascontiguousarray(array)
  return tensors


def _write_huggingface(path, tensors, *, shards=1, config=None):
  path.mkdir(parents=True)
  (path / 'config.json').write_text(json.dumps(CONFIG | (config or {})))
  if shards == 1:
    safetensors.numpy.save_file(tensors, path / 'model.safetensors')
    return path
  where = {}
  for i in range(shards):
    file = f'model-{i + 1:05}-of-{shards:05}.safetensors'
    part = dict(list(tensors.items())[i::shards])
    safetensors.numpy.save_file(part, path / file)
    where |= dict.fromkeys(part, file)
  index = {'metadata': {}, 'weight_map': where}
  (path / 'model.safetensors.index.json').write_text(json.dumps(index))
  return path


def _write_orbax(path, params, **options):
  """Writes T5X's newer layout."""
  tree = {
    'target': traverse_util.unflatten_dict(params, sep='/'),
    'state': {'step': np.int32(9), 'param_states': {'v': None}},
  }
  handler = ocp.PyTreeCheckpointHandler(**options)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path / 'state', args=ocp.args.PyTreeSave(tree))
  return path


def _write_run(path, steps):
  """Writes a MODEL_DIR in which the prompt of step n is filled with n."""
  with ocp.CheckpointManager(path / 'checkpoints') as manager:
    for step in steps:
      prompt = jnp.full((5, EMBED), step, jnp.float32)
      trainable = traverse_util.unflatten_dict({PROMPT: prompt}, sep='/')
      state = {
        'step': jnp.int32(step),
        'trainable': trainable,
        'opt_state': ({'v': prompt}, None),
      }
      args = ocp.args.Composite(state=ocp.args.StandardSave(state))
      manager.save(step, args=args)
  return path


@pytest.fixture(scope='module')
def written(params, tmp_path_factory):
  """Writes the same parameters in every format; returns paths by kind."""
  root = tmp_path_factory.mktemp('written')
  return {
    't5x': _write_t5x(root / 't5x', params),
    't5x_orbax': _write_orbax(root / 'orbax', params),
    'huggingface': _write_huggingface(root / 'hf', _torch(params)),
  }


KINDS = pytest.mark.parametrize('kind', ['t5x', 't5x_orbax', 'huggingface'])

# ---- What the references wrote ----------------------------------------------


def _reference(numerics):
  with np.load(numerics / 'prompt_encoder' / 'params.npz') as arrays:
    return dict(arrays)


def test_t5x_base_checkpoint_is_exact(numerics):
  expected = _reference(numerics)
  source = open_checkpoint(
    numerics / 'checkpoints/legacy_base/checkpoint_1100000'
  )
  assert (source.kind, source.step) == ('t5x', 1100000)
  assert not source.tied and source.gated
  assert not any(path.startswith('state') for path in source.leaves)
  assert any(path.startswith('state/') for path in source.ignored)
  _assert_same(restore(source, _abstract(expected)), expected)


@pytest.mark.parametrize('layout_name', ['legacy', 'orbax'])
def test_t5x_prompt_checkpoint_is_exact(numerics, layout_name):
  expected = _reference(numerics)
  with np.load(numerics / 'trajectory' / 'trajectory.npz') as arrays:
    expected[PROMPT] = arrays['start1100000_prompt_each'][-1]
  source = open_checkpoint(
    numerics / f'checkpoints/{layout_name}_prompt/checkpoint_1100010'
  )
  kind = {'legacy': 't5x', 'orbax': 't5x_orbax'}[layout_name]
  assert (source.kind, source.step) == (kind, 1100010)
  _assert_same(restore(source, _abstract(expected)), expected)
  # To read only the frozen parameters, the caller must ask for them.
  frozen = {k: v for k, v in expected.items() if k != PROMPT}
  with pytest.raises(ValueError, match=f'unexpected.*\n.*{PROMPT}'):
    restore(source, _abstract(frozen))
  _assert_same(restore(source, _abstract(frozen), ignore=(PROMPT,)), frozen)


def test_huggingface_is_exact(numerics):
  expected = _reference(numerics)
  source = open_checkpoint(numerics / 'hf/t5_1_1')
  assert (source.kind, source.step) == ('huggingface', None)
  assert not source.tied and source.activations == ('gelu', 'linear')
  _assert_same(restore(source, _abstract(expected)), expected)


def test_huggingface_head_decides_over_the_tie_flag(numerics, tmp_path):
  path = tmp_path / 'hf'
  shutil.copytree(numerics / 'hf/t5_1_1', path)
  saved = numerics / 'hf/t5_1_1_config_as_saved_by_transformers_5.json'
  shutil.copy(saved, path / 'config.json')
  assert json.loads(saved.read_text())['tie_word_embeddings']
  assert not open_checkpoint(path).tied


@pytest.mark.parametrize(
  'name, tied, activations, shapes',
  [
    (
      't5_1_0',
      True,
      ('relu',),
      {
        EMBEDDING: (96, 32),
        'encoder/layers_1/mlp/wi/kernel': (32, 48),
        'decoder/relpos_bias/rel_embedding': (4, 32),
      },
    ),
    (
      'mt5',
      False,
      ('gelu', 'linear'),
      {
        LOGITS: (24, 104),
        'decoder/layers_1/self_attention/out/kernel': (36, 24),
      },
    ),
    (
      'byt5',
      False,
      ('gelu', 'linear'),
      {LOGITS: (16, 384), 'encoder/layers_3/mlp/wo/kernel': (32, 16)},
    ),
  ],
)
def test_other_families_open(numerics, name, tied, activations, shapes):
  source = open_checkpoint(numerics / 'hf' / name)
  assert (source.tied, source.activations) == (tied, activations)
  assert shapes.items() <= source.shapes.items()
  assert source.gated == (len(activations) == 2)


# ---- Every format -----------------------------------------------------------


@KINDS
def test_written_parameters_come_back(written, params, kind):
  source = open_checkpoint(written[kind])
  assert source.kind == kind
  assert source.step == {'t5x': 7, 't5x_orbax': 9, 'huggingface': None}[kind]
  _assert_same(restore(source, _abstract(params)), params)


@KINDS
def test_a_slice_is_read_in_our_orientation(written, params, kind):
  leaf = open_checkpoint(written[kind]).leaves[QUERY]
  index = slice(3, 11), slice(None, 5)
  np.testing.assert_array_equal(leaf.read(index), params[QUERY][index])
  assert leaf.read((slice(2, 2), slice(None))).shape == (0, HEADS * HEAD)


@KINDS
def test_sharded_restore_reads_each_leaf_once(written, params, kind):
  mesh = Mesh(
    np.array(jax.devices()).reshape(4, 2),
    ('data', 'model'),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )

  def sharding(path):
    # Kernels are split over the 2 devices of a mesh row; all 4 rows hold the
    # same.
    spec = (None, 'model') if path.endswith('kernel') else ()
    return NamedSharding(mesh, PartitionSpec(*spec))

  reads = []

  def counted(path, leaf):
    def fetch(index):
      reads.append(path)
      return leaf.fetch(index)

    return Leaf(leaf.shape, leaf.dtype, fetch)

  source = open_checkpoint(written[kind])
  leaves = {path: counted(path, leaf) for path, leaf in source.leaves.items()}
  source = dataclasses.replace(source, leaves=leaves)
  restored = restore(source, _abstract(params, sharding))
  _assert_same(restored, params)
  assert sorted(reads) == sorted(params)
  # The largest arrays come first, while memory is still free for reading them.
  sizes = [params[path].nbytes for path in reads]
  assert sizes == sorted(sizes, reverse=True)
  for path, array in restored.items():
    assert array.sharding.is_equivalent_to(sharding(path), array.ndim)


def test_a_process_reads_only_what_its_devices_hold():
  class OfOneHost:
    """Eight columns of blocks on four hosts; this host has the third pair."""

    def addressable_devices_indices_map(self, shape):
      width = shape[1] // 8
      return {
        i: (slice(None), slice(i * width, (i + 1) * width)) for i in (4, 5)
      }

  index = source_lib._cover(OfOneHost(), (3, 16))
  assert index == (slice(0, 3), slice(8, 12))
  assert source_lib._cover(None, (3, 16)) == (slice(0, 3), slice(0, 16))


@pytest.mark.parametrize('kind', ['t5x', 't5x_orbax', 'huggingface'])
def test_bfloat16_is_kept_until_it_is_cast(params, tmp_path, kind):
  half = {path: a.astype(jnp.bfloat16) for path, a in params.items()}
  path = {
    't5x': lambda: _write_t5x(tmp_path / 'c', half),
    't5x_orbax': lambda: _write_orbax(tmp_path / 'c', half),
    'huggingface': lambda: _write_huggingface(tmp_path / 'c', _torch(half)),
  }[kind]()
  source = open_checkpoint(path)
  assert {leaf.dtype for leaf in source.leaves.values()} == {
    np.dtype(jnp.bfloat16)
  }
  assert source.leaves[QUERY].read().dtype == jnp.bfloat16
  _assert_same(restore(source, _abstract(half)), half)
  widened = {path: a.astype(np.float32) for path, a in half.items()}
  _assert_same(restore(source, _abstract(params)), widened)
  _assert_same(restore(source, _abstract(half), dtype='float32'), widened)


def test_t5x_written_on_google_cloud_reads_where_it_lies(params, tmp_path):
  path = _write_t5x(tmp_path / 'c', params, gcs=True)
  _assert_same(restore(open_checkpoint(path), _abstract(params)), params)


@pytest.mark.parametrize(
  'options', [{'use_ocdbt': False}, {'use_zarr3': True}], ids=str
)
def test_orbax_without_ocdbt_and_with_zarr3(params, tmp_path, options):
  some = {path: params[path] for path in (EMBEDDING, QUERY)}
  source = open_checkpoint(_write_orbax(tmp_path / 'c', some, **options))
  _assert_same(restore(source, _abstract(some)), some)


def test_orbax_tree_may_lie_in_the_directory_itself(written, params):
  source = open_checkpoint(written['t5x_orbax'] / 'state')
  assert (source.kind, source.step) == ('t5x_orbax', 9)
  assert source.shapes == {path: a.shape for path, a in params.items()}


def test_huggingface_shards_read_as_one_file(params, tmp_path):
  path = _write_huggingface(tmp_path / 'c', _torch(params), shards=3)
  _assert_same(restore(open_checkpoint(path), _abstract(params)), params)


def test_ptune_run_opens_at_its_newest_step(tmp_path):
  run = _write_run(tmp_path / 'run', (2, 10))
  (run / 'checkpoints' / '11.orbax-checkpoint-tmp-0').mkdir()
  for path, step in ((run, 10), (run / 'checkpoints' / '2', 2)):
    source = open_checkpoint(path)
    assert (source.kind, source.step, source.tied) == ('ptune', step, False)
    expected = {PROMPT: np.full((5, EMBED), step, np.float32)}
    assert source.leaves.keys() == expected.keys()
    assert any(name.startswith('opt_state') for name in source.ignored)
    _assert_same(restore(source, _abstract(expected)), expected)


def test_describe_tells_the_sizes(written):
  for kind, path in written.items():
    text = open_checkpoint(path).describe()
    for fact in (
      kind,
      str(path),
      f'vocab_size {VOCAB}',
      f'emb_dim {EMBED}',
      f'num_heads {HEADS}',
      f'head_dim {HEAD}',
      f'mlp_dim {MLP}',
      'num_encoder_layers 2',
      'num_decoder_layers 1',
    ):
      assert fact in text


def test_importing_the_package_loads_no_tensorflow_and_no_reader():
  code = (
    'import sys, ptune.convert; '
    "bad = {'tensorflow', 'seqio', 'orbax.checkpoint', 'safetensors'}; "
    'sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


# ---- Strictness -------------------------------------------------------------


def _source(arrays):
  leaves = {
    path: Leaf(a.shape, a.dtype, a.__getitem__) for path, a in arrays.items()
  }
  return Source('/somewhere', 't5x', 1, leaves)


def test_one_error_lists_all_that_does_not_fit(params):
  wanted = dict(params)
  del wanted[LOGITS], wanted['encoder/layers_1/mlp/wo/kernel']
  wanted['encoder/layers_2/mlp/wo/kernel'] = np.zeros((MLP, EMBED), 'f4')
  wanted['encoder/layers_3/mlp/wo/kernel'] = np.zeros((MLP, EMBED), 'f4')
  wanted[EMBEDDING] = np.zeros((VOCAB, 24), np.float32)
  wanted[QUERY] = np.zeros((24, HEADS * HEAD), np.float32)
  source = _source(params)
  with pytest.raises(ValueError) as error:
    restore(source, _abstract(wanted))
  text = str(error.value)
  for part in (
    '2 missing in the checkpoint:\n  encoder/layers_2/mlp/wo/kernel [40, 16]\n'
    '  encoder/layers_3/mlp/wo/kernel [40, 16]\n',
    '2 unexpected in the checkpoint:\n  decoder/logits_dense/kernel [16, 48]\n'
    '  encoder/layers_1/mlp/wo/kernel [40, 16]\n',
    f'2 of another shape:\n  {QUERY}: got [16, 24], expected [24, 24]\n'
    f'  {EMBEDDING}: got [48, 16], expected [48, 24]\n',
    source.describe(),
    'emb_dim is 16, in the model 24',
    'gin file may be for another size',
  ):
    assert part in text


@pytest.mark.parametrize(
  'ignore', ['*/prompt', ('x', '*prompt*'), lambda path: path == PROMPT]
)
def test_only_what_is_ignored_may_be_left_over(ignore):
  arrays = {PROMPT: np.ones((5, 2)), 'a': np.ones(2), 'b': np.ones(2)}
  source = _source(arrays)
  wanted = {path: arrays[path] for path in ('a', 'b')}
  restored = restore(source, _abstract(wanted), ignore=ignore, dtype=np.float32)
  assert restored.keys() == wanted.keys()
  with pytest.raises(ValueError, match='1 unexpected in the checkpoint:\n  b'):
    restore(source, _abstract({'a': wanted['a']}), ignore=ignore)


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_values_that_are_not_finite_are_named(dtype):
  arrays = {name: np.ones((6, 4), dtype) for name in ('good', 'bad', 'worse')}
  arrays['bad'][5, 3] = np.nan
  arrays['worse'][0, 0] = -np.inf
  with pytest.raises(ValueError, match='NaN or infinite') as error:
    restore(_source(arrays), _abstract(arrays))
  assert '  bad [6, 4]' in str(error.value)
  assert '  worse [6, 4]' in str(error.value)
  assert '  good' not in str(error.value)


def test_large_arrays_are_checked_to_their_end():
  large = np.zeros((5, 1 << 20), np.float32)
  large[-1, -1] = np.nan
  with pytest.raises(ValueError, match='NaN or infinite'):
    restore(_source({'a': large}), _abstract({'a': large}))


def test_values_too_large_for_the_dtype_are_named():
  source = _source({'a': np.full((2,), 1e30, np.float32)})
  abstract = {'a': jax.ShapeDtypeStruct((2,), np.float16)}
  with pytest.raises(ValueError, match='a \\[2\\] as float16'):
    restore(source, abstract)


# ---- What is not a checkpoint -----------------------------------------------


def test_nothing_there_names_the_neighbours(tmp_path):
  (tmp_path / 'checkpoint_1').mkdir()
  with pytest.raises(FileNotFoundError) as error:
    open_checkpoint(tmp_path / 'checkpoint_2' / 'deeper')
  assert 'found checkpoint_1' in str(error.value)
  assert 'Expected the directory of one of' in str(error.value)


@pytest.mark.parametrize('name', ['checkpoint_1100000', '20'])
def test_a_directory_of_checkpoints_names_them(tmp_path, name):
  (tmp_path / name).mkdir()
  with pytest.raises(ValueError, match=f'give one of them:\n.*/{name}$'):
    open_checkpoint(tmp_path)


@pytest.mark.parametrize(
  'files, message',
  [
    ((), 'it is empty'),
    (('notes.txt',), 'found notes.txt'),
    (('config.json', 'tf_model.h5'), 'save it as safetensors'),
    (('adapter_config.json', 'adapter_model.safetensors'), 'PEFT adapter'),
  ],
)
def test_other_directories_are_refused(tmp_path, files, message):
  for file in files:
    (tmp_path / file).write_text('{}')
  with pytest.raises(ValueError, match=message):
    open_checkpoint(tmp_path)


def test_a_file_is_refused(tmp_path):
  (tmp_path / 'prompt.npy').write_text('')
  with pytest.raises(ValueError, match='is a file; give its directory'):
    open_checkpoint(tmp_path / 'prompt.npy')


def test_a_run_without_checkpoints_is_refused(tmp_path):
  (tmp_path / 'checkpoints' / '3.orbax-checkpoint-tmp-1').mkdir(parents=True)
  with pytest.raises(ValueError, match='no finished checkpoint'):
    open_checkpoint(tmp_path)


# ---- Damage: T5X ------------------------------------------------------------


@pytest.fixture
def t5x(written, tmp_path):
  """Returns a copy that the test may damage."""
  return shutil.copytree(written['t5x'], tmp_path / 'checkpoint_7')


def _spec_of(contents, path):
  node = contents['optimizer']['target']
  for key in path.split('/'):
    node = node[key]
  return node


@pytest.mark.parametrize(
  'name', ['../other', '/etc', 'a/../../b', '..', '.', '', None, 'a\\b', 3]
)
def test_t5x_paths_never_leave_the_checkpoint(t5x, name):
  _edit_t5x(t5x, lambda c: _spec_of(c, QUERY)['kvstore'].update(path=name))
  with pytest.raises(ValueError, match='directly below'):
    open_checkpoint(t5x)


def test_t5x_optimizer_state_is_never_opened(t5x, params):
  spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': '../gone'}}
  _edit_t5x(
    t5x, lambda c: c['optimizer']['state']['param_states'].update(b=spec)
  )
  source = open_checkpoint(t5x)
  assert 'state/param_states/b' in source.ignored
  _assert_same(restore(source, _abstract(params)), params)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'driver': 'n5'}, 'expected an array or the TensorStore spec'),
    ({'kvstore': {'driver': 'http', 'path': 'x'}}, "a 'http' store"),
    ({'metadata': {}}, 'no proper shape'),
    ({'dtype': 'object'}, r'float32 \[16, 24\], expected object'),
    ({'dtype': 'uint16'}, 'written as uint16'),
  ],
)
def test_t5x_specs_are_checked(t5x, change, message):
  _edit_t5x(t5x, lambda c: _spec_of(c, QUERY).update(change))
  with pytest.raises(ValueError, match=message):
    open_checkpoint(t5x)


def test_t5x_lists_every_missing_array(t5x):
  for path in (QUERY, EMBEDDING):
    shutil.rmtree(t5x / f'target.{path.replace("/", ".")}')
  with pytest.raises(ValueError, match=r'2 of \d+ arrays are mis') as error:
    open_checkpoint(t5x)
  text = str(error.value)
  assert f'\n  {QUERY}\n' in text and f'\n  {EMBEDDING}\n' in text
  assert str(t5x) in text


def test_t5x_lost_chunk_is_an_error_and_not_zeros(t5x):
  directory = t5x / f'target.{QUERY.replace("/", ".")}'
  (directory / '1.0').unlink()
  leaf = open_checkpoint(t5x).leaves[QUERY]
  with pytest.raises(ValueError, match=f'cannot be read.*{directory}'):
    leaf.read()


@pytest.mark.parametrize('file', ['0.0', '.zarray'])
def test_t5x_truncated_array_names_its_file(t5x, file):
  file = t5x / f'target.{QUERY.replace("/", ".")}' / file
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match=f'(?s)copy it again.*{file}'):
    open_checkpoint(t5x).leaves[QUERY].read()


def test_t5x_array_must_agree_with_the_msgpack(t5x):
  _edit_t5x(
    t5x, lambda c: _spec_of(c, QUERY)['metadata'].update(shape=[16, 23])
  )
  with pytest.raises(ValueError, match=f'{QUERY}: float32 .*24.*16, 23'):
    open_checkpoint(t5x)


@pytest.mark.parametrize('length', [0, 1, 100, -1])
def test_t5x_truncated_msgpack_names_its_file(t5x, length):
  data = (t5x / 'checkpoint').read_bytes()
  (t5x / 'checkpoint').write_bytes(data[:length])
  with pytest.raises(ValueError, match=f'{t5x}/checkpoint .*copy it again'):
    open_checkpoint(t5x)


@pytest.mark.parametrize(
  'contents, message',
  [
    ({'version': 1, 'optimizer': {'target': {}}}, 'version 1'),
    ({'params': {}}, "holds \\['params'\\]"),
  ],
)
def test_t5x_other_layouts_are_refused(tmp_path, contents, message):
  _write_msgpack(tmp_path, contents)
  with pytest.raises(ValueError, match=message):
    open_checkpoint(tmp_path)


def test_tensorflow_checkpoints_are_recognised(tmp_path):
  text = 'model_checkpoint_path: "model.ckpt-1000000"'
  (tmp_path / 'checkpoint').write_text(text)
  with pytest.raises(ValueError, match='Mesh TensorFlow'):
    open_checkpoint(tmp_path)


@pytest.mark.parametrize('heads', [False, True])
@pytest.mark.parametrize('write', ['t5x', 't5x_orbax'])
def test_scanned_layers_are_read_one_by_one(params, tmp_path, write, heads):
  stacked = layouts.scanned(params, HEADS if heads else None)
  assert stacked['encoder/encoder/mlp/wo/kernel'].ndim == 3
  writer = {'t5x': _write_t5x, 't5x_orbax': _write_orbax}[write]
  source = open_checkpoint(writer(tmp_path / 'a', stacked))
  _assert_same(restore(source, _abstract(params)), params)
  # Reads a part of a kernel that crosses heads.
  for path, array in params.items():
    part = tuple(slice(n // 3, n - n // 4) for n in array.shape)
    np.testing.assert_array_equal(source.leaves[path].read(part), array[part])


def test_an_array_of_all_layers_is_read_once(params, tmp_path, monkeypatch):
  stacked = layouts.scanned(params)
  reads = collections.Counter()
  original = t5x_lib.open_arrays

  def counted(*args, **how):
    def leaf(name, x):
      def fetch(index):
        reads[name] += 1
        return x.fetch(index)

      return dataclasses.replace(x, fetch=fetch)

    return {name: leaf(name, x) for name, x in original(*args, **how).items()}

  monkeypatch.setattr(t5x_lib, 'open_arrays', counted)
  source = open_checkpoint(_write_t5x(tmp_path / 'a', stacked))
  restore(source, _abstract(params))
  assert set(reads.values()) == {1}


def test_stacks_of_different_depth_are_named(tmp_path):
  stacked = {
    'encoder/encoder/mlp/wo/kernel': np.zeros((8, 2, 4), np.float32),
    'encoder/encoder/mlp/wi/kernel': np.zeros((4, 3, 8), np.float32),
  }
  path = _write_t5x(tmp_path / 'a', stacked)
  with pytest.raises(ValueError, match=r'scanned layers(.|\n)*8, 2, 4'):
    open_checkpoint(path)


# ---- Damage: Orbax ----------------------------------------------------------


@pytest.fixture
def orbax(written, tmp_path):
  """Returns a copy that the test may damage."""
  return shutil.copytree(written['t5x_orbax'], tmp_path / 'checkpoint_9')


@pytest.mark.parametrize('file', ['_METADATA', 'manifest.ocdbt', 'd'])
@pytest.mark.parametrize('damage', ['missing', 'cut'])
def test_orbax_damage_names_the_directory(orbax, file, damage):
  path = orbax / 'state' / file
  for part in [*path.iterdir()] if path.is_dir() else [path]:
    if damage == 'missing':
      part.unlink()
    else:
      part.write_bytes(part.read_bytes()[:20])
  with pytest.raises(ValueError, match=f'{orbax}/state.*copy it again'):
    open_checkpoint(orbax)


def test_orbax_lost_data_is_an_error(orbax):
  for file in (orbax / 'state').glob('ocdbt.process_*/d/*'):
    file.write_bytes(b'')
  with pytest.raises(ValueError, match='copy it again'):
    source = open_checkpoint(orbax)
    [leaf.read() for leaf in source.leaves.values()]


def test_orbax_trees_of_others_are_refused(tmp_path):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'c', {'params': {'w': jnp.ones(2)}})
  with pytest.raises(ValueError, match="Orbax tree of \\['params'\\]"):
    open_checkpoint(tmp_path / 'c')


# ---- Damage and variants: Hugging Face --------------------------------------


@pytest.mark.parametrize('cut', [0, 4, 200, -1])
def test_truncated_safetensors_names_its_file(params, tmp_path, cut):
  path = _write_huggingface(tmp_path / 'c', _torch(params))
  file = path / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:cut])
  with pytest.raises(ValueError, match=f'{file} is missing, damaged'):
    open_checkpoint(path)


def test_missing_shard_is_named(params, tmp_path):
  path = _write_huggingface(tmp_path / 'c', _torch(params), shards=2)
  (path / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(ValueError, match='missing: model-00002-of-00002'):
    open_checkpoint(path)


@pytest.mark.parametrize(
  'weight_map, message',
  [
    ({'shared.weight': '../model.safetensors'}, 'no valid weight_map'),
    ({'shared.weight': '/model.safetensors'}, 'no valid weight_map'),
    ({'shared.weight': 3}, 'no valid weight_map'),
    (None, 'no valid weight_map'),
    (
      {'no.such': 'model-00001-of-00002.safetensors'},
      'do not have:\n  no.such in model-00001',
    ),
  ],
)
def test_shard_index_is_checked(params, tmp_path, weight_map, message):
  path = _write_huggingface(tmp_path / 'c', _torch(params), shards=2)
  index = path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))
  with pytest.raises(ValueError, match=message):
    open_checkpoint(path)


@pytest.mark.parametrize('text', ['{"model_type": ', '[1]', '[' * 100_000])
def test_damaged_config_is_named(params, tmp_path, text):
  path = _write_huggingface(tmp_path / 'c', _torch(params))
  (path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=f'{path}/config.json'):
    open_checkpoint(path)


def test_config_and_tensors_must_agree(params, tmp_path):
  config = {
    'd_model': 20,
    'd_kv': 4,
    'num_layers': 3,
    'feed_forward_proj': 'relu',
  }
  path = _write_huggingface(tmp_path / 'c', _torch(params), config=config)
  with pytest.raises(ValueError) as error:
    open_checkpoint(path)
  for part in (
    'd_model is 20, in the tensors 16',
    'd_kv is 4, in the tensors 6',
    'num_layers is 3, in the tensors 2',
    "'relu', but the tensors are wi_0 and wi_1",
  ):
    assert part in str(error.value)


@pytest.mark.parametrize(
  'config',
  [
    {'model_type': 'switch_transformers'},
    {'model_type': 'bart'},
    {'dense_act_fn': 'relu'},
    {'is_gated_act': False},
    {'quantization_config': {'quant_method': 'bitsandbytes'}},
    {'pad_token_id': None},
    {'feed_forward_proj': 'gelu'},
    {'layer_norm_epsilon': 1e-5},
    {'relative_attention_max_distance': 64},
    {'feed_forward_proj': ['gated-gelu']},
    {'model_type': None},
    {'model_type': ['t5']},
    {'is_encoder_decoder': False},
  ],
  ids=str,
)
def test_networks_that_ptune_lacks_are_refused(params, tmp_path, config):
  path = _write_huggingface(tmp_path / 'c', _torch(params), config=config)
  with pytest.raises(ValueError, match=r'ptune (does not have|cannot use)'):
    open_checkpoint(path)


def test_unknown_tensors_are_listed(params, tmp_path):
  tensors = _torch(params) | {
    'encoder.block.0.layer.0.SelfAttention.q.lora_A.weight': np.ones((2, 2)),
    'classification_head.dense.weight': np.ones((2, 2)),
  }
  path = _write_huggingface(tmp_path / 'c', tensors)
  with pytest.raises(ValueError, match='2 tensors that no T5') as error:
    open_checkpoint(path)
  assert '\n  classification_head.dense.weight\n' in str(error.value)


def test_quantised_tensors_are_refused(params, tmp_path):
  tensors = _torch(params)
  tensors['shared.weight'] = tensors['shared.weight'].astype(np.int8)
  path = _write_huggingface(tmp_path / 'c', tensors)
  with pytest.raises(ValueError, match=r'shared\.weight: I8'):
    open_checkpoint(path)


def test_copies_and_strays_are_ignored(params, tmp_path):
  tensors = _torch(params)
  stray = (
    'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
  )
  beside = ['encoder.embed_tokens.weight', 'decoder.embed_tokens.weight']
  tensors |= dict.fromkeys(beside, tensors['shared.weight'])
  tensors[stray] = np.ones((BUCKETS, HEADS), np.float32)
  source = open_checkpoint(_write_huggingface(tmp_path / 'c', tensors))
  assert list(source.ignored) == sorted([stray, *beside])
  _assert_same(restore(source, _abstract(params)), params)


def test_shared_embedding_may_have_either_name(params, tmp_path):
  tensors = _torch(params)
  tensors['decoder.embed_tokens.weight'] = tensors.pop('shared.weight')
  source = open_checkpoint(_write_huggingface(tmp_path / 'c', tensors))
  _assert_same(restore(source, _abstract(params)), params)


@pytest.mark.parametrize('flag', [True, False, None])
def test_without_a_head_it_is_tied_whatever_the_flag_says(
  params, tmp_path, flag
):
  tensors = _torch(params)
  del tensors['lm_head.weight']
  config = {'tie_word_embeddings': flag}
  path = _write_huggingface(tmp_path / 'c', tensors, config=config)
  assert open_checkpoint(path).tied


def test_tied_but_unscaled_is_read_as_that(params, tmp_path):
  tensors = _torch(params)
  del tensors['lm_head.weight']
  config = {'scale_decoder_outputs': False}
  path = _write_huggingface(tmp_path / 'c', tensors, config=config)
  source = open_checkpoint(path)
  assert (source.tied, source.scaled) == (True, False)


@pytest.mark.parametrize('head', [None, 'copy'])
@pytest.mark.parametrize('scaled', [None, False, True])
def test_a_tied_mt5_is_not_scaled_unless_it_says_so(
  params, tmp_path, head, scaled
):
  """transformers 5 never scales the logits of a tied mT5."""
  tensors = _torch(params)
  del tensors['lm_head.weight']
  if head:
    tensors['lm_head.weight'] = tensors['shared.weight'].copy()
  config = {'model_type': 'mt5', 'tie_word_embeddings': True}
  if scaled is not None:
    config['scale_decoder_outputs'] = scaled
  path = _write_huggingface(tmp_path / 'c', tensors, config=config)
  source = open_checkpoint(path)
  assert source.scaled == bool(scaled)
  assert source.tied == (bool(scaled) or not head)


def test_an_mt5_without_feed_forward_proj_is_gated(params, tmp_path):
  config = {'model_type': 'mt5', 'feed_forward_proj': None}
  path = _write_huggingface(tmp_path / 'c', _torch(params), config=config)
  said = json.loads((path / 'config.json').read_text())
  del said['feed_forward_proj']
  (path / 'config.json').write_text(json.dumps(said))
  assert open_checkpoint(path).activations == ('gelu', 'linear')


@pytest.mark.parametrize(
  'config, tied',
  [
    ({'tie_word_embeddings': True}, True),
    ({'tie_word_embeddings': False}, False),
    ({'tie_word_embeddings': True, 'scale_decoder_outputs': False}, False),
  ],
  ids=str,
)
def test_a_head_that_copies_the_embedding_is_scaled_as_configured(
  params, tmp_path, config, tied
):
  tensors = _torch(params)
  tensors['lm_head.weight'] = tensors['shared.weight'].copy()
  source = open_checkpoint(
    _write_huggingface(tmp_path / 'c', tensors, config=config)
  )
  assert source.tied == tied
  assert ('lm_head.weight' in source.ignored) == tied
