"""Every task of the library, from TFDS's rows to batches, without network.

TFDS makes each data set's builder, so versions and columns are the real ones.
Only the rows are invented. One task of each kind is trained and evaluated.
"""

import collections
import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptune.data import batches as data
from ptune.data import seqio_task
from ptune.data.device_feed import device_put
from ptune.methods import prompt
from ptune.model import parameters, partitioning
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import T5Config
from ptune.serving.evaluation import Evaluation
from ptune.training import optim, state

import seqio  # isort: skip  (after seqio_task, which quiets TensorFlow)
import tensorflow_datasets as tfds  # isort: skip
import tensorflow as tf  # isort: skip

from ptune.tasks import library, registry  # isort: skip

LENGTHS = {'inputs': 32, 'targets': 16}
ROWS = 8
NAMES = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
assert library


def feature_value(feature, row, path):
  """Returns an invented value for a column of TFDS."""
  if isinstance(feature, tfds.features.FeaturesDict):
    return {
      key: feature_value(f, row, (*path, key)) for key, f in feature.items()
    }
  if isinstance(feature, tfds.features.Sequence):
    one = feature_value(feature.feature, row, path)
    if isinstance(one, dict):
      return {key: [value, value] for key, value in one.items()}
    return [one, one]
  if isinstance(feature, tfds.features.ClassLabel):
    return row % feature.num_classes
  dtype = np.dtype(feature.np_dtype)
  if dtype == np.dtype(object):
    return f'The {path[-1]} of row {row}, if it is one.'
  return dtype.type(row % 5)


def rows_of(builder, **_):
  """Replaces a builder's as_dataset."""
  features = builder.info.features
  # Leaves out MRQA's nested lists, which no task reads.
  specs = {
    column: spec
    for column, spec in features.get_tensor_spec().items()
    if not any(
      isinstance(s, tf.RaggedTensorSpec) for s in tf.nest.flatten(spec)
    )
  }

  def rows():
    for row in range(ROWS):
      values = feature_value(features, row, ())
      if 'span2_text' in values:  # WSC: a pronoun in the text.
        values |= {'span2_text': 'it', 'span2_index': 5, 'span1_index': 0}
      if 'pronoun' in values:
        values |= {'pronoun': 'it', 'candidates': ['Ann', 'Bo']}
      yield {column: values[column] for column in specs}

  return tf.data.Dataset.from_generator(rows, output_signature=specs)


SPLITS = collections.defaultdict(
  lambda: ('train', 'validation', 'test'),
  {
    'glue/ax': ('test',),
    'glue/mnli': ('train', 'validation_matched', 'validation_mismatched'),
    'glue/mnli_matched': ('validation', 'test'),
    'glue/mnli_mismatched': ('validation', 'test'),
    'definite_pronoun_resolution': ('train', 'test'),
  },
)


def prepare(builder, **_):
  """Replaces download_and_prepare."""
  name = builder.info.full_name.rsplit('/', 1)[0]
  builder.info.set_splits(
    tfds.core.splits.SplitDict(
      [
        tfds.core.SplitInfo(name=split, shard_lengths=[ROWS], num_bytes=0)
        for split in SPLITS[name]
      ]
    )
  )


@pytest.fixture(autouse=True)
def mocked(monkeypatch):
  """TFDS without files and network, but with its real builders."""

  def as_dataset(self, split=None, **how):
    del split, how
    return rows_of(self)

  monkeypatch.setattr(tfds.core.utils.gcs_utils, '_is_gcs_disabled', True)
  with tfds.testing.mock_data(num_examples=ROWS, as_dataset_fn=as_dataset):
    monkeypatch.setattr(
      tfds.core.DatasetBuilder, 'download_and_prepare', prepare
    )
    yield


# ---------------------------------------------------------------- every task


def is_task(name):
  return name in seqio.TaskRegistry.names()


