"""Compares the task library with the reference, t5 and prompt-tuning.

The golden files hold the reference's results for hand-written rows: texts,
postprocessed values, scores, and the table of all tasks. "README" in comments
is the one beside them. This file lists all intended differences, with ptune's
results; no other difference is allowed.
"""

import collections
import contextlib
import functools
import json
import math
import pathlib

import numpy as np
import pytest

from ptune.data import batches as data  # isort: skip  (first: it quiets TensorFlow)

import seqio
import tensorflow as tf

from ptune.tasks import (
  library,  # noqa: F401
  metrics,
  postprocessors,
  preprocessors,
  qa,
)

del data
GOLDEN = pathlib.Path(__file__).parents[2] / 'shared' / 'golden' / 'text'


def load(name):
  path = GOLDEN / name
  return json.loads(path.read_text()) if path.is_file() else None


pytestmark = pytest.mark.skipif(
  not GOLDEN.is_dir(), reason=f'the reference values are not at {GOLDEN}'
)


# ------------------------------------------------------------------- table

TABLE = load('task_table.json') or {'tasks': {}, 'mixtures': {}, 'chains': {}}

# These are left out, because no paper on prompts uses them, or because other
# tasks of C4 train on the same data.
LEFT_OUT = (
  'wmt',
  'trivia_qa_v010',
  'wikipedia_',
  'glue_wnli_v002_simple_eval',
  'squad_v010_allanswers_span',
  'c4_v220_full_lm',
  'c4_v220_iid_denoising',
  'c4_v220_bart_',
  'c4_prefix_lm_objective_',
)
# These contain tasks that were left out, or rates that need TFDS's servers.
MIXTURES_LEFT_OUT = (
  'all_',
  'en_mix',
  'large_',
  'leave_one_out_',
  'squad_trivia_qa_equal',
)
# What TFDS 4.9.10 no longer serves, and the replacements.
NEWER_SOURCES = {
  'cnn_dailymail:3.1.0': 'cnn_dailymail:3.4.0',
  'cnn_dailymail:3.2.0': 'cnn_dailymail:3.4.0',
  'multi_news:1.0.0': 'multi_news:2.1.0',
  'c4/en.realnewslike:2.2.0': 'c4/realnewslike:2.2.0',
  'c4/en.webtextlike:2.2.0': 'c4/webtextlike:2.2.0',
}
TASKS = [t for t in TABLE['tasks'] if not t.startswith(LEFT_OUT)]
MIXTURES = [m for m in TABLE['mixtures'] if not m.startswith(MIXTURES_LEFT_OUT)]

METRICS = {
  'accuracy': 'accuracy',
  'f1_score_with_invalid': 'f1',
  'sklearn_metrics_wrapper(metric="matthews_corrcoef")': 'matthews',
  'sklearn_metrics_wrapper(metric="fbeta_score", name="mean_3class_f1", '
  'beta=1, labels=range(3), average="macro")': 'macro_f1',
  'pearson_corrcoef': 'pearson',
  'spearman_corrcoef': 'spearman',
  'multirc_f1_over_all_answers': 'multirc_f1',
  'mean_group_metric(group_key="group", metric_fn=all_match, '
  'return_subgroup_scores=false, value_key="value")': 'multirc_exact_match',
  'deduplicate_metric(group_key="group", metric_fn=squad, '
  'value_key="value")': 'record',
  'squad': 'squad',
  'rouge': 'rouge',
}
# README 2: these have the metrics of the task that is defined before them.
OTHER_METRICS = {
  'task_index_dpr_v001_simple': ['accuracy'],
  'task_index_dpr_v001_simple_examples': ['accuracy'],
  'taskless_dpr_v001_simple_examples': ['accuracy'],
}


def metric_names(task):
  """Returns the names of a task's metrics, without `invalid`."""
  names = [f.__qualname__.split('.')[0] for f in task.metric_fns]
  return [name for name in names if name != 'invalid']


def expected_metrics(name):
  if name in OTHER_METRICS:
    return OTHER_METRICS[name]
  found = []
  for metric in TABLE['tasks'][name]['metrics']:
    if metric.startswith('text_examples'):
      continue  # The prediction files show the texts.
    if metric.startswith('metric_with_examples('):
      metric = metric.removeprefix('metric_with_examples(')[:-1]
    found.append(METRICS[metric])
  return found


