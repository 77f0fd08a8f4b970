"""Batches (ptune/data/batches.py) depend only on the step, and lose no row.

The tasks are real SeqIO tasks on a few lines of text, with bytes as tokens.
"""

import collections
import functools
import itertools
import json
import pathlib
import re
import socket
import threading
import time
import urllib.request

import jax
import numpy as np
import pytest

from ptune.convert.pieces import Bytes
from ptune.data import batches as data
from ptune.data import (
  device_feed,
  padding,
  positions,
  seqio_registry,
  seqio_rows,
  seqio_task,
)
from ptune.data.device_feed import device_put
from ptune.errors import UserError
from ptune.tasks import files
from tests import new_name

import seqio  # isort: skip  (after seqio_rows, which quiets TensorFlow)
import tensorflow as tf  # isort: skip
import tensorflow_datasets as tfds  # isort: skip

LENGTHS = {'inputs': 48, 'targets': 8}
FEATURES = {
  'inputs': seqio.Feature(seqio.ByteVocabulary(), add_eos=True),
  'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True),
}
MODEL_FEATURES = {
  'inputs': 'encoder_input_tokens',
  'targets': 'decoder_target_tokens',
}
TOKENIZE = (
  seqio.preprocessors.tokenize,
  seqio.preprocessors.append_eos_after_trim,
)


def rows_of_text(count, seed=0):
  """Returns numbered rows; inputs have 1 to 59 bytes, targets 1 to 11."""
  rng = np.random.default_rng(seed)
  return [
    {
      'inputs': f'{i:03d}' + 'x' * int(rng.integers(0, 57)),
      'targets': 'y' * int(rng.integers(1, 12)),
    }
    for i in range(count)
  ]