def model_of(name):
  """Returns the task of which this one is an alias, version or vocabulary."""
  for vocab in ('mt5_', 'byt5_'):
    name = name.removeprefix(vocab)
  name = name.removesuffix('_examples')
  newer = name.replace('_v002', '_v200')
  return newer if newer in NAMES else name


OURS = [
  n
  for n in NAMES
  if is_task(n) and not n.startswith(('generated_', 'tiny', 'from_files'))
]
MODELS = sorted({model_of(name) for name in OURS})


def described(step):
  """Describes a step in words; equal steps have equal descriptions."""
  if isinstance(step, functools.partial):
    keywords = sorted((k, described(v)) for k, v in step.keywords.items())
    return f'{described(step.func)}{keywords}'
  if isinstance(step, seqio.CacheDatasetPlaceholder):
    return 'cache'
  return getattr(step, '__qualname__', repr(step))


def parts(task):
  return (
    [described(step) for step in task.preprocessors],
    described(task._postprocess_fn),
    [described(metric) for metric in task.metric_fns],
  )


@pytest.mark.parametrize('name', MODELS)
def test_every_task_reads_rows_and_trains(name):
  task = seqio.TaskRegistry.get(name)
  split = 'train' if 'train' in task.splits else next(iter(task.splits))
  batches = data.Batches(task, LENGTHS, 8, split=split, bucket_multiple=None)
  batch = batches(0)
  assert batch['encoder_input_tokens'].shape == (8, LENGTHS['inputs'])
  assert (batch['decoder_loss_weights'].sum(1) > 0).all()
  assert (batch['encoder_input_tokens'][:, 0] > 1).all()
  plan, _, first, frozen, update = trained_step()
  state = jax.tree.map(jnp.copy, first)  # An update donates its state.
  with plan.scope():
    after, sums = update(state, frozen, device_put(batch, plan.mesh))
  assert np.isfinite(sums['loss']) and sums['loss'] > 0
  assert int(after.step) == 1


def test_all_other_names_are_the_same_with_another_source_or_vocabulary():
  assert len(OURS) > 1000
  for name in OURS:
    task, model = map(seqio.TaskRegistry.get, (name, model_of(name)))
    assert parts(task) == parts(model), name
    # `seqio_task.vocabulary` would read the file, and mT5's is on gs://.
    (vocabulary,) = {
      id(f.vocabulary): f.vocabulary for f in task.output_features.values()
    }.values()
    if name.startswith('byt5_'):
      assert isinstance(vocabulary, seqio.ByteVocabulary)
    elif name.startswith('mt5_'):
      path = vocabulary.sentencepiece_model_file
      assert path == registry.MT5_VOCABULARY
    else:
      assert vocabulary is registry.vocabulary('')


def test_tfds_has_every_data_set_in_the_version_of_its_tasks():
  sources = {
    task.source.tfds_dataset.name: task.source.tfds_dataset
    for task in map(seqio.TaskRegistry.get, OURS)
  }
  assert len(sources) > 60
  for name, loader in sources.items():
    tfds_name, version = name.split(':')
    assert loader.info.full_name == f'{tfds_name}/{version}'


def test_every_mixture_has_its_tasks_in_its_own_variant_and_vocabulary():
  mixtures = [n for n in NAMES if n in seqio.MixtureRegistry.names()]
  for name in mixtures:
    if name.startswith(('generated_', 'tiny')):
      continue
    mixture = seqio.MixtureRegistry.get(name)
    for prefix in ('mt5_', 'byt5_'):
      inside = [t.name.startswith(prefix) for t in mixture.tasks]
      assert set(inside) == {name.startswith(prefix)}
    for variant in ('taskless_', 'task_index_'):
      inside = [variant in task.name for task in mixture.tasks]
      assert set(inside) == {variant in name}


# ------------------------------------------------------------- text and tokens


def tokens(name, split='train'):
  task = seqio.get_mixture_or_task(name)
  rows = task.get_dataset(LENGTHS, split, shuffle=False)
  return next(rows.as_numpy_iterator())