@pytest.mark.parametrize('prefix', ['', 'mt5_', 'byt5_'])
def test_every_task_of_the_reference_is_registered(prefix):
  missing = [
    task
    for task in TASKS
    if prefix + task not in seqio.TaskRegistry.names()
    and not (prefix == 'mt5_' and task.startswith('c4_'))
  ]
  assert not missing


@pytest.mark.parametrize('name', TASKS)
def test_source_splits_metrics_and_offset_equal_the_references(name):
  task, entry = seqio.TaskRegistry.get(name), TABLE['tasks'][name]
  loader = task.source.tfds_dataset
  assert loader.name == NEWER_SOURCES.get(entry['tfds'], entry['tfds'])
  assert loader._split_map == entry['splits']
  assert metric_names(task) == expected_metrics(name)
  chain = TABLE['chains'][entry['preprocessors']]
  text = [step for step in chain if 'tokenize' != step]
  assert ('remove_first_text_token' in text) == (
    preprocessors.remove_first_word in task.preprocessors
  )
  expected = [
    int(step.rstrip(')').split('offset=')[1])
    for step in chain
    if 'add_sentinel_to_beginning' in step
  ]
  found = [
    step.keywords['offset']
    for step in task.preprocessors
    if isinstance(step, functools.partial) and 'offset' in step.keywords
  ]
  assert found == expected


# In the reference, mixtures of this name contain the plain tasks.
def with_prefix(name, task):
  for prefix in ('taskless_', 'task_index_'):
    if name.startswith(f'{prefix}glue_mnli_and_dev'):
      return prefix + task
  return task


@pytest.mark.parametrize('name', MIXTURES)
def test_mixtures_and_their_rates_equal_the_references(name):
  mixture = seqio.MixtureRegistry.get(name)
  expected = {
    with_prefix(name, task): rate
    for task, rate in TABLE['mixtures'][name]['rates'].items()
  }
  found = {task.name: mixture.get_rate(task) for task in mixture.tasks}
  plain = {
    k.replace('simple_train_examples', 'simple_train'): v
    for k, v in found.items()
  }
  # Mixtures named `_examples` contain an alias of the same task.
  assert {k.replace('_examples', ''): v for k, v in plain.items()} == {
    k.replace('_examples', ''): v for k, v in expected.items()
  }


# -------------------------------------------------------------------- text


def text_cases():
  for name in ('glue', 'super_glue', 'qa', 'nli', 'summarization'):
    golden = load(f'text_{name}.json') or {'datasets': {}, 'rows': []}
    for row in golden['rows']:
      if row['task'] is None:  # No task uses this function.
        continue
      label = row['raw'].get('label')
      source = row['tfds_name'].split(':')[0]
      source = {'squad/v1.1': 'squad'}.get(source, source)
      if source.startswith('mrqa'):
        source = 'mrqa'
      if isinstance(label, str):
        source += ' (string labels)'
      yield golden['datasets'][source]['dtypes'], row


CASES = list(text_cases())


def dataset_of(raw, dtypes):
  """Returns a data set of one row, with TFDS's types."""

  def spec(dtype):
    if isinstance(dtype, dict):
      return {key: spec(value) for key, value in dtype.items()}
    if isinstance(dtype, list):
      return tf.TensorSpec([None], dtype[0])
    return tf.TensorSpec([], dtype)

  return tf.data.Dataset.from_generator(
    lambda: iter([raw]), output_signature=spec(dtypes)
  )


def is_text(step):
  function = getattr(step, 'func', step)
  return getattr(function, '__module__', '') == preprocessors.__name__


def texts(task, raw, dtypes):
  """Returns a task's texts for a row, before tokenisation."""
  dataset = dataset_of(raw, dtypes)
  for step in task.preprocessors:
    if is_text(step):
      dataset = step(dataset)
  return [plain(example) for example in dataset.as_numpy_iterator()]


def plain(value):
  if isinstance(value, dict):
    return {key: plain(v) for key, v in value.items()}
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, np.ndarray | np.generic):
    return plain(value.tolist())
  return [plain(v) for v in value] if isinstance(value, list) else value


