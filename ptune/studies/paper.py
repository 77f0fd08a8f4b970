"""Studies that make the figures and tables of Lester et al. 2021.

The paper is arXiv 2104.08691. Each function makes one study for a `Setting`:
`miniature` uses ptune's own models and generated text and takes minutes;
`paper` uses the published checkpoints and data sets. `study.study` runs them.

    model_size       figure 1   prompt and model tuning, by the model's size
    prompt_length    figure 3a  how many tokens
    prompt_init      figure 3b  where the prompt starts
    pretraining      figure 3c  the pre-training objective
    adaptation       figure 3d  how long it was adapted
    domain_shift     table 1    scores on other domains than that trained on
    paraphrase       table 2    the same from one paraphrase task to another
    ensembling       table 3    several prompts, and their vote
    sweep            (none)     lengths and learning rates of your own task
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ptune.errors import UserError
from ptune.methods import full, prompt
from ptune.methods import prompt_init as inits
from ptune.model import sizes
from ptune.studies.study import Base, Cell, Study, Tuning
from ptune.tasks.texts import TextTask
from ptune.training import optim


@dataclasses.dataclass(frozen=True)
class Setting:
  """The models and data that studies use.

  Attributes:
    bases: Models of several sizes by name, the smallest first.
    usual: The model for studies of one size.
    tasks: The tasks to tune on; scores are means over them.
    task_feature_lengths: The lengths of inputs and targets, in tokens.
    prompt: How to train prompts.
    model: How to train whole models.
    prompt_length: The length of a prompt in tokens.
    init: The initialisation of prompts.
    objectives: Models that differ in their pre-training, by its name.
    adapted: Adapted models, by the number of adaptation steps.
    domains: A task to train on, and others to evaluate on.
    paraphrases: Two tasks.
    module: The module that registers the tasks.
    batch_size: Examples in a step.
    models: The names of the `bases` that `model_size` compares; None for all.
    test: The split whose scores the study of methods reports.
  """

  bases: Mapping[str, Base]
  usual: str
  tasks: tuple[str | TextTask, ...]
  task_feature_lengths: Mapping[str, int]
  prompt: Tuning
  model: Tuning
  prompt_length: int
  init: Any
  objectives: Mapping[str, Base]
  adapted: Mapping[str, Base]
  domains: tuple[str, tuple[str, ...]]
  paraphrases: tuple[str, str]
  module: str | None = None
  batch_size: int = 32
  models: tuple[str, ...] | None = None
  test: str = 'validation'

  def study(self, name: str, title: str, cells, **others: Any) -> Study:
    """A study in this setting."""
    return Study(
      name=name,
      title=title,
      bases={**self.bases, **self.objectives, **self.adapted},
      cells=tuple(cells),
      task_feature_lengths=self.task_feature_lengths,
      module=self.module,
      batch_size=self.batch_size,
      **others,
    )

  def prompts(
    self, row: str, column: str, base: str, **given: Any
  ) -> list[Cell]:
    """Prompt tuning on every task.

    Args:
      row, column: The place of its mean score in the table.
      base: The model.
      **given: `length`, `init` or `learning_rate`, if not the usual one.
    """
    length = given.get('length', self.prompt_length)
    tuning = self.prompt
    if 'learning_rate' in given:
      tuning = dataclasses.replace(tuning, learning_rate=given['learning_rate'])
    method = prompt.prompt(length, given.get('init', self.init))
    training = f'prompt {row} {column}' if given else 'prompt'
    return self._cells(row, column, base, training, method, tuning)

  def whole(self, row: str, column: str, base: str) -> list[Cell]:
    """Model tuning on every task."""
    return self._cells(row, column, base, 'model', full.full(), self.model)

  def _cells(self, row, column, base, training, method, tuning) -> list[Cell]:
    return [
      Cell(row, column, base, training, task, method, tuning)
      for task in self.tasks
    ]


def miniature() -> Setting:
  """ptune's own models, each pre-trained with one seed, and generated text.

  ptune pre-trains all but `tiny` when a study first needs them. CPU minutes:
  nano 10, mini 22, midi 50, and any further tiny 15.
  """

  def made(name, *settings):
    return Base(name, make=(f'--model={name.split("-")[0]}', *settings))

  def bound(binding):
    return ('--gin_bindings', binding)

  spans = made('tiny-spans', *bound("MIXTURE_OR_TASK_NAME='generated_spans'"))
  tiny = Base('ptune://tiny')
  labels = inits.from_class_labels(fill=inits.from_sampled_vocab(2000))
  return Setting(
    bases={
      'nano': made('nano'),
      'tiny': tiny,
      'mini': made('mini'),
      'midi': made('midi'),
    },
    usual='tiny',
    tasks=('generated_sentiment',),
    task_feature_lengths={'inputs': 64, 'targets': 8},
    prompt=Tuning(300, 0.3, 'linear'),
    model=Tuning(300, 0.003, 'linear', optim.relative_adam),
    prompt_length=20,
    init=labels,
    objectives={
      'span corruption': spans,
      '+ prefix LM': made(
        'tiny-text', *bound("MIXTURE_OR_TASK_NAME='generated_text_only'")
      ),
      '+ prefix tasks': tiny,
    },
    adapted={
      '0': spans,
      **{
        str(steps): made(
          f'tiny-adapted{steps}',
          f'--steps={steps}',
          *bound("INITIAL_CHECKPOINT_PATH='{models}/tiny-spans.run'"),
        )
        for steps in (300, 1000, 3000)
      },
    },
    domains=(
      'generated_sentiment_of_things',
      (
        'generated_sentiment_of_things',
        'generated_sentiment_of_others',
        'generated_sentiment_of_reports',
      ),
    ),
    paraphrases=('generated_paraphrase', 'generated_paraphrase_of_reports'),
    module='ptune.tasks.generated',
    test='test',
  )


def paper() -> Setting:
  """T5 1.1, adapted to language modelling for 100,000 steps, on SuperGLUE.

  The checkpoints are those that T5X's documentation names. For the steps of
  adaptation in figure 3d, only 0 and 100,000 were published.
  """
  bucket = 'gs://t5-data/pretrained_models/t5x'

  def adapted(size):
    path = f'{bucket}/t5_1_1_lm100k_{size}/checkpoint_1100000'
    return Base(path, sizes.SIZES[f't5_1_1_{size}'])

  names = ('small', 'base', 'large', 'xl', 'xxl')
  spans = Base(
    f'{bucket}/t5_1_1_xl/checkpoint_1000000', sizes.SIZES['t5_1_1_xl']
  )
  tasks = ('boolq', 'cb', 'copa', 'multirc', 'record', 'rte', 'wic')
  return Setting(
    bases={name: adapted(name) for name in names},
    usual='xl',
    tasks=tuple(f'taskless_super_glue_{name}_v102' for name in tasks),
    task_feature_lengths={'inputs': 512, 'targets': 62},
    prompt=Tuning(30_000, 0.3),
    model=Tuning(30_000, 0.001),
    prompt_length=100,
    init=inits.from_class_labels(),
    objectives={
      'span corruption': spans,
      '+ LM adaptation (100K)': adapted('xl'),
    },
    adapted={'0': spans, '100000': adapted('xl')},
    domains=(
      'squad_v010_allanswers',
      (
        'squad_v010_allanswers',
        *(
          f'mrqa_{domain}_v100'
          for domain in (
            'textbook_qa',
            'bio_asq',
            'race',
            'relation_extraction',
            'duo_rc',
            'drop',
          )
        ),
      ),
    ),
    paraphrases=('taskless_glue_qqp_v200', 'taskless_glue_mrpc_v200'),
    module='ptune.tasks.library',
  )


SETTINGS: Mapping[str, Callable[[], Setting]] = {
  'miniature': miniature,
  'paper': paper,
}


def setting(
  name: str = 'miniature',
  models: Sequence[str] | None = None,
  usual: str | None = None,
  base: Base | None = None,
  **others: Any,
) -> Setting:
  """One of `SETTINGS`, with some attributes changed.

  Args:
    name: The name of the setting.
    models: The models that `model_size` compares.
    usual: The model for studies of one size.
    base: A model of your own for these studies.
    **others: Attributes of `Setting`; None keeps the setting's value.

  Raises:
    ValueError: If a name is unknown.
  """
  if name not in SETTINGS:
    raise UserError(f'SETTING is {name!r}; it must be one of {list(SETTINGS)}')
  made = SETTINGS[name]()
  changed = {k: v for k, v in others.items() if v is not None}
  bases = dict(made.bases)
  if base is not None:
    usual = usual or 'yours'
    bases[usual] = base
  if unknown := {*(models or ()), usual or made.usual} - set(bases):
    raise UserError(
      f'setting {name!r} has no models {sorted(unknown)}; it has {list(bases)}'
    )
  if models is not None:
    if not models:
      raise UserError(f'MODELS is empty; name some of {list(bases)}')
    changed['models'] = tuple(models)
  return dataclasses.replace(
    made, bases=bases, usual=usual or made.usual, **changed
  )


# -------------------------------------------------------------------- figures


def model_size(setting: Setting) -> Study:
  """Figure 1: prompt tuning closes the gap to model tuning with size."""
  cells = []
  for base in setting.models or setting.bases:
    cells += setting.whole('model tuning', base, base)
    cells += setting.prompts('prompt tuning', base, base)
  title = 'Prompt and model tuning'
  return setting.study('model_size', title, cells, by_size=True)


def prompt_length(
  setting: Setting,
  lengths: Sequence[int] = (1, 5, 20, 100),
  models: Sequence[str] | None = None,
) -> Study:
  """Figure 3a: how many tokens a prompt needs."""
  cells = []
  for base, length in itertools.product(models or [setting.usual], lengths):
    cells += setting.prompts(str(length), base, base, length=length)
  return setting.study('prompt_length', 'Prompt length', cells, by_size=True)


def prompt_init(setting: Setting, models: Sequence[str] | None = None) -> Study:
  """Figure 3b: where the prompt starts."""
  starts = {
    'random uniform': inits.random_uniform(),
    'sampled vocabulary': inits.from_sampled_vocab(),
    'class labels': setting.init,
  }
  cells = []
  for base, (name, init) in itertools.product(
    models or [setting.usual], starts.items()
  ):
    cells += setting.prompts(name, base, base, init=init)
  return setting.study('prompt_init', 'Initialisation', cells, by_size=True)


def pretraining(setting: Setting) -> Study:
  """Figure 3c: the pre-training objective of the model."""
  cells = []
  for name in setting.objectives:
    cells += setting.prompts(name, 'prompt tuning', name)
    cells += setting.whole(name, 'model tuning', name)
  return setting.study('pretraining', 'Pre-training', cells)


def adaptation(setting: Setting) -> Study:
  """Figure 3d: for how many steps the model was adapted."""
  cells = []
  for steps in setting.adapted:
    cells += setting.prompts(steps, 'prompt tuning', steps)
  return setting.study('adaptation', 'Steps of adaptation', cells)


# --------------------------------------------------------------------- tables


def domain_shift(setting: Setting) -> Study:
  """Table 1: trained in one domain, evaluated in others."""
  task, evaluated = setting.domains
  return _transfer(setting, 'domain_shift', 'Domain shift', {task: evaluated})


def paraphrase(setting: Setting) -> Study:
  """Table 2: from one paraphrase task to the other, without any training."""
  a, b = setting.paraphrases
  pairs = {a: (a, b), b: (b, a)}
  return _transfer(setting, 'paraphrase', 'Transfer of paraphrase', pairs)


def _transfer(setting: Setting, name, title, pairs) -> Study:
  cells = []
  for task, evaluated in pairs.items():
    own = dataclasses.replace(setting, tasks=(task,))
    for other in evaluated:
      row = f'{task} -> {other}'
      for cell in (
        *own.whole(row, 'model tuning', own.usual),
        *own.prompts(row, 'prompt tuning', own.usual),
      ):
        where = None if other == task else other
        cells.append(dataclasses.replace(cell, evaluated=where))
  return setting.study(name, title, cells)


def ensembling(setting: Setting, members: int = 5) -> Study:
  """Table 3: the average and the best of several prompts, and the ensemble."""
  cells = [
    dataclasses.replace(cell, row=str(cell.task))
    for cell in setting.prompts('', 'average', setting.usual)
  ]
  title = f'Ensemble of {members} prompts'
  return setting.study('ensembling', title, cells, seeds=members, vote=True)


# --------------------------------------------------------------------- sweeps


def sweep(
  setting: Setting,
  lengths: Sequence[int] = (20, 100),
  learning_rates: Sequence[float] = (0.1, 0.3, 1.0),
) -> Study:
  """Every length with every learning rate, on one model."""
  cells = []
  for length, rate in itertools.product(lengths, learning_rates):
    cells += setting.prompts(
      f'{length} tokens',
      f'{rate:g}',
      setting.usual,
      length=length,
      learning_rate=rate,
    )
  return setting.study('sweep', 'Length and learning rate', cells)