def test_the_task_index_stands_before_text_that_is_trimmed_behind_it():
  last = registry.vocabulary('').vocab_size - 1
  got = tokens('task_index_super_glue_boolq_v102')['inputs']
  plain = tokens('taskless_super_glue_boolq_v102')['inputs']
  assert len(got) == LENGTHS['inputs']  # It was longer.
  assert got[0] == last
  np.testing.assert_array_equal(got[1:-1], plain[: len(got) - 2])
  assert got[-1] == 1
  assert tokens('task_index_glue_sst2_v200')['inputs'][0] == last - 6


def test_a_sentinel_ends_inputs_and_begins_targets_after_trimming():
  first = registry.vocabulary('').vocab_size - 1
  got = tokens('super_glue_multirc_v102_1_sentinel')
  assert len(got['inputs']) == LENGTHS['inputs']  # It was longer.
  assert got['inputs'][-2:].tolist() == [first, 1]
  assert got['targets'][0] == first
  task = seqio.TaskRegistry.get('super_glue_boolq_v102_1_sentinel')
  assert task.postprocess_fn('<extra_id_0> True', is_target=False) == 1
  assert task.postprocess_fn('True', is_target=True) == 1


def test_byt5_tasks_have_bytes():
  got = tokens('byt5_taskless_glue_sst2_v200')
  text = bytes((got['targets'][:-1] - 3).tolist()).decode()
  assert 'negative'.startswith(text)


# ------------------------------------------------------------------- training

CONFIG = T5Config(
  vocab_size=3000,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=16,
  num_encoder_layers=1,
  num_decoder_layers=1,
)


@functools.cache
def trained_step():
  """Returns a plan, a first state, frozen parameters and the compiled step."""
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(CONFIG, prompt.prompt(4), mesh)
  tx = optim.adafactor(0, 0.3)
  abstract = state.abstract_state(tx, plan)
  values = parameters.initialize(plan, plan.base, seed=0)
  start = {
    path: np.zeros(leaf.shape, leaf.dtype)
    for path, leaf in plan.select(plan.trainable).items()
  }
  first = state.first_state(tx, parameters.unflatten(start), abstract)
  model = EncoderDecoderModel(plan.network)
  update = state.compile_step(model, tx, plan, abstract)
  frozen = parameters.unflatten({p: values[p] for p in plan.frozen})
  return plan, model, first, frozen, update


KINDS = {
  'taskless_glue_sst2_v200': {'accuracy', 'invalid'},
  'taskless_glue_sst2_v200_rank': {'accuracy'},
  'taskless_glue_stsb_v200': {
    'pearson_corrcoef',
    'spearman_corrcoef',
    'invalid',
  },
  'taskless_super_glue_multirc_v102': {'f1', 'exact_match', 'invalid'},
  'taskless_super_glue_multirc_v102_rank': {'f1', 'exact_match'},
  'taskless_super_glue_record_v102': {'em', 'f1'},
  'task_index_super_glue_cb_v102': {'mean_3class_f1', 'accuracy', 'invalid'},
  'squad_v010_allanswers': {'em', 'f1'},
  'c4_v220_prefix_lm': set(),
  'taskless_super_glue_wsc_v102_simple_eval': {'accuracy', 'invalid'},
}
if importlib.util.find_spec('rouge_score'):
  KINDS['xsum_v110_examples'] = {'rouge1', 'rouge2', 'rougeLsum'}


def test_a_mixture_trains():
  plan, _, first, frozen, update = trained_step()
  task = seqio_task.load('squad_to_bio_asq_examples')
  batches = data.Batches(task, LENGTHS, 8, bucket_multiple=None)
  now = jax.tree.map(jnp.copy, first)
  for step in range(2):
    with plan.scope():
      now, sums = update(now, frozen, device_put(batches(step), plan.mesh))
    assert np.isfinite(sums['loss'])
  assert int(now.step) == 2