# (data set, the row's text) -> the difference; README 4 to 7.
def unlike_the_reference(row):
  raw, name = row['raw'], row['task']
  text = raw.get('text', raw.get('sentence', ''))
  marked = None
  if 'stsb' in name and raw['label'] < 0:
    return [{**row['expected'][0], 'targets': '<unk>'}]
  if 'dpr' in name:
    marked = {
      'He left early, so Ian missed Al.': '*He* left early, so Ian missed Al.',
      'The dog chased the cat; "it" ran, but it.': (
        'The dog chased the cat; "*it*" ran, but it.'
      ),
      "Zoë's friend met José while he's away? he!": (
        "Zoë's friend met José while *he*'s away? he!"
      ),
    }.get(text)
  elif 'wsc' in name:
    marked = {
      'Grid X was full so they moved the X marker to X east .': (
        'Grid X was full so *they* moved the X marker to X east .'
      ),
      'We packed the jars but dropped them': (
        'We packed the jars but dropped *them*'
      ),
      'He saw Tim .': '*He* saw Tim .',
      'Tim saw him. Good': 'Tim saw *him* . Good',
    }.get(text)
    if marked and row['expected'] is None:
      inputs = marked if row['variant'] == 'taskless' else f'wsc: {marked}'
      return [
        {
          'inputs': inputs,
          'targets': raw['span1_text'],
          'label': raw['label'],
          'idx': raw['idx'],
        }
      ]
  elif 'squad' in name or 'mrqa' in name:
    if not row['expected']:
      return 'unanswered'
    changed = [
      {key: v.strip() if key in ('targets', 'answer') else v for key, v in e}
      for e in map(dict.items, row['expected'])
    ]
    return changed if changed != row['expected'] else None
  if marked is None or not row['expected']:
    return None
  plain_inputs = marked if row['variant'] == 'taskless' else f'wsc: {marked}'
  return [{**e, 'inputs': plain_inputs} for e in row['expected']]


@pytest.mark.parametrize(
  'case', range(len(CASES)), ids=lambda i: f'{CASES[i][1]["task"]}-{i}'
)
def test_text_equals_the_references(case):
  dtypes, row = CASES[case]
  task = seqio.TaskRegistry.get(row['task'])
  expected = unlike_the_reference(row)
  if expected is None and row['expected'] is None:
    with pytest.raises(tf.errors.InvalidArgumentError):
      texts(task, row['raw'], dtypes)
    return
  found = texts(task, row['raw'], dtypes)
  if expected == 'unanswered':
    assert [(e['targets'], e['answers']) for e in found] == [('<unk>', [])]
  else:
    assert found == (row['expected'] if expected is None else expected)


def test_exactly_the_listed_texts_differ():
  """If a listed row no longer differs, the list is wrong."""
  differ = collections.Counter(
    row['task'] for _, row in CASES if unlike_the_reference(row) is not None
  )
  assert differ == {
    'glue_stsb_v002': 1,
    'taskless_glue_stsb_v002': 1,
    'dpr_v001_simple': 3,
    'taskless_dpr_v001_simple': 3,
    'super_glue_wsc_v102_simple_eval': 4,
    'super_glue_wsc_v102_simple_train': 3,
    'taskless_super_glue_wsc_v102_simple_eval': 4,
    'taskless_super_glue_wsc_v102_simple_train': 3,
    'squad_v010_allanswers': 3,
    'squad_v010_context_free': 3,
    'mrqa_bio_asq_v100_examples': 1,
    **dict.fromkeys(
      [f'spot_mrqa_{domain}_v100' for domain in (*qa.IN_DOMAIN, 'squad')], 1
    ),
  }


@pytest.mark.parametrize('block', load('text_blocks.json') or [])
def test_text_blocks_equal_the_references(block):
  text = block['text']
  inputs = tf.data.Dataset.from_tensors({'inputs': text})
  rest = next(iter(preprocessors.remove_first_word(inputs)))['inputs']
  joined = preprocessors.one_blank(preprocessors._words('x', text))
  assert (
    preprocessors.pad_punctuation(text).numpy().decode()
    == (block['pad_punctuation'])
  )
  assert rest.numpy().decode() == block['remove_first_word']
  assert joined.numpy().decode() == block['string_join_with_x']


