"""Inputs that a model makes up for a text, for `ptune distill`.

The frozen model reads the text and then a request, such as 'Ask a question
about this text.' Its answers are sampled, and become the inputs of a task:

    MODEL_DIR/made_up/train.jsonl, validation.jsonl    {"inputs": ...} a line
    MODEL_DIR/made_up/run.json                         how they were made

This is the self-study of Eyuboglu et al. 2025, "Cartridges" (arXiv 2506.06266),
section 4.1, without its answers: the teacher makes these in training. A model
that follows no instructions ignores the request and makes up nonsense.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from ptune.data import padding, seqio_task
from ptune.errors import UserError, check_counts
from ptune.host.files import write_atomically
from ptune.model import parameters, partitioning
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving.trained_model import NOTHING, load
from ptune.tasks import files
from ptune.tasks.texts import TextTask
from ptune.training import losses, run_file, settings

# The share of the inputs that is held out, if that is at least a batch.
VALIDATION = 1 / 8


@dataclasses.dataclass(frozen=True)
class MadeUp:
  """The settings of made-up inputs.

  Attributes:
    requests: The texts that the model reads after the context; inputs use them
      in turn.
    count: The number of inputs to sample. Those that are empty or the same as
      an earlier one are dropped.
    temperature: Divides the logits of the sampling.
    seed: Input i is sampled with fold_in(key(seed), i).
    checkpoint_path: The base model.
  """

  requests: Sequence[str]
  count: int = 512
  temperature: float = 1.0
  seed: int = 0
  checkpoint_path: settings.PathLike | None = None

  def __post_init__(self):
    check_counts(MADE_UP_INPUTS=self.count)
    if not self.requests or isinstance(self.requests, str):
      raise UserError(
        f'REQUESTS is {self.requests!r}; it must be a list of texts, such as'
        " ['Ask a question about this text.']"
      )
    if self.temperature <= 0:
      raise UserError(
        f'TEMPERATURE is {self.temperature}; it must be above 0, because'
        ' without sampling all inputs of a request would be the same'
      )


def task(model_dir: settings.PathLike) -> TextTask:
  """The task of the inputs in MODEL_DIR; they are read on first use."""
  directory = _directory(model_dir)
  return files.from_files(
    {
      split: os.fspath(directory / f'{split}.jsonl')
      for split in ('train', 'validation')
    },
    inputs='{inputs}',
    targets='{targets}',
    name='made_up',
  )


def make(
  how: MadeUp,
  context: Sequence[int],
  model_dir: settings.PathLike,
  data: settings.Data,
  config: Config,
  model_parallel: int = 1,
) -> None:
  """Writes the inputs for `task`, unless a run that uses them has begun.

  Args:
    how: How they are made up.
    context: The token ids of the text, without EOS.
    model_dir: MODEL_DIR.
    data: The task, the longest inputs, and the rows that are sampled at once.
    config: The network's sizes.
    model_parallel: Devices that one copy of the weights is split over.

  Raises:
    ValueError: If the run in MODEL_DIR has inputs that were made in another
      way, or the model makes up fewer than two batches.
  """
  directory = _directory(model_dir)
  facts: dict[str, Any] = {
    'CONTEXT': hashlib.sha256(np.asarray(context).tobytes()).hexdigest()[:16],
    'REQUESTS': list(how.requests),
    'MADE_UP_INPUTS': how.count,
    'TEMPERATURE': how.temperature,
    'RANDOM_SEED': how.seed,
    'TASK_FEATURE_LENGTHS': dict(data.feature_lengths),
  }
  if run_file.read(run_file.run_directory(model_dir)):
    run_file.compare(model_dir, run_file.read(directory), facts)
    return
  plan = parameters.plan(
    config, NOTHING, partitioning.make_mesh(model_parallel)
  )
  texts = sample(how, context, data, plan)
  kept = [*dict.fromkeys(text for text in texts if text)]
  example = '' if not kept else f', such as {kept[0]!r:.200}'
  logging.info(
    'the model made up %d inputs, %d of them different%s',
    len(texts),
    len(kept),
    example,
  )
  held = max(int(len(kept) * VALIDATION), data.batch_size)
  if len(kept) < held + data.batch_size:
    raise UserError(
      f'of {len(texts)} inputs that the model made up for CONTEXT, {len(kept)}'
      ' are different and not empty. Training and comparison need a batch each'
      f' (BATCH_SIZE {data.batch_size}): raise MADE_UP_INPUTS or TEMPERATURE,'
      ' or lower BATCH_SIZE'
    )
  if jax.process_index() == 0:
    directory.mkdir(parents=True, exist_ok=True)
    splits = {'validation': kept[:held], 'train': kept[held:]}
    for split, rows in splits.items():
      lines = [json.dumps({'inputs': row, 'targets': ''}) for row in rows]
      text = '\n'.join(lines) + '\n'
      write_atomically(directory / f'{split}.jsonl', text)
    facts_file = directory / run_file.FILE
    write_atomically(facts_file, json.dumps(facts, indent=2) + '\n')
  multihost_utils.sync_global_devices('made-up inputs')


def sample(
  how: MadeUp,
  context: Sequence[int],
  data: settings.Data,
  plan: parameters.Plan,
) -> list[str]:
  """Samples `how.count` texts; does not depend on the batch size."""
  vocabulary = seqio_task.vocabulary(seqio_task.load(data.task, data.module))
  ids = plan.network.config.ids
  asked = [
    np.array([*vocabulary.encode(text), ids.eos], np.int32)
    for text in how.requests
  ]
  longest = max(map(len, asked))
  requests = padding.filled_up(asked, longest, 'encoder_input_tokens', ids.pad)
  params, _ = load(plan, settings.Trained(checkpoint_path=how.checkpoint_path))
  model = EncoderDecoderModel(plan.network)
  decoding = Decoding(temperature=how.temperature)

  def draw(params, numbers):  # [rows] -> [rows, length]
    key = jax.random.key(how.seed)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
    tokens = jax.numpy.asarray(requests)[numbers % len(requests)]
    tokens = losses.after_context(context, tokens)
    length = data.feature_lengths['inputs']
    return model.predict(params, tokens, length, decoding, keys)[0]

  draw = jax.jit(draw, out_shardings=partitioning.replicated(plan.mesh))
  texts: list[str] = []
  while len(texts) < how.count:
    numbers = np.arange(len(texts), len(texts) + data.batch_size)
    with plan.scope():
      rows = np.asarray(draw(params, numbers.astype(np.int32)))
    for row in rows:
      end = np.isin(row, (ids.eos, ids.pad))
      row = row[: int(np.argmax(end)) if end.any() else None]
      texts.append(vocabulary.decode(row.tolist()).strip())
  return texts[: how.count]


def _directory(model_dir: settings.PathLike) -> epath.Path:
  return run_file.run_directory(model_dir) / 'made_up'
