"""SuperGLUE (Wang et al., 2019), with WSC as generation, and DPR beside WSC.

    taskless_super_glue_boolq_v102                        a task
    taskless_super_glue_wsc_and_dev_v102_simple           WSC: train, validation
    super_glue_v102_proportional                          all, by their sizes
    task_index_super_glue_with_dpr_v102_examples_proportional
    super_glue_boolq_v102_1_sentinel                      with a sentinel

WSC asks which noun a marked pronoun stands for. Only rows whose candidate is
right can be trained on (`..._simple_train`); all rows are evaluated
(`..._simple_eval`): Raffel et al., 2020, section 2.4. DPR (Rahman and Ng, 2012)
has data of the same form. AX-b and AX-g have only a test split; use RTE's
prompt for them.

In the reference, `task_index_dpr_v001_simple...` have the metrics of another
task, and `..._dpr_v001_simple_examples` cannot be evaluated. Here all DPR tasks
have the same accuracy metric.
"""

import functools

from ptune.tasks import metrics, postprocessors, preprocessors, registry

VARIANTS = (registry.PLAIN, registry.TASKLESS, registry.TASK_INDEX)

ENTAILMENT = ('entailment', 'not_entailment')
BOOLEAN = ('False', 'True')
# For each data set: its word, its fields in order, its labels, its metrics and
# the number of its task index token.
TABLE = {
  'axb': (
    'rte',
    {'hypothesis': 'sentence2', 'premise': 'sentence1'},
    ENTAILMENT,
    [],
    5,
  ),
  'axg': ('rte', ('hypothesis', 'premise'), ENTAILMENT, [], 5),
  'boolq': ('boolq', ('passage', 'question'), BOOLEAN, [metrics.accuracy], 0),
  'cb': (
    'cb',
    ('hypothesis', 'premise'),
    ('entailment', 'contradiction', 'neutral'),
    [metrics.macro_f1(3), metrics.accuracy],
    1,
  ),
  'copa': (
    'copa',
    ('choice1', 'choice2', 'premise', 'question'),
    ('choice1', 'choice2'),
    [metrics.accuracy],
    2,
  ),
  'multirc': (
    'multirc',
    ('question', 'answer', 'paragraph'),
    BOOLEAN,
    [metrics.multirc_f1, metrics.multirc_exact_match],
    3,
  ),
  'rte': (
    'rte',
    ('hypothesis', 'premise'),
    ENTAILMENT,
    [metrics.accuracy],
    5,
  ),
  'wic': (
    'wic',
    ('sentence1', 'sentence2', 'word'),
    BOOLEAN,
    [metrics.accuracy],
    6,
  ),
}
SPLITS = {'axb': ('test',), 'axg': ('test',)}
RECORD_INDEX = 4
WSC_INDEX = 7

# Rates in mixtures: the number of training rows; RTE counts double.
SIZES = {
  'super_glue_boolq_v102': 9427,
  'super_glue_cb_v102': 250,
  'super_glue_copa_v102': 400,
  'super_glue_multirc_v102': 27243,
  'super_glue_record_v102': 138854,
  'super_glue_rte_v102': 2490,
  'super_glue_wic_v102': 5428,
  'super_glue_wsc_v102_simple_eval': 0,
  'super_glue_wsc_v102_simple_train': 259,
}
TEST_ONLY = {'super_glue_axb_v102': 0, 'super_glue_axg_v102': 0}
DPR = {'dpr_v001_simple': 1322}


def _register_tasks() -> None:
  for data_set, (word, fields, labels, scores, index) in TABLE.items():
    is_multirc = data_set == 'multirc'
    registry.register(
      f'super_glue_{data_set}_v102',
      registry.tfds(f'super_glue/{data_set}:1.0.2', SPLITS.get(data_set)),
      [
        functools.partial(
          preprocessors.classification,
          name=word,
          fields=fields,
          labels=labels,
          html=is_multirc,
        )
      ],
      postprocess=postprocessors.multirc if is_multirc else None,
      metrics=scores,
      labels=labels,
      variants=VARIANTS,
      task_index=index,
      sentinel_name=f'super_glue_{data_set}_v102_1_sentinel',
    )
  registry.register(
    'super_glue_record_v102',
    registry.tfds('super_glue/record:1.0.2'),
    [preprocessors.record],
    postprocess=postprocessors.record,
    metrics=[metrics.record],
    variants=VARIANTS,
    task_index=RECORD_INDEX,
    sentinel_name='super_glue_record_v102_1_sentinel',
  )


def _register_wsc() -> None:
  evaluated = {
    'postprocess': postprocessors.wsc,
    'metrics': [metrics.accuracy, metrics.invalid],
  }
  for part, splits, scores in (
    ('eval', ('validation', 'test'), evaluated),
    ('train', ('train',), {}),
  ):
    text = functools.partial(preprocessors.wsc, only_correct=part == 'train')
    registry.register(
      f'super_glue_wsc_v102_simple_{part}',
      registry.tfds('super_glue/wsc.fixed:1.0.2', splits),
      [text],
      variants=VARIANTS,
      task_index=WSC_INDEX,
      sentinel_name=f'super_glue_wsc_v102_simple_1_sentinel_{part}',
      **scores,
    )
  registry.register(
    'dpr_v001_simple',
    registry.tfds('definite_pronoun_resolution:1.1.0'),
    [preprocessors.definite_pronoun],
    metrics=[metrics.accuracy],
    variants=VARIANTS,
    task_index=WSC_INDEX,
    sentinel_name='dpr_v001_simple_1_sentinel',
  )


def _with_sentinel(task: str) -> str:
  for end in ('_eval', '_train'):
    if task.endswith(end):
      return f'{task.removesuffix(end)}_1_sentinel{end}'
  return f'{task}_1_sentinel'


def _register_mixtures() -> None:
  everything = {**SIZES, **TEST_ONLY, **DPR}
  registry.register_mixture(
    'super_glue_v102_proportional_sentinel',
    {_with_sentinel(task): float(rate) for task, rate in everything.items()},
  )
  wsc = [task for task in SIZES if 'wsc' in task]
  for prefix in registry.PREFIXES.values():
    for name, rates, suffix in (
      ('super_glue_v102_proportional', everything, ''),
      ('super_glue_v102_examples_proportional', SIZES, '_examples'),
      (
        'super_glue_with_dpr_v102_examples_proportional',
        {**SIZES, **DPR},
        '_examples',
      ),
      (
        'wsc_dpr_simple_proportional',
        {**{task: SIZES[task] for task in wsc}, **DPR},
        '',
      ),
      ('super_glue_wsc_and_dev_v102_simple', dict.fromkeys(wsc, 1), ''),
      (
        'super_glue_wsc_and_dev_v102_simple_examples',
        dict.fromkeys(wsc, 1),
        '_examples',
      ),
    ):
      registry.register_mixture(
        f'{prefix}{name}',
        {
          f'{prefix}{task}{suffix}': float(rate) for task, rate in rates.items()
        },
      )


_register_tasks()
_register_wsc()
_register_mixtures()