def test_task_index_offsets_equal_the_references():
  offsets = (load('tokens.json'))['task_index_offsets']
  for family, of in offsets.items():
    for data_set, offset in of.items():
      name = (
        f'task_index_{family}_{data_set}_'
        + {
          'glue': 'v200',
          'super_glue': 'v102',
        }[family]
      )
      if data_set in ('wsc', 'wsc.fixed'):
        name = 'task_index_super_glue_wsc_v102_simple_eval'
      steps = seqio.TaskRegistry.get(name).preprocessors
      found = [
        s.keywords['offset']
        for s in steps
        if isinstance(s, functools.partial) and 'offset' in s.keywords
      ]
      assert found == [offset], name


# ------------------------------------------------------------ postprocessing


def from_json(value):
  if isinstance(value, dict):
    if '__float__' in value:
      return float(value['__float__'])
    return {k: from_json(v) for k, v in value.items()}
  return [from_json(v) for v in value] if isinstance(value, list) else value


def as_evaluator_passes(example):
  """Converts strings to bytes and lists to arrays."""
  if example is None:
    return None
  return {
    k: v.encode()
    if isinstance(v, str)
    else np.array([t.encode() for t in v], object)
    if isinstance(v, list)
    else v
    for k, v in example.items()
  }


def same(found, expected):
  if isinstance(expected, float):
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)
  elif isinstance(found, list | tuple) and isinstance(expected, list):
    assert len(found) == len(expected)
    for pair in zip(found, expected, strict=True):
      same(*pair)
  elif isinstance(found, dict):
    assert found.keys() == expected.keys()
    for key in found:
      same(found[key], expected[key])
  else:
    assert found == expected


POSTPROCESS = [
  (group['task'], case)
  for group in load('postprocess.json') or []
  if group['task']
  for case in group['cases']
]
# README 10: texts that are not a number in ordinary notation.
NO_NUMBERS = ('nan', 'inf', '1_0')


@pytest.mark.parametrize('index', range(len(POSTPROCESS)))
def test_postprocessed_values_equal_the_references(index):
  name, case = POSTPROCESS[index]
  task = seqio.TaskRegistry.get(name)
  found = task.postprocess_fn(
    case['output'],
    example=as_evaluator_passes(case['example']),
    is_target=case['is_target'],
  )
  expected = from_json(case['result'])
  if name.endswith('_examples') and not case['is_target']:
    expected = expected['prediction']  # The prediction file has the texts.
  if 'stsb' in name and case['output'] in NO_NUMBERS:
    expected = -1.0
  same(found, expected)


def test_sentinels_are_removed_as_by_the_reference():
  groups = [g for g in load('postprocess.json') if g['task'] is None]
  for case in groups[0]['cases']:
    assert postprocessors.without_sentinel(case['output']) == case['value']


# ------------------------------------------------------------------- metrics

FUNCTIONS = {
  'accuracy': metrics.accuracy,
  'f1_score_with_invalid': metrics.f1,
  'mean_multiclass_f1(3)': metrics.macro_f1(3),
  'matthews_corrcoef (GLUE CoLA)': metrics.matthews,
  'pearson_corrcoef': metrics.pearson,
  'spearman_corrcoef': metrics.spearman,
  'multirc_f1_over_all_answers': metrics.multirc_f1,
  'mean_group_metric(all_match)': metrics.multirc_exact_match,
  'deduplicate_metric(squad)': metrics.record,
  'squad': metrics.squad,
  'trivia_qa': metrics.trivia_qa,
  'rouge': metrics.rouge,
  'bleu': metrics.bleu,
}
METRIC_CASES = [
  (group['metric'], case)
  for group in load('metrics.json') or []
  for case in group['cases']
]

