"""GLUE (Wang et al., 2018), and transfer between its paraphrase tasks.

    taskless_glue_sst2_v200                      a task
    taskless_glue_mnli_and_dev_v200_examples     MNLI with both validation sets
    taskless_glue_mrpc_from_qqp_zeroshot_v002    trained on QQP, tested on MRPC
    glue_v002_proportional                       all, by their sizes

A name ends with TFDS's version: v002 is 1.0.0, v200 is 2.0.0, which gets QQP
from another source. `spot_glue_...` are aliases for v200, except for MNLI,
where each of the three splits is a task.

In the reference, tasks `..._from_...` without `_examples` cannot be evaluated,
and mixtures `taskless_glue_mnli_and_dev_...` hold the tasks that are not
taskless. Here these tasks and mixtures match their names.
"""

import functools

from ptune.tasks import metrics, postprocessors, preprocessors, registry

VARIANTS = (registry.PLAIN, registry.TASKLESS, registry.TASK_INDEX)
VERSIONS = {'v002': '1.0.0', 'v200': '2.0.0'}

NLI = ('entailment', 'neutral', 'contradiction')
PAIR = ('sentence1', 'sentence2')
# For each data set: its word, its fields in order, its labels, its metrics and
# the number of its task index token.
TABLE = {
  'ax': ('mnli', ('hypothesis', 'premise'), NLI, [], 1),
  'cola': (
    'cola',
    ('sentence',),
    ('unacceptable', 'acceptable'),
    [metrics.matthews],
    0,
  ),
  'mnli': ('mnli', ('hypothesis', 'premise'), NLI, [metrics.accuracy], 1),
  'mnli_matched': (
    'mnli',
    ('hypothesis', 'premise'),
    NLI,
    [metrics.accuracy],
    1,
  ),
  'mnli_mismatched': (
    'mnli',
    ('hypothesis', 'premise'),
    NLI,
    [metrics.accuracy],
    1,
  ),
  'mrpc': (
    'mrpc',
    PAIR,
    ('not_equivalent', 'equivalent'),
    [metrics.f1, metrics.accuracy],
    2,
  ),
  'qnli': (
    'qnli',
    ('question', 'sentence'),
    ('entailment', 'not_entailment'),
    [metrics.accuracy],
    3,
  ),
  'qqp': (
    'qqp',
    ('question1', 'question2'),
    ('not_duplicate', 'duplicate'),
    [metrics.f1, metrics.accuracy],
    4,
  ),
  'rte': (
    'rte',
    PAIR,
    ('entailment', 'not_entailment'),
    [metrics.accuracy],
    5,
  ),
  'sst2': (
    'sst2',
    ('sentence',),
    ('negative', 'positive'),
    [metrics.accuracy],
    6,
  ),
  'wnli': (
    'wnli',
    PAIR,
    ('not_entailment', 'entailment'),
    [metrics.accuracy],
    8,
  ),
}
STS_B_INDEX = 7
SPLITS = {'ax': ('test',)}

# Training rows in TFDS 1.0.0; SuperGLUE's mixtures count RTE double.
SIZES = {
  'ax': 0,
  'cola': 8551,
  'mnli': 392702,
  'mnli_matched': 0,
  'mnli_mismatched': 0,
  'mrpc': 3668,
  'qnli': 104743,
  'qqp': 363849,
  'rte': 2490,
  'sst2': 67349,
  'stsb': 5749,
}

# A task and the task whose prompt it uses: the latter's labels -> the former's.
TRANSFER = {
  ('mrpc', 'qqp'): {
    'duplicate': 'equivalent',
    'not_duplicate': 'not_equivalent',
  },
  ('qqp', 'mrpc'): {
    'equivalent': 'duplicate',
    'not_equivalent': 'not_duplicate',
  },
}


def _text(data_set: str):
  word, fields, labels, _, _ = TABLE[data_set]
  return functools.partial(
    preprocessors.classification, name=word, fields=fields, labels=labels
  )


def _register_tasks() -> None:
  for version, tfds_version in VERSIONS.items():
    for data_set, (_, _, labels, scores, index) in TABLE.items():
      registry.register(
        f'glue_{data_set}_{version}',
        registry.tfds(f'glue/{data_set}:{tfds_version}', SPLITS.get(data_set)),
        [_text(data_set)],
        metrics=scores,
        labels=labels,
        variants=VARIANTS,
        task_index=index,
      )
    registry.register(
      f'glue_stsb_{version}',
      registry.tfds(f'glue/stsb:{tfds_version}'),
      [preprocessors.sts_b],
      postprocess=postprocessors.number,
      metrics=[metrics.pearson, metrics.spearman, metrics.invalid],
      variants=VARIANTS,
      task_index=STS_B_INDEX,
    )


def _register_transfer() -> None:
  version, tfds_version = next(iter(VERSIONS.items()))
  for (target, source), words in TRANSFER.items():
    _, _, labels, scores, index = TABLE[target]
    name = f'glue_{target}_from_{source}'
    registry.register(
      f'{name}_{version}',
      registry.tfds(f'glue/{target}:{tfds_version}', ['validation']),
      [_text(target)],
      metrics=scores,
      labels=labels,
      other_words=words,
      variants=VARIANTS,
      task_index=index,
    )
    for prefix in registry.PREFIXES.values():
      for suffix in ('', '_examples'):
        registry.register_mixture(
          f'{prefix}{name}_zeroshot_{version}{suffix}',
          {
            f'{prefix}glue_{source}_{version}': 1.0,
            f'{prefix}{name}_{version}{suffix}': 1.0,
          },
        )


def _register_mixtures() -> None:
  for prefix in registry.PREFIXES.values():
    for version in VERSIONS:
      for suffix in ('', '_examples'):
        registry.register_mixture(
          f'{prefix}glue_mnli_and_dev_{version}{suffix}',
          {
            f'{prefix}glue_{name}_{version}{suffix}': 1.0
            for name in ('mnli', 'mnli_matched', 'mnli_mismatched')
          },
        )
    registry.register_mixture(
      f'{prefix}glue_v002_proportional',
      {
        f'{prefix}glue_{name}_v002': float(size) for name, size in SIZES.items()
      },
    )


def _register_spot() -> None:
  """The names of SPoT (Vu et al., 2022)."""
  for data_set, (_, _, labels, scores, _) in TABLE.items():
    if data_set != 'ax' and 'mnli' not in data_set:
      registry.register(
        f'spot_glue_{data_set}_v200',
        registry.tfds(f'glue/{data_set}:2.0.0'),
        [_text(data_set)],
        metrics=scores,
        labels=labels,
      )
  registry.register(
    'spot_glue_stsb_v200',
    registry.tfds('glue/stsb:2.0.0'),
    [preprocessors.sts_b],
    postprocess=postprocessors.number,
    metrics=[metrics.pearson, metrics.spearman, metrics.invalid],
  )
  splits = {
    'train': ('train', 'train'),
    'validation_matched': ('validation', 'validation_matched'),
    'validation_mismatched': ('validation', 'validation_mismatched'),
  }
  for name, (split, tfds_split) in splits.items():
    registry.register(
      f'spot_glue_mnli_{name}_v200',
      registry.tfds('glue/mnli:2.0.0', {split: tfds_split}),
      [_text('mnli')],
      metrics=[metrics.accuracy],
      labels=NLI,
    )
  registry.register_mixture(
    'spot_glue_mnli_and_dev_v200',
    {f'spot_glue_mnli_{name}_v200': 1.0 for name in splits},
  )


_register_tasks()
_register_transfer()
_register_mixtures()
_register_spot()