@pytest.mark.slow
@pytest.mark.parametrize('names', [KINDS, MODELS])
def test_tasks_are_evaluated_and_their_predictions_written(names, tmp_path):
  plan, model, *_ = trained_step()
  values = parameters.initialize(plan, plan.base, seed=0)
  values |= {
    path: np.zeros(leaf.shape, leaf.dtype)
    for path, leaf in plan.select(plan.trainable).items()
  }
  names = [
    name
    for name in names
    if 'validation' in seqio.TaskRegistry.get(name).splits
    and (seqio.TaskRegistry.get(name).metric_fns or name in KINDS)
  ]
  assert len(names) >= len(KINDS)
  # A mixture, so that one program predicts for all tasks.
  seqio.MixtureRegistry.add('all_of_them', names, default_rate=1.0)
  evaluation = Evaluation(
    seqio_task.load('all_of_them'),
    plan,
    model,
    split='validation',
    feature_lengths=LENGTHS,
    batch_size=8,
    bucket_multiple=None,
    directory=tmp_path,
  )
  scores = evaluation((parameters.unflatten(values),), 1)
  seqio.MixtureRegistry.remove('all_of_them')
  assert scores.keys() == {*names}
  assert all(len(scores[name]) > 2 for name in names if name not in KINDS)
  for name in names:
    expected = KINDS.get(name, set())
    # Besides a task's own metrics, every task has the evaluation's.
    assert expected <= scores[name].keys(), name
    assert all(0 <= abs(scores[name][k]) <= 100 for k in expected), name
    if not expected:
      continue
    if 'wsc' not in name:  # Any word may be right.
      assert scores[name].get('invalid', 100.0) == 100.0
    file = tmp_path / name / 'predictions-1.jsonl'
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert {'inputs', 'targets', 'target'} <= records[0].keys()


# -------------------------------------------------------------------- commands


