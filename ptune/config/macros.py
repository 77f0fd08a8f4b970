"""The macros that gin files read: the meaning and the valid values of each.

`check` refuses wrong values before anything is imported, allocated or written.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ptune.errors import UserError
from ptune.host import paths

# Steps and seeds are int32 on the devices.
INT32 = 2**31 - 1
LONGEST = 2**20  # Tokens; a longer input does not fit T5's attention.
LONGEST_PROMPT = 2**16

# Returns the expected value in words, or '' if the value is valid.
Kind = Callable[[Any], str]


class Macro(NamedTuple):
  """A macro.

  Attributes:
    what: Its meaning, in a few words.
    example: A value, as a user writes it.
    kind: Tells which values are valid.
  """

  what: str
  example: str
  kind: Kind


# ----------------------------------------------------------------------- kinds


def whole(least: int = 1, most: int = INT32) -> Kind:
  """Whole numbers within bounds. True is not one, although Python says so."""
  expected = f'a whole number from {least} to {most}'
  return lambda x: '' if type(x) is int and least <= x <= most else expected


def number(least: float, most: float) -> Kind:
  """Numbers within bounds; NaN and infinity are outside."""
  expected = f'a number from {least:g} to {most:g}'
  return lambda x: (
    '' if type(x) in (int, float) and least <= x <= most else expected
  )


def one_of(*values: str) -> Kind:
  """One of a few strings."""
  expected = ' or '.join(map(repr, values))
  return lambda x: '' if isinstance(x, str) and x in values else expected


def or_none(kind: Kind) -> Kind:
  """The values of a kind, and None."""

  def fault(value):
    expected = '' if value is None else kind(value)
    return expected and f'{expected}, or None'

  return fault


def either(one: Kind, other: Kind) -> Kind:
  """The values of either of two kinds."""

  def fault(value):
    expected = one(value) and other(value)
    return expected and f'{one(value)}, or {expected}'

  return fault


def list_of(kind: Kind, least: int = 1) -> Kind:
  """Lists or tuples whose items are of one kind."""

  def fault(values):
    if not isinstance(values, list | tuple):
      return 'a list'
    if len(values) < least:
      return f'a list with at least {least} items'
    expected = next(filter(None, map(kind, values)), '')
    return expected and f'a list whose items are {expected}'

  return fault


def by_name(kind: Kind) -> Kind:
  """Dicts from strings to values of one kind."""

  def fault(values):
    if not isinstance(values, Mapping) or not values:
      return 'a dict, not empty'
    if any(map(_text, values)):
      return 'a dict whose keys are texts'
    expected = next(filter(None, map(kind, values.values())), '')
    return expected and f'a dict whose values are {expected}'

  return fault


def _boolean(value: Any) -> str:
  return '' if isinstance(value, bool) else 'True or False'


def _text(value: Any) -> str:
  good = isinstance(value, str) and value.strip()
  return '' if good else 'a text in quotes, not empty'


def _path(value: Any) -> str:
  return paths.fault(value) if isinstance(value, str) else 'a path in quotes'


def _task(value: Any) -> str:
  """A name that SeqIO accepts and that can name a directory on any system."""
  name = r'[A-Za-z0-9_:#-][\w.:#-]{0,199}'
  if isinstance(value, str) and re.fullmatch(name, value, re.ASCII):
    return ''
  return 'up to 200 letters, digits, _ : # - and dots, and no dot first'


def _chosen(value: Any) -> str:
  """A reference, which the user sets by choosing a gin file."""
  return 'a reference, which the named file sets'


def _each(kind: Kind, **macros: tuple[str, str]) -> dict[str, Macro]:
  return {name: Macro(*about, kind) for name, about in macros.items()}


MACROS = {
  **_each(
    whole(1, 2**24),
    BATCH_SIZE=('examples a step', '32'),
  ),
  **_each(
    or_none(_text),
    CONTEXT=('the text that is distilled', "'Say whether it is good.'"),
    BEST_METRIC=('the metric that picks the best prompt', "'accuracy'"),
    DATASET_CONFIG=('the configuration of DATASET', "'sst2'"),
    DEFAULT_PROMPT=('the prompt for rows that name none', "'sst2'"),
    EVAL_SPLIT=('the split to evaluate', "'validation'"),
    INFER_SPLIT=('the split to predict', "'test'"),
    PROMPTS=('the prompts, by name', "'sst2=a.npy,rte=b.npy'"),
    USUAL=('the model of studies that use one size', "'xl'"),
  ),
  **_each(
    or_none(whole(1, LONGEST)),
    BUCKET_MULTIPLE=('lengths are padded to a multiple of this', '32'),
  ),
  **_each(
    or_none(_path),
    CHECKPOINT_PATH=(
      'the base model, to evaluate or predict',
      "'/models/t5_1_1_small'",
    ),
    CONTEXT_FILE=('a file that holds CONTEXT', "'manual.txt'"),
    EVAL_OUTPUT_DIR=('directory that an evaluation writes to', "'/runs/eval'"),
    INFER_FILE=('inputs: a .txt, .tsv, .csv or .jsonl file', "'a.txt'"),
    INFER_OUTPUT_DIR=('directory for predictions', "'/runs/out'"),
    INITIAL_CHECKPOINT_PATH=(
      'the base model, to train',
      "'/models/t5_1_1_small'",
    ),
    MODEL_DIR=('directory that a run writes to', "'/runs/sst2'"),
    PROMPT_FILE=('a saved prompt', "'/runs/sst2/prompts/best.npy'"),
    VOCABULARY=('the vocabulary of built-in tasks', "'ptune://tiny'"),
  ),
  **_each(
    whole(),
    CHECKPOINT_PERIOD=('steps between checkpoints', '1000'),
    EVAL_PERIOD=('steps between evaluations', '1000'),
    MADE_UP_INPUTS=('inputs that the model makes up for CONTEXT', '512'),
    MEMBERS=('prompts of an ensemble', '5'),
    MICROBATCHES=('parts into which a batch is split', '4'),
    MODEL_PARALLEL=('devices that hold one copy of the weights', '4'),
    PIECES=('parts into which pruning cuts a row', '16'),
    SEEDS=('how often a study repeats each training', '3'),
    TOGETHER=('most trainings that share one program', '8'),
    TRAIN_STEPS=('training steps of this run', '30000'),
  ),
  **_each(
    or_none(list_of(_text)),
    CLASS_LABELS=('labels that initialise the prompt', "['no', 'yes']"),
    MODELS=('the models of a study', "['tiny', 'mini']"),
  ),
  **_each(
    _path,
    DATASET=('a data set of Hugging Face datasets', "'imdb'"),
  ),
  **_each(
    number(0, 0.999),
    DROPOUT_RATE=('dropout in training', '0.1'),
  ),
  **_each(
    one_of('float32', 'bfloat16'),
    DTYPE=('dtype of activations', "'bfloat16'"),
  ),
  **_each(
    or_none(whole()),
    EARLY_STOPPING=('evaluations without a better score', '5'),
    EVAL_STEPS=('batches of an evaluation, None for all', '20'),
    KEEP_CHECKPOINTS=('checkpoints to keep, None for all', '3'),
    KEEP_PIECES=('pieces that a pruned prompt keeps', '80'),
    KEEP_ROWS=('rows that a pruned prompt keeps', '10'),
  ),
  **_each(
    or_none(one_of('float32', 'bfloat16', 'int8')),
    FROZEN_DTYPE=('dtype in which frozen matrices are stored', "'int8'"),
  ),
  **_each(
    or_none(_boolean),
    FUSED_ATTENTION=('fused attention; None: on TPUs only', 'True'),
    FUSED_MLP=('fused MLPs, which only TPUs have; None: there', 'True'),
  ),
  **_each(
    _boolean,
    FSDP=('split frozen matrices over all devices', 'True'),
    RANK=('score every label instead of writing one', 'True'),
    REMAT=('recompute layers in the backward pass', 'True'),
    SCAN=('compile one layer of each stack, and loop over them', 'True'),
    SKIP_BAD_ROWS=('list bad rows instead of stopping', 'True'),
    USE_CACHED_TASKS=('read tasks cached by SeqIO', 'True'),
  ),
  **_each(
    one_of('leave_one_out', 'gradient'),
    IMPORTANCE=('how rows are scored', "'leave_one_out'"),
  ),
  **_each(
    one_of('predict', 'score', 'classify'),
    INFER_MODE=('predict, score targets, or classify', "'classify'"),
  ),
  **_each(
    _text,
    INITIAL_TEXT=('text that initialises the prompt', "'Classify this:'"),
    INPUTS=('template of the inputs', "'review: {text}'"),
    MIXTURE_OR_TASK_NAME=('the SeqIO task', "'my_sst2'"),
    TARGETS=('template of the targets', "'{label}'"),
    TARGET_TEXT=(
      'the text that a loss pulls the prompt to',
      "'Say yes or no:'",
    ),
  ),
  **_each(
    or_none(either(list_of(_text, 2), by_name(_text))),
    LABEL_NAMES=('names of the labels 0, 1, ...', "['no', 'yes']"),
  ),
  **_each(
    number(0, 1e4),
    CLIP_NORM=("bound on a row's gradient, see losses/private.gin", '1.0'),
    LEARNING_RATE=('peak learning rate', '0.3'),
    NOISE_MULTIPLIER=('noise, as a multiple of CLIP_NORM', '1.0'),
    OFFSET_LEARNING_RATE=('learning rate of the input offsets', '0.001'),
  ),
  **_each(
    number(1e-4, 1e4),
    TEMPERATURE=('temperature at which inputs are sampled', '1.0'),
  ),
  **_each(
    list_of(_text),
    REQUESTS=('requests for inputs, after CONTEXT', "['Ask a question.']"),
  ),
  **_each(
    number(0, 1),
    DELTA=('delta of differential privacy', '1e-5'),
  ),
  **_each(
    or_none(number(0, 1e9)),
    EPSILON=('epsilon of differential privacy, which ends a run', '8.0'),
  ),
  **_each(
    list_of(number(0, 1e4)),
    FACTORS=("multiples of a method's learning rate", '[0.3, 1.0, 3.0]'),
    LEARNING_RATES=('learning rates of a sweep', '[0.1, 0.3]'),
  ),
  **_each(
    list_of(whole(1, LONGEST_PROMPT)),
    LENGTHS=('prompt lengths of a study', '[1, 5, 20, 100]'),
  ),
  **_each(
    _chosen,
    METHOD=('set by a file of methods/ or prompts/', '@prompt.prompt()'),
    MODEL=('set by a file of models/', '@sizes.t5()'),
    OPTIMIZER=('set by a file of methods/', '@optim.adafactor'),
    STUDIES=('set by a file of studies/', '[@studies.sweep()]'),
  ),
  **_each(
    or_none(list_of(_text, 0)),
    METHODS=('the methods that a study compares', "['prompt', 'lora']"),
    METRICS=('names of metrics, see tasks/from_files.gin', "['accuracy']"),
  ),
  **_each(
    or_none(either(_text, list_of(_text))),
    MIXTURE_OR_TASK_MODULE=('the module that registers it', "'my_tasks'"),
  ),
  **_each(
    whole(0, 2**16),
    PACK=('how many of the longest examples fit in a row', '4'),
  ),
  **_each(
    or_none(whole(0)),
    PROFILE_STEPS=('steps to trace, into MODEL_DIR/profile', '5'),
  ),
  **_each(
    whole(1, LONGEST_PROMPT),
    PROMPT_LENGTH=('rows of the prompt', '100'),
  ),
  **_each(
    whole(0),
    RANDOM_SEED=('seed of data order, initialisation, dropout', '0'),
  ),
  **_each(
    one_of('shuffle', 'poisson'),
    SAMPLING=('how private batches are drawn', "'poisson'"),
  ),
  **_each(
    one_of('miniature', 'paper'),
    SETTING=('the size of a study', "'paper'"),
  ),
  **_each(
    or_none(one_of('trackio', 'wandb')),
    TRACKER=('experiment tracker that gets the figures too', "'trackio'"),
  ),
  **_each(
    list_of(_path),
    SOURCE_PROMPTS=('saved prompts of other tasks', "['mnli.npy']"),
  ),
  **_each(
    or_none(list_of(number(0, 1e30))),
    SOURCE_WEIGHTS=('weights of their mean', '[0.7, 0.3]'),
  ),
  **_each(
    or_none(by_name(_text)),
    SPLITS=("splits of the task -> DATASET's", "{'train': 'train'}"),
  ),
  **_each(
    by_name(whole(1, LONGEST)),
    TASK_FEATURE_LENGTHS=(
      'longest inputs and targets, in tokens',
      "{'inputs': 128, 'targets': 8}",
    ),
  ),
  **_each(
    by_name(either(_path, list_of(_path))),
    TASK_FILES=('a file or files for each split', "{'train': 'train.tsv'}"),
  ),
  **_each(
    or_none(list_of(_task)),
    TASKS=('tasks of a study instead of its own', "['sst2', 'boolq']"),
  ),
  **_each(
    _task,
    TASK_NAME=('name of the task made of files', "'mine'"),
  ),
}


# ----------------------------------------------------------------------- check


def flag(name: str) -> str:
  """A macro's flag as an example: --gin.MODEL_DIR="'/runs/sst2'"."""
  example = MACROS[name].example if name in MACROS else '...'
  plain = re.fullmatch(r'[\w.]+', example)
  return f'--gin.{name}=' + (example if plain else f'"{example}"')