# (metric, targets, predictions) -> the difference.
UNLIKE = {
  # README 9: unlabelled rows do not count, and an invalid prediction is wrong
  # but not a third class.
  ('accuracy', (-1, 1, 0), (-1, 0, 0)): 50.0,
  ('accuracy', ('entailment', 'neutral', '<unk>')): 50.0,
  ('f1_score_with_invalid', (1, -1, 0), (1, -1, 0)): 100.0,
  ('matthews_corrcoef (GLUE CoLA)', (1, 1, 0, 0), (1, 1, -1, 0)): (
    100 / math.sqrt(3)
  ),
  (
    'matthews_corrcoef (GLUE CoLA)',
    (0, 1, 1, 0, 1, 0, 0),
    (0, -1, 1, 0, 1, 1, 0),
  ): 100 * 5 / 12,
  ('matthews_corrcoef (GLUE CoLA)', (1, 0), (2, -1)): -100.0,
  # An undefined score is 0, as for Matthews' coefficient.
  ('pearson_corrcoef', (0.0, 2.5, 5.0, 2.5)): 0.0,
  ('spearman_corrcoef', (0.0, 2.5, 5.0, 2.5)): 0.0,
  ('pearson_corrcoef', (3.4,)): 0.0,
  ('spearman_corrcoef', (3.4,)): 0.0,
}


def unlike(metric, case):
  if not all(isinstance(t, int | float | str) for t in case['targets']):
    return None
  key = metric, tuple(case['targets']), tuple(case['predictions'])
  return UNLIKE.get(key, UNLIKE.get(key[:2]))


@pytest.mark.parametrize('index', range(len(METRIC_CASES)))
def test_scores_equal_the_references(index):
  name, case = METRIC_CASES[index]
  targets, predictions = case['targets'], case['predictions']
  if name == 'deduplicate_metric(squad)':
    targets = [{**t, 'group': tuple(t['group'])} for t in targets]
  if name == 'rouge':
    pytest.importorskip('rouge_score')
  found = FUNCTIONS[name](targets, predictions)
  expected = from_json(case.get('mean') or case['result'])
  other = unlike(name, case)
  if other is not None:
    assert list(found.values()) == [pytest.approx(other)]
  elif expected is None:
    assert name in ('squad', 'trivia_qa', 'deduplicate_metric(squad)')
    assert found == {}  # README 8: rows without answers do not count.
  elif targets == [['the'], ['...'], ['x']]:
    # README 8: two answers without words are equal, also in F1.
    assert found == {key: pytest.approx(expected['em']) for key in expected}
  else:
    same(found, expected)


@pytest.mark.parametrize(
  'group', load('task_scores.json') or [], ids=lambda g: g['task']
)
def test_whole_tasks_score_as_the_references(group):
  if 'rouge1' in group['metrics']:
    pytest.importorskip('rouge_score')
  names = [group['task'], *group.get('same_scores_tasks', ())]
  names += list(group.get('reference_fails_for', ()))
  for name in names:
    task = seqio.TaskRegistry.get(name)
    targets, predictions = [], []
    for row in group['rows']:
      example = as_evaluator_passes(row['example'])
      target = row['example']['targets_pretokenized']
      post = task.postprocess_fn
      targets.append(post(target, example=example, is_target=True))
      predictions.append(
        post(row['prediction'], example=example, is_target=False)
      )
    scores = {}
    for metric in task.metric_fns:
      scores |= metric(targets, predictions)
    scores.pop('invalid', None)
    expected_targets, expected_predictions, expected = (
      from_json(group[k]) for k in ('targets', 'predictions', 'metrics')
    )
    with contextlib.suppress(TypeError, KeyError):
      expected_predictions = [p['prediction'] for p in expected_predictions]
    if group['task'] == 'spot_snli_v110':
      # Here labels are numbers, so that other values are recognised.
      assert targets == [0, 2, 1, -1]
      assert predictions == [0, -1, 1, -1]
    else:
      same(targets, expected_targets)
      same(predictions, expected_predictions)
    # README 9: rows without a label do not count. ROUGE is the mean instead of
    # a bootstrap's median.
    if group['task'] == 'glue_cola_v002':
      expected = {'matthews_corrcoef': 0.0}
    elif group['task'] == 'spot_snli_v110':
      expected = {'accuracy': 200 / 3}
    elif group['task'] == 'super_glue_wsc_v102_simple_eval':
      expected = {'accuracy': 700 / 9}
    elif group['task'] == 'glue_stsb_v002':
      labelled = slice(0, 5)
      expected = metrics.pearson(targets[labelled], predictions[labelled])
      expected |= metrics.spearman(targets[labelled], predictions[labelled])
    elif 'rouge1' in expected:
      expected = metrics.rouge(expected_targets, expected_predictions)
    same(scores, expected)
