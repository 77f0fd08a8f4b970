"""What a run recorded of its model and task, or what is known of a prompt."""

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
from ptune.tasks.texts import TextTask

# Rows that are computed at once, at most, if no run says it.
BATCH_SIZE = 32
# Tokens of inputs and answers, if no run says them.
LENGTHS = {'inputs': 256, 'targets': 32}


@dataclasses.dataclass(frozen=True)
class Recorded:
  """The settings by which a trained model is asked.

  Attributes:
    config: The sizes of the network.
    method: What was trained.
    task: A `TextTask`, or the name of a SeqIO task.
    module: What registers a SeqIO task.
    template: INPUTS, of the inputs.
    lengths: TASK_FEATURE_LENGTHS.
    batch_size: Rows that are computed at once, at most.
    decoding: How predictions are made.
    seed: For sampling.
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
  """What a run recorded.

  Args:
    base: Its base model.
    directory: Its MODEL_DIR.
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


def of_prompt(base: Base, prompt: Prompt) -> Recorded:
  """What is known of a prompt alone.

  Raises:
    UserError: It is not for this base, or stands elsewhere than at the start.
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
      f'prompt {prompt.path} was trained with method {trained!r}, and stands'
      ' elsewhere than at the start; load the directory of its run'
    )
  return Recorded(
    config=base.config,
    method=prompt_method.prompt(length),
    task=TextTask('prompt', {}, vocabulary=base.vocabulary),
    module=None,
    template='{inputs}',
    lengths=LENGTHS,
    batch_size=BATCH_SIZE,
    decoding=Decoding(),
    seed=0,
  )
