"""The settings of a run, in groups that several programs share.

A program takes one argument for each group. In gin, a group is a configurable:

    settings.Data.batch_size = 64
    train.train.data = @settings.Data()
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from ptune.data.bucketing import BUCKET_MULTIPLE
from ptune.errors import check_counts
from ptune.model.models import Decoding
from ptune.tasks.texts import TextTask
from ptune.training import trackers
from ptune.training.privacy import Privacy

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Data:
  """The data to read, and the batches to form.

  Attributes:
    task: MIXTURE_OR_TASK_NAME: the name of a SeqIO task or mixture, or a task
      object such as `tasks/from_files.gin` makes.
    feature_lengths: TASK_FEATURE_LENGTHS: the most tokens of inputs and of
      targets.
    module: MIXTURE_OR_TASK_MODULE, which registers the task, so it is imported
      first.
    batch_size: The examples in a training step, or the rows that another
      program computes at once.
    microbatches: The number of parts that a training batch is split into; they
      are computed one after the other.
    bucket_multiple: Batches hold rows of similar length, rounded up to a
      multiple of this; short targets are rounded to half of it or less. None
      pads all rows to feature_lengths.
    pack: If not 0, a training row holds several examples and has room for this
      many of the longest; see `packing`. batch_size then counts these rows.
    in_memory: See `batches.Batches`.
    use_cached: USE_CACHED_TASKS.
    privacy: How private the training rows stay; None if they need not.
  """

  task: str | TextTask
  feature_lengths: Mapping[str, int]
  module: str | Sequence[str] | None = None
  batch_size: int = 32
  microbatches: int = 1
  bucket_multiple: int | None = BUCKET_MULTIPLE
  pack: int = 0
  in_memory: bool | None = None
  use_cached: bool = False
  privacy: Privacy | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How to evaluate a model.

  Attributes:
    split: The split to evaluate. In training, None turns evaluation off, and a
      task without the default split is trained without evaluation.
    steps: EVAL_STEPS: the batches of an evaluation; None for the whole split.
    batch_size: The rows computed at once; None for the batch size of `Data`.
    decoding: How to decode predictions.
    best_metric: The metric that chooses the best prompt, with a minus in front
      if lower is better. None for the mean of the task's own metrics, or the
      loss if it has none.
    period: EVAL_PERIOD: the training steps between two evaluations.
    early_stopping: Training ends after this many evaluations without a better
      score; None for never.
  """

  split: str | None = 'validation'
  steps: int | None = None
  batch_size: int | None = None
  decoding: Decoding = Decoding()
  best_metric: str | None = None
  period: int = 1000
  early_stopping: int | None = None


@dataclasses.dataclass(frozen=True)
class Saving:
  """The output of a training run while it trains.

  Attributes:
    checkpoint_period: The steps between two checkpoints.
    keep_checkpoints: How many of the newest checkpoints to keep; None for all.
    log_period: The steps between two records in the log.
    profile_steps: The number of steps to trace; see `profiling`.
    tracker: The one of `trackers.TRACKERS` that also gets the records; None for
      no tracker.
    curves: Whether curves.png is drawn at the end.
    rows: The text of further files, by their paths in MODEL_DIR: the rows from
      Python that the run trains on; see `ptune.api`.
  """

  checkpoint_period: int = 1000
  keep_checkpoints: int | None = None
  log_period: int = 50
  profile_steps: int | None = None
  tracker: str | None = None
  curves: bool = True
  rows: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trained:
  """Which trained model to use; `trained_model.check` checks the combination.

  Attributes:
    model_dir: MODEL_DIR: a run of `ptune train`.
    checkpoint_path: CHECKPOINT_PATH: the base model. None for the base model
      that the run of model_dir started from.
    prompt_file: A prompt file, used if there is no model_dir.
    prompts: Several prompts instead of one: a mapping by name, or a text that
      `bank.parse` reads.
    default_prompt: The prompt, out of `prompts`, for rows that name none. Not
      needed if there is only one.
  """

  model_dir: PathLike | None = None
  checkpoint_path: PathLike | None = None
  prompt_file: PathLike | None = None
  prompts: str | Mapping[str, str] | None = None
  default_prompt: str | None = None


def check(
  data: Data,
  evaluation: Evaluation = Evaluation(),
  saving: Saving = Saving(),
  **counts: int,
) -> None:
  """Checks the numbers in a program's settings.

  Args:
    data: The settings of the data.
    evaluation: The settings of the evaluation.
    saving: The settings of saving.
    **counts: Other numbers that must be at least 1, by the names users know.

  Raises:
    UserError: If a number is not a whole number of at least 1; lists each one.
  """
  trackers.check(saving.tracker)
  check_counts(
    **counts,
    BATCH_SIZE=data.batch_size,
    MICROBATCHES=data.microbatches,
    EVAL_PERIOD=evaluation.period,
    CHECKPOINT_PERIOD=saving.checkpoint_period,
    log_period=saving.log_period,
  )
  check_counts(
    optional=True,
    PACK=data.pack or None,
    EVAL_STEPS=evaluation.steps,
    eval_batch_size=evaluation.batch_size,
    EARLY_STOPPING=evaluation.early_stopping,
    KEEP_CHECKPOINTS=saving.keep_checkpoints,
    PROFILE_STEPS=saving.profile_steps or None,
  )
