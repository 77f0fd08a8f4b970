"""Every task of the library, from TFDS's rows to batches, without network.

TFDS makes each data set's builder, so versions and columns are the real ones;
only the rows are made up. One task of each kind is trained on and evaluated.
"""

import collections
import functools
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

os.environ.setdefault('PTUNE_VOCABULARY', 'ptune://tiny')

from ptune import (
  data,
  evaluate,
  network,
  optim,
  parameters,
  partitioning,
  state,
)
from ptune.methods import prompt
from ptune.models import EncoderDecoderModel

import seqio  # isort: skip  (after ptune.data, which quiets TensorFlow)
import tensorflow_datasets as tfds  # isort: skip
import tensorflow as tf  # isort: skip

from ptune.tasks import library, postprocessors, registry  # isort: skip

LENGTHS = {'inputs': 32, 'targets': 8}
ROWS = 8
NAMES = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
assert library


def feature_value(feature, row, path):
  """A made-up value of a column of TFDS."""
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
  """What a mocked builder's as_dataset returns."""
  features = builder.info.features

  def rows():
    for row in range(ROWS):
      values = feature_value(features, row, ())
      if 'span2_text' in values:  # WSC: a pronoun that is in the text.
        values |= {'span2_text': 'it', 'span2_index': 5, 'span1_index': 0}
      if 'pronoun' in values:
        values |= {'pronoun': 'it', 'candidates': ['Ann', 'Bo']}
      yield values

  return tf.data.Dataset.from_generator(
    rows, output_signature=features.get_tensor_spec()
  )


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
  """What takes the place of download_and_prepare."""
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
  """TFDS without files and network; its builders are the real ones."""

  def as_dataset(self, split=None, **how):
    del split, how
    return rows_of(self)

  monkeypatch.setattr(tfds.core.utils.gcs_utils, '_is_gcs_disabled', True)
  with tfds.testing.mock_data(num_examples=ROWS, as_dataset_fn=as_dataset):
    monkeypatch.setattr(
      tfds.core.DatasetBuilder, 'download_and_prepare', prepare
    )
    yield


def test_probe():
  for name in ['taskless_glue_sst2_v200', 'super_glue_wsc_v102_simple_eval','dpr_v001_simple','super_glue_record_v102','taskless_super_glue_multirc_v102_rank','squad_v010', 'c4_v220_prefix_lm','c4_v220_span_corruption','spot_doc_nli_v100', 'glue_stsb_v200']:
    t0 = time.time()
    task = seqio.get_mixture_or_task(name)
    splits = list(task.splits)
    print(name, splits, task.num_input_examples(splits[0]))
    print(next(iter(data.examples(task, LENGTHS, splits[0]))))
    print(time.time() - t0)
  assert 0
