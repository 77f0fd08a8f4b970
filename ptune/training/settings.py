"""The settings of a run, in the groups that programs share.

A program takes one argument a group. In a gin file a group is a configurable:

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
  """What is read, and in which batches.

  Attributes:
    task: MIXTURE_OR_TASK_NAME, the SeqIO task or mixture; or a task itself,
      such as `tasks/from_files.gin` makes.
    feature_lengths: TASK_FEATURE_LENGTHS, the longest inputs and targets in
      tokens.
    module: MIXTURE_OR_TASK_MODULE; imported first, because it registers the
      task.
    batch_size: Examples a step, or rows that a program computes at once.
    microbatches: Parts that a training batch is computed in, one after the
      other.
    bucket_multiple: Lengths are rounded up to a multiple of it, short targets
      to half of it or less, in batches of like lengths; None pads all to
      feature_lengths.
    pack: If not 0, training rows hold several examples, and have room for so
      many of the longest, see `packing`; batch_size then counts rows, which
      all have one length.
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
  """How a model is evaluated.

  Attributes:
    split: What is evaluated; None, in training, for nothing. A task without
      the default split is trained without evaluations.
    steps: EVAL_STEPS, batches of an evaluation; the whole split if None.
    batch_size: Rows that are computed at once; that of `Data` if None.
    decoding: How predictions are made.
    best_metric: The metric that chooses the best prompt, with a minus in front
      if less is better. If None, the mean of the task's own metrics, or the
      loss if it has none.
    period: EVAL_PERIOD, training steps between two evaluations.
    early_stopping: Evaluations without a better score after which training
      ends; never if None.
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
  """What a training run leaves on disk while it goes on.

  Attributes:
    checkpoint_period: Steps between two checkpoints.
    keep_checkpoints: How many of the newest are kept; all if None.
    log_period: Steps between two records in the log.
    profile_steps: Steps traced into MODEL_DIR/profile, see `profiling`.
    tracker: Which of `trackers.TRACKERS` gets the records too, if any.
  """

  checkpoint_period: int = 1000
  keep_checkpoints: int | None = None
  log_period: int = 50
  profile_steps: int | None = None
  tracker: str | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
  """Which trained model a program asks; `trained_model.check` says what fits.

  Attributes:
    model_dir: MODEL_DIR, a run of `ptune train`.
    checkpoint_path: CHECKPOINT_PATH, the base model; the one that the run of
      model_dir started from if None.
    prompt_file: A prompt, if there is no model_dir.
    prompts: Several prompts in place of one, by name or as `bank.parse` reads
      them.
    default_prompt: The one of `prompts` that answers rows which name none; not
      needed if there is but one.
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
  """Checks all numbers of a program; the error lists every wrong one.

  Args:
    data: Settings of the program.
    evaluation: The same.
    saving: The same.
    **counts: Others that must be at least 1, by the name that users know.

  Raises:
    UserError: If one is not a whole number of at least 1.
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