def make_task(rows, *, preprocessors=TOKENIZE, counted=True, features=FEATURES):
  """Registers a task on text in memory under a new name."""

  def dataset_fn(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    columns = {k: [row[k] for row in rows] for k in ('inputs', 'targets')}
    if not rows:
      columns = {k: tf.constant([], tf.string) for k in columns}
    return tf.data.Dataset.from_tensor_slices(columns)

  source = seqio.FunctionDataSource(
    dataset_fn,
    splits=['train', 'validation'],
    num_input_examples={'train': len(rows)} if counted else None,
  )
  return seqio.TaskRegistry.add(
    new_name('data_test'),
    source=source,
    preprocessors=preprocessors,
    output_features=features,
  )


def make_mixture(counts=(40, 25)):
  tasks = [make_task(rows_of_text(n, seed=n)) for n in counts]
  return seqio.MixtureRegistry.add(
    new_name('data_test'),
    [(t.name, 1.0 + i) for i, t in enumerate(tasks)],
  )


def converted(task, lengths=LENGTHS, split='train', shuffle=False):
  """Returns the examples in order, as SeqIO's own converter makes them."""
  dataset = seqio.get_dataset(
    task,
    lengths,
    seqio.EncDecFeatureConverter(pack=False),
    dataset_split=split,
    shuffle=shuffle,
    num_epochs=1,
  )
  return list(dataset.as_numpy_iterator())


def key(row):
  """Returns the inputs of a row without its padding, which identify it."""
  return bytes(np.trim_zeros(row, 'b').astype(np.uint8))


def keys(batch):
  return [key(row) for row in batch['encoder_input_tokens']]


def assert_same(left, right):
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    assert left[name].dtype == right[name].dtype


@pytest.fixture(scope='module')
def task():
  return make_task(rows_of_text(50))


@pytest.fixture(scope='module')
def examples(task):
  return converted(task)


def test_batches_equal_those_of_seqios_converter(task, examples):
  expected = {key(e['encoder_input_tokens']): e for e in examples}
  batches = data.Batches(task, LENGTHS, 10, bucket_multiple=None)
  for step in range(5):
    batch = batches(step)
    for i, name in enumerate(keys(batch)):
      assert_same({k: v[i] for k, v in batch.items()}, expected.pop(name))
  assert not expected


def test_bucketed_batches_are_the_same_rows_with_less_padding(task, examples):
  expected = {key(e['encoder_input_tokens']): e for e in examples}
  batches = data.Batches(task, LENGTHS, 10, bucket_multiple=8)
  for step in range(5):
    batch = batches(step)
    for i, name in enumerate(keys(batch)):
      for feature, row in expected.pop(name).items():
        kept = batch[feature].shape[1]
        np.testing.assert_array_equal(batch[feature][i], row[:kept])
        assert not row[kept:].any()
  assert not expected


def test_a_zero_among_the_targets_has_no_loss_weight_as_in_seqio():
  def tokens(dataset):
    del dataset
    return tf.data.Dataset.from_tensors(
      {'inputs': [3, 0, 4], 'targets': [5, 0, 6]}
    )

  task = make_task(rows_of_text(1), preprocessors=[tokens])
  batch = data.Batches(task, LENGTHS, 1, bucket_multiple=None)(0)
  (expected,) = converted(task)
  assert_same({k: v[0] for k, v in batch.items()}, expected)


@pytest.mark.parametrize('bucket_multiple', [None, 16])
@pytest.mark.parametrize('in_memory', [True, False])
def test_a_batch_is_a_pure_function_of_the_step(
  task, in_memory, bucket_multiple
):
  def make(seed=7):
    return data.Batches(
      task,
      LENGTHS,
      8,
      seed=seed,
      window=3,
      bucket_multiple=bucket_multiple,
      in_memory=in_memory,
    )

  first = make()
  expected = [first(step) for step in range(15)]
  other = make()
  for step in (11, 3, 3, 14, 0, 1, 7):
    assert_same(other(step), expected[step])
  changed = make(seed=8)
  assert keys(changed(0)) != keys(expected[0])


@pytest.mark.parametrize('bucket_multiple', [None, 16])
@pytest.mark.parametrize('batch_size', [1, 7, 10, 50, 64, 120])
def test_each_epoch_holds_each_example_exactly_once(
  task, examples, batch_size, bucket_multiple
):
  batches = data.Batches(
    task, LENGTHS, batch_size, bucket_multiple=bucket_multiple, window=2
  )
  steps = -(-200 // batch_size)
  seen = [key for step in range(steps) for key in keys(batches(step))]
  epochs = [seen[i : i + 50] for i in (0, 50, 100, 150)]
  everything = sorted(key(e['encoder_input_tokens']) for e in examples)
  for epoch in epochs:
    assert sorted(epoch) == everything
  for one, other in itertools.combinations(epochs, 2):
    assert one != other


def test_the_order_of_the_rows_is_the_one_that_older_runs_resume_with():
  batches = data.Batches(
    make_task(rows_of_text(10)), LENGTHS, 5, seed=1, bucket_multiple=None
  )
  numbers = [
    int(seqio.ByteVocabulary().decode(row[:3].tolist()))
    for step in range(4)
    for row in batches(step)['encoder_input_tokens']
  ]
  assert numbers == [
    6,
    0,
    7,
    9,
    4,
    1,
    8,
    5,
    2,
    3,
    2,
    7,
    3,
    0,
    9,
    1,
    4,
    6,
    8,
    5,
  ], (
    'The golden order changed: update it only if resumed runs may see rows '
    'twice, and say so in the CHANGELOG.'
  )


def test_bucketing_makes_few_shapes_and_halves_the_padding():
  task = make_task(rows_of_text(640))
  lengths = {'inputs': 256, 'targets': 8}
  fixed = data.Batches(task, lengths, 16, bucket_multiple=None)
  bucketed = data.Batches(task, lengths, 16, bucket_multiple=16)
  assert fixed.shapes == [(256, 8)]
  assert bucketed.shapes == [(n, t) for n in (16, 32, 48, 64) for t in (4, 8)]
  batches = [bucketed(step) for step in range(40)]
  shapes = collections.Counter(
    (b['encoder_input_tokens'].shape[1], b['decoder_target_tokens'].shape[1])
    for b in batches
  )
  assert set(shapes) <= set(bucketed.shapes)
  real = sum(np.count_nonzero(b['encoder_input_tokens']) for b in batches)
  size = sum(b['encoder_input_tokens'].size for b in batches)
  longest = max(b['encoder_input_tokens'].shape[1] for b in batches)
  assert (size - real) < 0.5 * (40 * 16 * longest - real)
  # Long and short batches come in random order, not sorted by length.
  order = [b['encoder_input_tokens'].shape[1] for b in batches]
  assert order != sorted(order) and order != sorted(order, reverse=True)


def test_only_the_batch_across_two_epochs_mixes_lengths():
  # Each length has 26 rows, and batches of 5 begin anywhere in an epoch.
  rows = [
    {'inputs': 'x' * (4 if i % 2 else 40), 'targets': 'y'} for i in range(52)
  ]
  batches = data.Batches(make_task(rows), LENGTHS, 5, bucket_multiple=8)
  mixed = 0
  for step in range(52):  # Five epochs.
    lengths = (batches(step)['encoder_input_tokens'] != 0).sum(axis=1)
    mixed += len(set(lengths.tolist())) > 1
  # At most two batches an epoch mix lengths: the one at the border between the
  # lengths and the one at the border of the epoch.
  assert mixed <= 2 * 5


def test_batches_are_padded_to_the_multiple_and_at_most_the_feature_length():
  rows = [{'inputs': 'x' * n, 'targets': 'y'} for n in (9, 0, 44)]
  batches = data.Batches(make_task(rows), LENGTHS, 1, bucket_multiple=10)
  shapes = {
    len(keys(b)[0]): b['encoder_input_tokens'].shape
    for b in map(batches, range(3))
  }
  assert shapes == {10: (1, 10), 1: (1, 10), 45: (1, 48)}
  assert batches.shapes == [(10, 5), (48, 5)]


def test_a_batch_of_a_classification_holds_labels_of_all_lengths():
  labels = ['no', 'entailment']
  rows = [('x' * 20, labels[i % 2]) for i in range(256)]
  task = files.from_rows(
    {'train': rows}, label_names=labels, vocabulary=Bytes()
  )
  batches = data.Batches(task, {'inputs': 32, 'targets': 16}, 16)
  for step in range(16):
    lengths = np.sum(batches(step)['decoder_loss_weights'], axis=1)
    assert 0.1 < np.mean(lengths > 4) < 0.9, step


def test_short_targets_are_rounded_up_more_finely():
  # Targets of a label, a sentence and a paragraph, each with its EOS.
  rows = [{'inputs': 'x', 'targets': 'y' * n} for n in (2, 9, 33)]
  lengths = {'inputs': 64, 'targets': 64}
  batches = data.Batches(make_task(rows), lengths, 1, bucket_multiple=32)
  shapes = [b['decoder_target_tokens'].shape for b in map(batches, range(3))]
  assert sorted(shapes) == [(1, 4), (1, 16), (1, 64)]
  assert batches.shapes == [(32, 4), (32, 16), (32, 64)]
  mixture = data.Batches(make_mixture(), lengths, 1, bucket_multiple=32)
  assert mixture.shapes == [
    (i, t) for i in (32, 64) for t in (4, 8, 16, 32, 64)
  ]
  odd = data.Batches(make_task(rows), lengths, 1, bucket_multiple=12)
  assert odd.shapes == [(12, 6), (12, 12), (12, 36)]


@pytest.mark.parametrize('bucket_multiple', [None, 16])
def test_a_mixture_resumes_at_any_step(bucket_multiple, caplog):
  mixture = make_mixture()
  make = functools.partial(
    data.Batches,
    mixture,
    LENGTHS,
    4,
    seed=3,
    window=4,
    bucket_multiple=bucket_multiple,
  )
  steady = make()
  assert steady.num_examples is None
  expected = [steady(step) for step in range(20)]
  with caplog.at_level('INFO', logger='absl'):
    resumed = make()
    for step in range(9, 20):
      assert_same(resumed(step), expected[step])
  (skipped,) = [m for m in caplog.messages if 'skipping' in m]
  assert 'skipping 32 rows' in skipped


def test_the_stream_of_a_task_repeats_and_reshuffles_its_rows(task):
  batches = data.Batches(task, LENGTHS, 10, in_memory=False, window=5)
  epochs = [
    [key for step in range(5 * e, 5 * e + 5) for key in keys(batches(step))]
    for e in range(2)
  ]
  assert collections.Counter(itertools.chain(*epochs)).total() == 100
  assert epochs[0] != epochs[1]


def test_random_preprocessors_draw_anew_in_each_epoch_of_a_stream_only():
  @seqio.map_over_dataset(num_seeds=1)
  def draw(example, seed):
    number = tf.random.stateless_uniform([4], seed, 3, 250, tf.int32)
    return {'inputs': number, 'targets': number}

  task = make_task(rows_of_text(6), preprocessors=[draw])
  for in_memory, epochs in ((True, 1), (False, 3)):
    make = functools.partial(
      data.Batches, task, LENGTHS, 6, in_memory=in_memory
    )
    one, other = make(), make()
    for step in range(3):
      assert_same(one(step), other(step))
    assert len({k for step in range(3) for k in keys(one(step))}) == 6 * epochs


def test_a_task_that_does_not_say_its_size_is_kept_if_it_is_small(monkeypatch):
  task = make_task(rows_of_text(30), counted=False)
  assert data.Batches(task, LENGTHS, 4).num_examples == 30
  monkeypatch.setattr(seqio_rows, 'MAX_UNCOUNTED_ROWS', 29)
  assert data.Batches(task, LENGTHS, 4).num_examples is None
  monkeypatch.setattr(seqio_rows, 'MAX_ROWS', 49)
  assert (
    data.Batches(make_task(rows_of_text(49)), LENGTHS, 4).num_examples == 49
  )
  assert (
    data.Batches(make_task(rows_of_text(50)), LENGTHS, 4).num_examples is None
  )


def test_the_same_rows_from_files_and_memory_give_the_same_batches(tmp_path):
  lines = [f'{row["inputs"]}\t{row["targets"]}' for row in rows_of_text(20)]
  path = tmp_path / 'train.tsv'
  path.write_text('\n'.join(lines) + '\n')

  @seqio.map_over_dataset
  def split(line):
    inputs, targets = tf.unstack(tf.strings.split(line, '\t'), 2)
    return {'inputs': inputs, 'targets': targets}

  from_file = seqio.TaskRegistry.add(
    new_name('data_test'),
    source=seqio.TextLineDataSource({'train': str(path)}),
    preprocessors=(split, *TOKENIZE),
    output_features=FEATURES,
  )
  in_memory = make_task(rows_of_text(20))
  for step in range(3):
    assert_same(
      data.Batches(from_file, LENGTHS, 8)(step),
      data.Batches(in_memory, LENGTHS, 8)(step),
    )


@pytest.mark.parametrize(
  'last',
  [
    [seqio.preprocessors.append_eos_after_trim],
    [seqio.preprocessors.append_eos],
    [],
    [functools.partial(seqio.preprocessors.append_eos_after_trim)],
  ],
)
def test_trimmed_rows_are_those_that_longer_lengths_would_change(last):
  preprocessors = [seqio.preprocessors.tokenize, *last]
  task = make_task(rows_of_text(60), preprocessors=preprocessors)
  whole = converted(task, {'inputs': 500, 'targets': 500})
  short = converted(task)
  changed = {name: set() for name in ('inputs', 'targets')}
  for w, s in zip(whole, short, strict=True):
    for feature, name in MODEL_FEATURES.items():
      if key(w[name]) != key(s[name]):
        changed[feature].add(key(s['encoder_input_tokens']))
  batches = data.Batches(task, LENGTHS, 10)
  assert batches.trimmed == {f: len(rows) for f, rows in changed.items()}
  assert all(0 < count < 60 for count in batches.trimmed.values())
  stream = data.Batches(task, LENGTHS, 10, in_memory=False, window=6)
  assert stream.trimmed == {'inputs': 0, 'targets': 0}
  read = [k for step in range(6) for k in keys(stream(step))]
  assert stream.trimmed == {
    f: sum(k in rows for k in read) for f, rows in changed.items()
  }
  # Counting does not change the rows.
  rows = {key(s['encoder_input_tokens']): s for s in short}
  for step in range(6):
    for i, k in enumerate(keys(batches(step))):
      targets = batches(step)['decoder_target_tokens'][i]
      assert key(targets) == key(rows[k]['decoder_target_tokens'])


def test_trimming_in_a_mixture_is_counted_and_logged_once(caplog):
  with caplog.at_level('WARNING', logger='absl'):
    batches = data.Batches(make_mixture(), LENGTHS, 65, window=1)
    for step in range(3):
      batches(step)
  assert 0 < batches.trimmed['inputs'] < 195
  assert len([m for m in caplog.messages if 'were trimmed' in m]) == 1


def test_token_ids_beyond_the_embedding_name_the_vocabulary():
  task = make_task(rows_of_text(10))
  most = ord('y') + 3
  for in_memory in (True, False):
    how = {'in_memory': in_memory, 'window': 1}
    data.Batches(task, LENGTHS, 4, embedding_rows=most + 1, **how)(0)
    with pytest.raises(ValueError, match=rf'token id {most}, .* vocabulary is'):
      data.Batches(task, LENGTHS, 4, embedding_rows=most, **how)(0)


def test_targets_without_tokens_are_refused_or_warned_of(caplog):
  rows = [{'inputs': 'a', 'targets': text} for text in ('', 'b', 'c')]
  steps = (seqio.preprocessors.tokenize,)
  with caplog.at_level('WARNING', logger='absl'):
    data.Batches(make_task(rows, preprocessors=steps), LENGTHS, 2)
  assert '3 rows, 1 have no tokens in their targets' in caplog.text
  assert 'append_eos_after_trim missing?' in caplog.text  # No EOS.
  with pytest.raises(ValueError, match='no row has tokens in its targets'):
    data.Batches(make_task(rows[:1], preprocessors=steps), LENGTHS, 2)


def test_a_task_that_ends_its_targets_is_not_warned_of(caplog):
  with caplog.at_level('WARNING', logger='absl'):
    data.Batches(make_task([{'inputs': 'a', 'targets': 'b'}]), LENGTHS, 2)
  assert 'append_eos' not in caplog.text


@pytest.mark.parametrize('in_memory', [True, False])
def test_rows_without_a_label_are_left_out(in_memory, caplog):
  lengths = {**LENGTHS, 'targets': 12}
  rows = rows_of_text(30)
  for row in rows[::3]:
    row['targets'] = '<unk>'  # As in the tasks of ptune.tasks.
  how = {'seed': 2, 'in_memory': in_memory, 'window': 2}
  with caplog.at_level('WARNING', logger='absl'):
    batches = data.Batches(make_task(rows), lengths, 10, **how)
  found = {
    int(bytes(byte - 3 for byte in key[:3]))
    for step in range(20)
    for key in keys(batches(step))
  }
  assert found == {i for i in range(30) if i % 3}
  if in_memory:
    labelled = [row for i, row in enumerate(rows) if i % 3]
    only = data.Batches(make_task(labelled), lengths, 10, **how)
    assert '10 rows have no label, and are not trained on' in caplog.text
    assert batches.num_examples == 20
    assert_same(batches(3), only(3))
  task = make_task(rows)
  assert '<unk>' not in seqio_task.distinct_targets(task, lengths)


def test_eos_survives_trimming():
  rows = [{'inputs': 'x' * 100, 'targets': 'y' * 100}]
  batch = data.Batches(make_task(rows), LENGTHS, 1)(0)
  assert batch['encoder_input_tokens'].shape == (1, 48)
  assert batch['encoder_input_tokens'][0, -1] == 1
  assert batch['decoder_target_tokens'][0, -1] == 1


def mesh_of(data_axis, model_axis, devices=None):
  devices = np.array(devices or jax.devices()).reshape(data_axis, model_axis)
  auto = (jax.sharding.AxisType.Auto,) * 2
  return jax.sharding.Mesh(devices, ('data', 'model'), axis_types=auto)


@pytest.mark.parametrize('in_memory', [None, False])
def test_a_stream_resumes_from_a_kept_position(in_memory, tmp_path, caplog):
  rows = rows_of_text(70)
  task = make_mixture() if in_memory is None else make_task(rows)
  how = {'window': 2, 'seed': 1, 'in_memory': in_memory}
  reference = data.Batches(task, LENGTHS, 4, **how)
  want = [reference(step) for step in range(50)]
  first = data.Batches(task, LENGTHS, 4, positions=tmp_path, **how)
  for step in range(44):
    assert_same(first(step), want[step])
  assert 4 <= len(list(tmp_path.iterdir())) <= 10
  # After a restart at any step, a few rows are read again, always the same
  # ones.
  again = data.Batches(task, LENGTHS, 4, positions=tmp_path, **how)
  with caplog.at_level('INFO', logger='absl'):
    for step in (43, 44, 49, 36, 7):
      assert_same(again(step), want[step])
  found = [
    [int(x) for x in re.findall(r'(\d+) (?:rows to|are read)', message)]
    for message in caplog.messages
    if 'are read again' in message
  ]
  assert found[0] == [42 * 4, 0]
  assert all(again <= rows / 2 for rows, again in found[:2])
  # A stream with another seed does not use these positions.
  other = data.Batches(
    task, LENGTHS, 4, positions=tmp_path, **{**how, 'seed': 2}
  )
  caplog.clear()
  with caplog.at_level('INFO', logger='absl'):
    other(43)
  assert 'skipping 168 rows to resume, of which 168 are' in caplog.text
  # A stream skips a damaged position.
  for file in tmp_path.glob('*/state.data*'):
    file.write_bytes(b'')
  damaged = data.Batches(task, LENGTHS, 4, positions=tmp_path, **how)
  assert_same(damaged(43), want[43])


def test_positions_are_dense_near_the_end_and_few():
  kept = []
  for newest in range(1, 130):
    kept.append(newest)
    kept = [w for w in kept if w not in positions.too_many(kept, newest)]
    assert len(kept) <= 2 * newest.bit_length()
    for window in range(newest + 1):
      nearest = max((w for w in kept if w <= window), default=0)
      assert window - nearest <= 2 * (newest - window)


@pytest.mark.parametrize('shape', [(8, 1), (4, 2), (1, 8)])
def test_device_put_splits_the_rows_over_the_data_axis(task, shape):
  mesh = mesh_of(*shape)
  batch = data.Batches(task, LENGTHS, 16)(0)
  on_devices = device_put(batch, mesh)
  assert on_devices.keys() == batch.keys()
  for name, array in on_devices.items():
    np.testing.assert_array_equal(np.asarray(array), batch[name])
    rows = 16 // shape[0]
    for shard in array.addressable_shards:
      assert shard.data.shape == (rows, batch[name].shape[1])
      position = np.argwhere(mesh.devices == shard.device)[0][0]
      assert shard.index[0].indices(16) == (
        position * rows,
        (position + 1) * rows,
        1,
      )


def test_batches_do_not_depend_on_the_devices(task):
  batches = data.Batches(task, LENGTHS, 8, seed=2)
  meshes = (mesh_of(8, 1), mesh_of(2, 4), mesh_of(1, 1, jax.devices()[:1]))
  results = [
    {k: np.asarray(v) for k, v in device_put(batches(5), mesh).items()}
    for mesh in meshes
  ]
  assert_same(results[0], results[1])
  assert_same(results[0], results[2])


def test_device_put_names_the_batch_sizes_that_fit():
  batch = {'encoder_input_tokens': np.zeros((10, 3), np.int32)}
  with pytest.raises(ValueError, match=r'is 10, .* the 4 devices.*Use 8 or 12'):
    device_put(batch, mesh_of(4, 2))
  with pytest.raises(ValueError, match=r'the 4 devices.*Use 4'):
    device_put({'x': np.zeros((3, 3), np.int32)}, mesh_of(4, 2))
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('rows',))
  with pytest.raises(ValueError, match=r"axes \('rows',\), expected .*data"):
    device_put(batch, mesh)


def test_prefetch_yields_every_step_in_order(task):
  batches = data.Batches(task, LENGTHS, 8)
  steps = []
  for step, batch in device_feed.prefetch(batches, 3, 9, mesh_of(8, 1)):
    assert_same({k: np.asarray(v) for k, v in batch.items()}, batches(step))
    steps.append(step)
  assert steps == list(range(3, 9))
  assert list(device_feed.prefetch(batches, 4, 4, mesh_of(8, 1))) == []


def test_prefetch_raises_what_the_thread_raised_at_its_step(task):
  batches = data.Batches(task, LENGTHS, 8)

  def broken(step):
    if step == 4:
      raise RuntimeError('no step 4')
    return batches(step)

  steps = device_feed.prefetch(broken, 0, 10, mesh_of(8, 1))
  seen = []
  with pytest.raises(RuntimeError, match='no step 4'):
    for step, _ in steps:
      seen.append(step)
  assert seen == [0, 1, 2, 3]


def test_closing_prefetch_ends_its_thread_and_reads_no_further(task):
  batches = data.Batches(task, LENGTHS, 8)
  asked = []

  def recorded(step):
    asked.append(step)
    return batches(step)

  steps = device_feed.prefetch(recorded, 0, 1000, mesh_of(8, 1), depth=3)
  next(steps)
  steps.close()
  names = [thread.name for thread in threading.enumerate()]
  assert not [name for name in names if name.startswith('ptune-data')]
  assert len(asked) <= 4


@pytest.mark.parametrize('bucket_multiple', [None, 16])
@pytest.mark.parametrize('batch_size', [1, 3, 8, 49, 50, 51, 200])
def test_padded_batches_hold_every_example_exactly_once(
  examples, batch_size, bucket_multiple
):
  seen = []
  for which, batch in padding.padded_batches(
    examples, batch_size, bucket_multiple
  ):
    seen.extend(which.tolist())
    real = len(which)
    length = batch['encoder_input_tokens'].shape[1]
    for name, array in batch.items():
      assert array.shape[0] == batch_size
      assert array.dtype == examples[0][name].dtype
      for row, i in zip(array[:real], which, strict=True):
        cut = length if name == 'encoder_input_tokens' else None
        np.testing.assert_array_equal(row, examples[i][name][:cut])
        assert not examples[i]['encoder_input_tokens'][length:].any()
    assert not batch['decoder_loss_weights'][real:].any()
    assert batch['encoder_input_tokens'][real:].any(axis=1).all()
    longest = np.count_nonzero(batch['encoder_input_tokens'].any(axis=0))
    expected = min(-(-longest // 16) * 16, 48) if bucket_multiple else 48
    assert length == expected
  assert sorted(seen) == list(range(50))
  if not bucket_multiple:
    assert seen == sorted(seen)


def test_padded_batches_of_nothing_are_none():
  assert list(padding.padded_batches([], 4)) == []
  with pytest.raises(ValueError, match='batch size is 0'):
    next(padding.padded_batches([], 0))


def test_eval_batches_keep_the_indices_of_an_enumerated_dataset(task):
  dataset = seqio.get_dataset(
    task, LENGTHS, seqio.EncDecFeatureConverter(pack=False), shuffle=False
  )
  examples = list(dataset.as_numpy_iterator())
  for shift, given in (
    (0, dataset),
    (0, dataset.enumerate()),
    (7, dataset.enumerate(7)),
  ):
    seen = []
    for indices, batch in padding.eval_batches(given, 8, 16):
      for index, row in zip(
        indices, batch['encoder_input_tokens'], strict=False
      ):
        assert key(row) == key(examples[index - shift]['encoder_input_tokens'])
      seen.extend(indices.tolist())
    assert sorted(seen) == list(range(shift, shift + 50))


def test_load_task_imports_the_module_that_registers_it(tmp_path, monkeypatch):
  name = new_name('data_test')
  module = new_name('module')
  (tmp_path / f'{module}.py').write_text(
    'import seqio\n'
    f"seqio.TaskRegistry.add('{name}', source=seqio.TextLineDataSource("
    "{'train': 'none'}), output_features={})\n"
  )
  (tmp_path / f'{module}_broken.py').write_text('import absent_module\n')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(
    ValueError, match=r'registered names.*MIXTURE_OR_TASK_MODULE'
  ):
    seqio_task.load(name)
  assert seqio_task.load(name, module).name == name
  assert seqio_task.load(name, [module, 'ptune.data.batches']).name == name
  with pytest.raises(ValueError, match=f'did you mean .*{name}'):
    seqio_task.load(name[:-1] + '_', module)
  with pytest.raises(
    ValueError, match=r"no module 'module_absent'.*PYTHONPATH"
  ):
    seqio_task.load(name, 'module_absent.tasks')
  # If a module fails to import another, the error names the place.
  with pytest.raises(
    ValueError, match=r"no module 'absent_module' at .*_broken.py, line 1"
  ):
    seqio_task.load(name, f'{module}_broken')


def test_all_that_is_wrong_with_a_task_is_listed_at_once(task):
  with pytest.raises(ValueError) as error:
    data.Batches(task, {'inputs': 0, 'labels': 4}, 8, split='dev')
  for part in (
    task.name,
    "TASK_FEATURE_LENGTHS has no length for 'targets'",
    "TASK_FEATURE_LENGTHS['inputs'] is 0, expected",
    "TASK_FEATURE_LENGTHS['labels']: expected inputs and targets only",
    "no split 'dev'; its splits: train, validation",
  ):
    assert part in str(error.value)


def test_features_that_t5_cannot_read_are_refused():
  text = seqio.ByteVocabulary()
  named = make_task(
    [], features={'inputs': seqio.Feature(text), 'answer': seqio.Feature(text)}
  )
  with pytest.raises(
    ValueError, match=r"no feature 'targets'; .*\(it has: answer, inputs\)"
  ):
    seqio_task.check(named, LENGTHS, 'train')
  scores = seqio.ContinuousFeature(dtype=tf.float32, rank=2)
  typed = make_task(
    [], features={'inputs': seqio.Feature(text), 'targets': scores}
  )
  with pytest.raises(ValueError, match="'targets' is float32 of rank 2"):
    seqio_task.check(typed, LENGTHS, 'train')


@pytest.mark.parametrize('in_memory', [True, False])
def test_an_empty_split_is_refused_before_any_step(in_memory):
  def drop(dataset):
    return dataset.filter(lambda example: False)

  for task in (
    make_task([]),
    make_task(rows_of_text(3), preprocessors=[*TOKENIZE, drop]),
  ):
    with pytest.raises(ValueError, match=':train has no examples'):
      data.Batches(task, LENGTHS, 4, in_memory=in_memory)


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    ({'batch_size': 0}, 'BATCH_SIZE is 0, expected at least 1'),
    ({'seed': -1}, 'RANDOM_SEED is -1, expected at least 0'),
    ({'window': 0}, 'window is 0'),
    ({'bucket_multiple': -8}, 'bucket_multiple is -8'),
  ],
)
def test_settings_out_of_range_are_refused(task, setting, message):
  with pytest.raises(ValueError, match=message):
    data.Batches(task, LENGTHS, **{'batch_size': 8, **setting})


def test_a_mixture_cannot_be_kept_in_memory():
  with pytest.raises(ValueError, match='mixture has no epochs'):
    data.Batches(make_mixture(), LENGTHS, 4, in_memory=True)


def test_a_stream_that_ends_is_an_error():
  tasks = (make_task(rows_of_text(40)), 99), (make_task([]), 1)
  mixture = seqio.MixtureRegistry.add(
    new_name('data_test'), [(task.name, rate) for task, rate in tasks]
  )
  batches = data.Batches(mixture, LENGTHS, 4, window=2)
  with pytest.raises(
    ValueError, match=r'ended after .* may have an empty split'
  ):
    for step in range(300):
      batches(step)


def test_a_task_is_read_from_its_cache(tmp_path, monkeypatch):
  steps = (seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(True))
  task = make_task(rows_of_text(12), preprocessors=(*steps, TOKENIZE[-1]))
  with pytest.raises(ValueError, match='set USE_CACHED_TASKS = True'):
    data.Batches(task, LENGTHS, 4)
  monkeypatch.setattr(seqio.utils, '_GLOBAL_CACHE_DIRECTORIES', [str(tmp_path)])
  with pytest.raises(
    ValueError, match=r'not in the cache.*USE_CACHED_TASKS = False'
  ):
    data.Batches(task, LENGTHS, 4, use_cached=True)
  write_cache(tmp_path / task.name, task)
  plain = make_task(rows_of_text(12))
  cached = data.Batches(task, LENGTHS, 4, use_cached=True)
  assert cached.num_examples == 12
  assert cached.trimmed == data.Batches(plain, LENGTHS, 4).trimmed
  for step in range(3):
    assert_same(cached(step), data.Batches(plain, LENGTHS, 4)(step))


def write_cache(directory: pathlib.Path, task):
  """Writes the same cache as the program seqio_cache_tasks."""
  directory.mkdir()
  dataset = task.source.get_dataset('train', shuffle=False)
  examples = list(task.preprocess_precache(dataset).as_numpy_iterator())
  features = {
    k: {'shape': [None], 'dtype': 'int32'} for k in ('inputs', 'targets')
  }
  info = {'num_shards': 1, 'features': features}
  info['seqio_version'] = seqio.__version__
  path = directory / 'train.tfrecord-00000-of-00001'
  with tf.io.TFRecordWriter(str(path)) as writer:
    for example in examples:
      ids = {k: example[k] for k in features}
      writer.write(seqio.dict_to_tfexample(ids).SerializeToString())
  (directory / 'info.train.json').write_text(json.dumps(info))
  (directory / 'stats.train.json').write_text(
    json.dumps({'examples': len(examples)})
  )
  (directory / 'COMPLETED').touch()


def test_the_vocabulary_must_be_one_and_fit_the_embedding(task):
  assert seqio_task.vocabulary(task) == seqio.ByteVocabulary()
  size = seqio.ByteVocabulary().vocab_size
  seqio_task.check_vocabulary(task, size)
  with pytest.raises(
    ValueError, match=f'vocabulary of {size} ids, .* {size - 1} rows'
  ):
    seqio_task.check_vocabulary(task, size - 1)
  features = {
    **FEATURES,
    'targets': seqio.Feature(seqio.PassThroughVocabulary(9)),
  }
  with pytest.raises(ValueError, match='expected one for both'):
    seqio_task.vocabulary(make_task([], features=features))


def test_a_vocabulary_that_cannot_be_read_is_one_line():
  gone = seqio.SentencePieceVocabulary('/nowhere/vocab.model')
  feature = seqio.Feature(gone, add_eos=True)
  task = make_task([], features={'inputs': feature, 'targets': feature})
  assert seqio_task.vocabulary(task) is gone  # Not read yet.
  for read in (
    lambda: seqio_task.check_vocabulary(task, 100),
    lambda: list(seqio_task.examples(task, LENGTHS, 'train')),
  ):
    with pytest.raises(ValueError, match=r'/nowhere/vocab.*Set VOCABULARY'):
      read()


def test_tensorflow_leaves_the_accelerators_to_jax():
  assert tf.config.get_visible_devices('GPU') == []


def test_data_that_cannot_be_downloaded_are_told_soon(tmp_path, monkeypatch):
  task = seqio.TaskRegistry.add(
    new_name('data_test'),
    source=seqio.TfdsDataSource(
      'glue/sst2:2.0.0', tfds_data_dir=str(tmp_path), splits=['train']
    ),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={
      name: seqio.Feature(seqio.ByteVocabulary()) for name in FEATURES
    },
  )

  def offline(*args, **kwargs):
    raise socket.gaierror('no network')

  monkeypatch.setattr(socket, 'getaddrinfo', offline)
  monkeypatch.setattr(tfds.core.utils.gcs_utils, '_is_gcs_disabled', True)
  monkeypatch.setattr(urllib.request, 'getproxies', dict)
  seqio_registry._is_online.cache_clear()
  begin = time.monotonic()
  with pytest.raises(UserError, match=r'cannot be downloaded: .*tfds_data_dir'):
    seqio_task.check(task, {'inputs': 8, 'targets': 8}, 'train')
  assert time.monotonic() - begin < 20
  seqio_registry._is_online.cache_clear()