def test_the_library_is_found_and_imports_in_15_cpu_seconds_without_a_file():
  code = """
import time
from ptune.data import seqio_task
import seqio
before = len(seqio.TaskRegistry.names())
print(seqio_task.load('taskless_glue_sst2_v200').name)
print(time.process_time(), before, len(seqio.TaskRegistry.names()))
try:
  seqio_task.load('taskless_glue_sst3_v200')
except ValueError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', code],
    env={**os.environ, 'PTUNE_VOCABULARY': '/nowhere/vocab.model'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  first, second, third = done.stdout.splitlines()
  assert first == 'taskless_glue_sst2_v200'
  seconds, before, count = second.split()
  assert float(seconds) < 15  # With JAX, TensorFlow and SeqIO.
  assert int(before) == 0
  assert int(count) > 1000
  assert 'taskless_glue_sst2_v200' in third  # The nearest name.


def test_names_that_others_registered_stay_theirs():
  before = seqio.TaskRegistry.get('glue_cola_v002')
  registry.add_task('glue_cola_v002', registry.tfds('mine:1.0.0'), [])
  assert seqio.TaskRegistry.get('glue_cola_v002') is before


def test_ptune_tasks_lists_names_with_source_features_and_metrics(capsys):
  from ptune.tools import list_tasks

  assert list_tasks.main(['taskless_glue_[cs]*_v200', 'squad_to_drop_ex']) == 0
  lines = capsys.readouterr().out.splitlines()
  cola = next(line for line in lines if 'cola_v200 ' in line)
  assert cola.split(maxsplit=1)[1].split('  ')[0] == 'glue/cola:2.0.0'
  assert 'inputs, targets: pretrained/vocab.model' in cola
  assert cola.endswith('matthews, invalid')
  assert any(
    'mixture of 2' in line and 'mrqa_drop_v100_examples 1' in line
    for line in lines
  )
  assert list_tasks.main(['nosuchtask']) == 2
  assert 'nosuchtask' in capsys.readouterr().err


def test_ptune_tasks_show_prints_text_and_ids(capsys):
  from ptune.tools import list_tasks

  arguments = ['show', 'taskless_glue_sst2_v200', '--split=validation']
  assert list_tasks.main([*arguments, '--examples=2', '--inputs=16']) == 0
  out = capsys.readouterr().out
  assert "'sentence: The sentence of row 0, if it is one.'" in out
  assert '16 ids' in out
  assert out.count("'negative'") == 1
  assert out.count("'positive'") == 1
  assert list_tasks.main(['show', 'taskless_glue_sst2_v200', '--split=x']) == 2
  assert "no split 'x'" in capsys.readouterr().err


# --------------------------------------------------------------------- caching


def write_cache(directory, task, split):
  """Writes the output of seqio_cache_tasks, which would need Apache Beam."""
  directory.mkdir()
  dataset = task.source.get_dataset(split, shuffle=False)
  dataset = task.preprocess_precache(dataset)
  features = {
    name: {'shape': spec.shape.as_list(), 'dtype': spec.dtype.name}
    for name, spec in dataset.element_spec.items()
  }
  rows = list(dataset.as_numpy_iterator())
  path = directory / f'{split}.tfrecord-00000-of-00001'
  with tf.io.TFRecordWriter(str(path)) as writer:
    for row in rows:
      writer.write(seqio.dict_to_tfexample(row).SerializeToString())
  for name, content in (
    (
      f'info.{split}.json',
      {
        'num_shards': 1,
        'features': features,
        'seqio_version': seqio.__version__,
      },
    ),
    (f'stats.{split}.json', {'examples': len(rows)}),
  ):
    (directory / name).write_text(json.dumps(content))
  (directory / 'COMPLETED').touch()


@pytest.mark.parametrize(
  'name',
  [
    'taskless_super_glue_record_v102',
    'taskless_glue_sst2_v200_rank',
    'task_index_super_glue_multirc_v102',
    'squad_v010_allanswers',
  ],
)
def test_a_cached_task_gives_the_same_examples(name, tmp_path, monkeypatch):
  task = seqio.TaskRegistry.get(name)
  directories = [str(tmp_path)]
  monkeypatch.setattr(seqio.utils, '_GLOBAL_CACHE_DIRECTORIES', directories)
  monkeypatch.setattr(task, '_cache_dir', None)
  write_cache(tmp_path / name, task, 'validation')

  def rows(use_cached):
    dataset = task.get_dataset(
      LENGTHS, 'validation', shuffle=False, use_cached=use_cached
    )
    return list(dataset.as_numpy_iterator())

  cached, plain = rows(True), rows(False)
  assert len(cached) == len(plain) >= ROWS
  for a, b in zip(cached, plain, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)
  metrics = {key for key in plain[0] if key not in ('inputs', 'targets')}
  assert metrics  # Includes postprocessors' fields.


def test_seqio_cache_tasks_caches_a_task(tmp_path):
  pytest.importorskip('apache_beam')  # An extra of SeqIO.
  rows = tmp_path / 'train.tsv'
  rows.write_text('text\tlabel\n' + 'a good film\t1\na bad film\t0\n' * 4)
  (tmp_path / 'mine.py').write_text(
    'from ptune.tasks import files, seqio_texts\n'
    f'rows = {{"train": {str(rows)!r}}}\n'
    'labels = ["no", "yes"]\n'
    'mine = files.from_files(rows, "{text}", "{label}", labels, name="mine")\n'
    'seqio_texts.register(mine)\n'
  )
  done = subprocess.run(
    [
      *(sys.executable, '-W', 'ignore', '-m', 'seqio.scripts.cache_tasks_main'),
      *('--tasks=mine', '--module_import=mine'),
      f'--output_cache_dir={tmp_path / "cache"}',
    ],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  stats = json.loads((tmp_path / 'cache/mine/stats.train.json').read_text())
  assert stats['examples'] == 8
