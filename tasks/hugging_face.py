"""Hugging Face data sets as tasks, with the package `datasets`.

    ptune train --gin_file=tasks/from_hugging_face.gin \\
      --gin.DATASET="'imdb'" --gin.SPLITS="{'validation': 'test'}" \\
      --gin.INPUTS="'review: {text}'" --gin.TARGETS="'{label}'" ...

Templates, labels and metrics work as in `files`. A directory that
`save_to_disk` wrote needs no network. `pip install 'ptune[datasets]'`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ptune.errors import UserError
from ptune.tasks import files
from ptune.tasks.texts import TextTask


def _load(dataset: str, config: str | None, split: str) -> Any:
  """Opens one split of a directory or of a data set on the hub."""
  try:
    import datasets
  except ModuleNotFoundError as error:
    raise UserError(
      "DATASET needs the package datasets: pip install 'ptune[datasets]'"
    ) from error
  saved = ('dataset_dict.json', 'state.json')  # Several splits; one split.
  if not any(os.path.isfile(os.path.join(dataset, name)) for name in saved):
    return datasets.load_dataset(dataset, config, split=split)
  parts = datasets.load_from_disk(dataset)
  if not isinstance(parts, datasets.DatasetDict):
    parts = {str(parts.split or 'train'): parts}
  sizes = {name: len(part) for name, part in parts.items()}
  try:
    wanted = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
  except (ValueError, KeyError, AssertionError) as error:
    raise UserError(
      f'DATASET {dataset} has no split {split!r}, it has {list(parts)}'
    ) from error
  slices = [parts[x.splitname].select(range(x.from_, x.to)) for x in wanted]
  return datasets.concatenate_datasets(slices)


def from_hugging_face(
  dataset: str,
  inputs: str,
  targets: str,
  splits: Mapping[str, str] | None = None,
  config: str | None = None,
  label_names: files.LabelNames | None = None,
  metrics: Sequence[str] | None = None,
  skip_bad_rows: bool = False,
  rank: bool = False,
  name: str = 'from_hugging_face',
) -> TextTask:
  """Makes a task that reads a Hugging Face data set.

  Args:
    dataset: Its name on the hub, or a directory of `save_to_disk`.
    inputs: The template of the inputs, see `files.from_files`.
    targets: The template of the targets.
    splits: The task's splits -> the splits of `datasets`, which may be slices
      such as 'train[:90%]'; the default is train and validation.
    config: The configuration, if the data set has several.
    label_names: See `files.from_files`.
    metrics: See `texts.TextTask`.
    skip_bad_rows: See `files.from_files`.
    rank: See `texts.TextTask`.
    name: The task's name.

  Raises:
    UserError: The arguments do not fit together. Errors in the data set are
      raised when a split is read.
  """
  splits = splits or {'train': 'train', 'validation': 'validation'}

  def rows(split):
    for i, row in enumerate(_load(dataset, config, splits[split])):
      yield f'{dataset} {splits[split]}[{i}]', row

  return files.task_of(
    name,
    rows,
    splits,
    inputs,
    targets,
    label_names,
    skip_bad_rows,
    metrics=metrics,
    rank=rank,
  )
