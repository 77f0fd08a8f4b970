"""The settings of a trained model, from its run or from its prompt file."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from ptune.api import rows as rows_lib
from ptune.api.base import Base
from ptune.config import flags, gin_files
from ptune.convert.prompts import Prompt
from ptune.errors import UserError
from ptune.methods import prompt as prompt_method
from ptune.model.adapters import Method
from ptune.model.models import Decoding
from ptune.model.sizes import Config
from ptune.serving.bank import OTHER_METHODS
from ptune.tasks import files
from ptune.tasks.texts import TextTask

# The most rows of a batch, unless a run says otherwise.
BATCH_SIZE = 32
# Tokens of inputs and answers, unless a run says otherwise.
LENGTHS = {'inputs': 256, 'targets': 32}


@dataclasses.dataclass(frozen=True)
class Recorded:
  """The settings with which a trained model answers.

  Attributes:
    config: The sizes of the network.
    method: The tuning method.
    task: A `TextTask`, or the name of a SeqIO task.
    module: The module that registers a SeqIO task.
    template: INPUTS, the template of the inputs.
    lengths: TASK_FEATURE_LENGTHS.
    batch_size: The most rows of a batch.
    decoding: How answers are decoded.
    seed: Seeds sampling.
  """

  config: Config
  method: Method
  task: Any
  module: Any
  template: str
  lengths: Mapping[str, int]
  batch_size: int
  decoding: Decoding
  seed: int


def of_run(
  base: Base, directory: pathlib.Path, rows: Mapping[str, Any] | None = None
) -> Recorded:
  """Reads the settings of a run.

  Args:
    base: The base model of the run.
    directory: The MODEL_DIR of the run.
    rows: Other rows for its task, by split: see `rows.taken`.
  """
  files = {k: v for k, v in (rows or {}).items() if isinstance(v, str)}
  given = {'base': base.path, **files}
  if rows and not files:
    given |= {split: rows_lib.PLACE for split in rows}
  import gin

  with gin_files.isolated():
    named, bindings = flags.expand('eval', given, run=str(directory))
    gin_files.parse(named, bindings)
    if rows and not files:
      rows_lib.bind(rows)
    value = lambda name: gin.get_configurable(f'{name}/macro')()
    task = value('MIXTURE_OR_TASK_NAME')
    labels = task.templates.labels if isinstance(task, TextTask) else None
    for split, some in (rows or {}).items() if labels else ():
      rows_lib.check_order(split, some, labels.column, labels.names)
    return Recorded(
      config=value('MODEL'),
      method=value('METHOD'),
      task=task,
      module=value('MIXTURE_OR_TASK_MODULE'),
      template=value('INPUTS') if isinstance(task, TextTask) else '{inputs}',
      lengths=value('TASK_FEATURE_LENGTHS'),
      batch_size=value('BATCH_SIZE'),
      decoding=gin.get_configurable(Decoding)(),
      seed=value('RANDOM_SEED'),
    )


def of_prompt(
  base: Base, prompt: Prompt, rows: Mapping[str, Any] | None = None
) -> Recorded:
  """The settings of a prompt without a run: its length, and defaults.

  Args:
    base: The base model.
    prompt: The prompt.
    rows: Rows to evaluate it on, by split: see `rows.taken`.

  Raises:
    UserError: If it is not for this base, or not for the start of the input.
  """
  length, width = prompt.array.shape
  if width != base.config.emb_dim:
    raise UserError(
      f'prompt {prompt.path} is [{length}, {width}], and the base {base.path}'
      f' is {base.config.emb_dim} wide; give the base that it was trained on'
    )
  trained = prompt.facts.get('method', '')
  if trained.startswith(OTHER_METHODS):
    raise UserError(
      f'prompt {prompt.path} was trained with method {trained!r}, which does'
      ' not put it at the start of the input; load the directory of its run'
    )
  task = TextTask('prompt', {}, vocabulary=base.vocabulary)
  if rows:
    task = files.from_files(
      rows_lib.settings(rows),
      '{inputs}',
      '{targets}',
      name='prompt',
      vocabulary=base.vocabulary,
      rows=rows_lib.in_memory(rows),
    )
  return Recorded(
    config=base.config,
    method=prompt_method.prompt(length),
    task=task,
    module=None,
    template='{inputs}',
    lengths=LENGTHS,
    batch_size=BATCH_SIZE,
    decoding=Decoding(),
    seed=0,
  )