def check(values: Mapping[str, Any]) -> None:
  """Checks settings by the names of their macros, and ignores other names.

  Raises:
    UserError: It lists each invalid value; or a batch is larger than this
      machine's memory.
  """
  wrong = [
    f'{name} ({macro.what}) is {_shown(values[name])}; expected {expected},'
    f' e.g. {macro.example}'
    for name, macro in MACROS.items()
    if name in values and (expected := macro.kind(values[name]))
  ]
  if wrong:
    raise UserError('\n'.join(sorted(wrong)))
  _check_memory(values)


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 200 else f'{text[:200]}...'


def _check_memory(values: Mapping[str, Any]) -> None:
  """Refuses a batch whose token ids alone exceed the memory."""
  used = ('BATCH_SIZE', 'TASK_FEATURE_LENGTHS', 'PACK')
  rows, lengths, pack = map(values.get, used)
  if rows is None or lengths is None:
    return
  needed = 4 * rows * sum(lengths.values()) * (pack or 1)
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if needed > memory:
    given = ', '.join(f'{k}={values[k]!r}' for k in used if k in values)
    raise UserError(
      f'{given}: the token ids of one batch take {needed / 2**30:,.0f} GiB, and'
      f' this machine has {memory / 2**30:,.0f} GiB; lower one of them'
    )
