"""A user's own rows as a SeqIO task, for T5X, `seqio_cache_tasks` and others.

    # mine.py, a MIXTURE_OR_TASK_MODULE
    from ptune.tasks import files, seqio_texts

    seqio_texts.register(files.from_files({'train': 'a.tsv'}, ...))

ptune itself does not need this. Here SeqIO shuffles, and rows without a label
stay in the training split. ptune leaves such rows out, but T5X trains on them.
"""

import seqio
import tensorflow as tf

from ptune.tasks import registry
from ptune.tasks.texts import TextTask


def source(task: TextTask) -> seqio.DataSource:
  """Returns the rows of a task; if it ranks, each row with every label."""

  def dataset(split, shuffle_files, seed=None):
    texts = dict(task.texts(split))
    rows = tf.data.Dataset.from_tensor_slices(texts)
    if shuffle_files:
      rows = rows.shuffle(len(texts['inputs']), seed=seed)
    return rows

  made = seqio.FunctionDataSource(dataset, splits=list(task.splits))
  # Count only when needed, because rows of an unused split are never read.
  made.num_input_examples = lambda split: len(task.texts(split)['inputs'])
  return (
    registry.rank_labels(made, [], task.labels or ()) if task.rank else made
  )


def register(task: TextTask) -> str:
  """Registers a task with SeqIO; it replaces a task of the same name.

  Returns:
    The task's name.
  """
  seqio.TaskRegistry.remove(task.name)
  seqio.TaskRegistry.add(
    task.name,
    source=source(task),
    preprocessors=registry.tokenized([]),
    output_features=registry.features(),
    postprocess_fn=task.postprocess_fn,
    metric_fns=list(task.metric_fns),
  )
  return task.name
