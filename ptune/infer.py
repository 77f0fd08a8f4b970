"""`ptune infer`: predictions, scores or label probabilities as JSON lines."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from ptune.data import device_feed, padding, seqio_task
from ptune.data.inputs import STDIN, read_inputs
from ptune.errors import UserError
from ptune.host.files import writing
from ptune.model import parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving import predictor, trained_model
from ptune.serving.bank import unknown
from ptune.tasks.texts import TextTask
from ptune.training import settings
from ptune.training.report import to_json

MODES = ('predict', 'score', 'classify')
# The text to print for a record if the inputs come from standard input.
PRINTED = {
  'predict': 'prediction',
  'score': 'score',
  'classify': 'probabilities',
}
# The number of batches to read, sort by length and write together.
CHUNK = 64


def infer(
  *,
  data: settings.Data,
  config: Config,
  method: Method,
  trained: settings.Trained,
  model: Callable[..., EncoderDecoderModel] = EncoderDecoderModel,
  output_dir: str | None = None,
  input_file: str | None = None,
  split: str = 'test',
  mode: str = 'predict',
  decoding: Decoding = Decoding(),
  seed: int = 0,
  model_parallel: int = 1,
) -> epath.Path:
  """Writes a trained model's answer to each input, in the order of the inputs.

  Args:
    data: The task and its batches; the batch size does not change any answer.
      With an input_file, only the task's vocabulary and the ends of its
      features are used.
    config: The network's sizes.
    method: The method that was trained.
    trained: The trained model. If there are several prompts, each line of a
      .jsonl file names its own as `prompt`.
    model: Makes the loss of a network.
    output_dir: The directory to write to; None for MODEL_DIR/infer.
    input_file: A file with one input a line, or a .tsv, .csv or .jsonl file; -
      is standard input. See `inputs.read_inputs`.
    split: The split of the task, if there is no input_file.
    mode: 'predict', 'score' for the log probability of the targets, or
      'classify' for the probability of each label of the task.
    decoding: How to decode predictions.
    seed: For sampling.
    model_parallel: The number of devices that share one copy of the weights.

  Returns:
    The path of the file. It has a line for each input, with `inputs`, `score`,
    `targets` if there are any, and `prompt` if there are several. Predict and
    classify mode add the `prediction`. Classify mode predicts the most likely
    label, and adds the `probabilities` by label, which sum to 1.
  """
  if mode not in MODES:
    raise UserError(f'INFER_MODE is {mode!r}; it must be one of {MODES}')
  settings.check(data)
  task = seqio_task.load(data.task, data.module)
  seqio_task.check_vocabulary(
    task, config.vocab_size, config.ids, trained_model.base_of(trained)
  )
  vocabulary = seqio_task.vocabulary(task)
  named, own = _prompts(trained, method)
  name, examples = _examples(task, data, config, split, input_file, mode, own)
  mesh = partitioning.make_mesh(model_parallel)
  device_feed.check_batch_size(data.batch_size, mesh)
  plan = parameters.plan(config, method, mesh)
  if named is None:
    trained_model.check(plan, trained)
  directory = trained_model.output_directory(
    'INFER_OUTPUT_DIR', output_dir, trained.model_dir, 'infer'
  )
  longest = data.feature_lengths['targets']
  labels = _labels(task, data, config) if mode == 'classify' else {}
  if named is None:
    params, _ = trained_model.load(plan, trained)
    asked = predictor.Predictor(
      plan, model(plan.network), longest, decoding, seed
    )
    trees = lambda records: (params,)
  else:
    bank = trained_model.load_bank(
      config,
      trained.checkpoint_path,
      longest,
      named,
      mesh=mesh,
      model=model,
      decoding=decoding,
      seed=seed,
    )
    asked = bank.predictor
    trees = lambda records: bank.trees([r['prompt'] for r in records])

  def answer(chunk, first):
    """The records of a chunk; `number` is that of its first example."""
    records: list[dict[str, Any]] = [dict(texts) for texts, _ in chunk]

    def ask(batch, rows):
      params = trees([records[row // len(each)] for row in rows])
      if mode != 'predict':
        return (), asked.score(params, batch)
      return asked.predict(params, batch, first + rows)

    # To classify, each record takes one row for each label.
    each = list(labels.values()) or [{}]
    padded = padding.padded_batches(
      [features | label for _, features in chunk for label in each],
      data.batch_size,
      data.bucket_multiple,
      config.ids.pad,
    )
    put = lambda batch: device_feed.device_put(batch, mesh, method.check)
    found = predictor.by_row(padded, put, ask)
    if labels:
      scores = sorted((row, float(score)) for row, (_, score) in found)
      _add_probabilities(records, [*labels], [score for _, score in scores])
      return records
    for row, (ids, score) in found:
      if mode == 'predict':
        records[row]['prediction'] = vocabulary.decode(ids.tolist())
      records[row]['score'] = float(score)
    return records

  path = directory / f'{name}-{mode}.jsonl'
  chunks = _chunks(examples, data.batch_size * CHUNK)
  shown = PRINTED[mode] if input_file == STDIN else None
  if not _write(path, chunks, answer, shown):
    raise UserError(
      f'{input_file or name} has no examples to {mode}; give at least one input'
    )
  return path


def _examples(
  task: seqio_task.Provider,
  data: settings.Data,
  config: Config,
  split: str,
  input_file: str | None,
  mode: str,
  own: Callable[..., dict[str, str]],
) -> tuple[str, Iterator[tuple[dict[str, str], dict[str, Any]]]]:
  """Returns a name for the output, and (texts, features) of each input."""
  if input_file is None:
    name = f'{data.task}-{split}'
    seqio_task.check(task, data.feature_lengths, split, data.use_cached)
    same = own(name, {})
    if mode == 'classify' and isinstance(task, TextTask):
      # For ranking, the task has each row once for each label.
      read = task.texts(split)
      found = (
        seqio_task.encode(
          task, data.feature_lengths, {'inputs': i, 'targets': t}, config.ids
        )
        for i, t in zip(read['inputs'], read['targets'], strict=True)
      )
    else:
      found = seqio_task.examples(
        task, data.feature_lengths, split, data.use_cached, config.ids
      )
    examples = ((texts | same, features) for texts, features in found)
  else:
    name = _stem(input_file)
    seqio_task.check(task, data.feature_lengths, None)
    texts = [
      text | own(where, row)
      for where, text, row in read_inputs(input_file, task, mode == 'score')
    ]
    examples = (
      seqio_task.encode(task, data.feature_lengths, text, config.ids)
      for text in texts
    )
  return name, examples


def _labels(
  task: seqio_task.Provider, data: settings.Data, config: Config
) -> dict[str, dict[str, Any]]:
  """Returns the features of each label of a task, as a target.

  Raises:
    UserError: If the task is not a classification.
  """
  found = {}
  for label in seqio_task.labels(task, data.feature_lengths, data.use_cached):
    texts = {'inputs': '', 'targets': label}
    _, features = seqio_task.encode(
      task, data.feature_lengths, texts, config.ids
    )
    del features['encoder_input_tokens']
    found[label] = features
  return found


def _add_probabilities(
  records: list[dict[str, Any]], labels: list[str], scores: list[float]
) -> None:
  """Adds the prediction and the labels' probabilities to each record.

  Args:
    records: The record of each input.
    labels: The labels.
    scores: The log probability of each label, [records * labels].
  """
  by_record = np.reshape(scores, (len(records), len(labels)))
  likely = predictor.probabilities(by_record)
  for record, own, shares in zip(records, by_record, likely, strict=True):
    best = int(np.argmax(own))
    record['prediction'] = labels[best]
    record['score'] = float(own[best])
    record['probabilities'] = dict(zip(labels, map(float, shares), strict=True))


def _prompts(
  trained: settings.Trained, method: Method
) -> tuple[dict[str, str] | None, Callable[..., dict[str, str]]]:
  """The files of several prompts by name, and a function for a row's prompt."""
  named, default_prompt = None, trained.default_prompt
  if trained.prompts is not None:
    named = trained_model.named_prompts(trained, method)
    if default_prompt is None and len(named) == 1:
      default_prompt = next(iter(named))
  elif default_prompt is not None:
    raise UserError(
      f'DEFAULT_PROMPT is {default_prompt!r}, but PROMPTS is not set; set'
      ' PROMPTS or remove it'
    )
  return named, functools.partial(_own_prompt, named, default_prompt)


def _write(
  path: epath.Path,
  chunks: Iterator[list[Any]],
  answer: Callable[[list[Any], int], list[dict[str, Any]]],
  shown: str | None = None,
) -> int:
  """Writes the records of all chunks, or nothing; returns their number.

  Args:
    path: The file to write.
    chunks: The inputs, in chunks.
    answer: See `infer`.
    shown: Makes the text to print for each record; if it is given, the file's
      name is not printed.
  """
  partial = path.parent / f'.{path.name}.tmp'
  writes = jax.process_index() == 0
  count = 0
  try:
    with writing(path):
      with partial.open('w') if writes else contextlib.nullcontext() as f:
        for chunk in chunks:
          records = answer(chunk, count)
          count += len(records)
          if f is not None:
            f.writelines(to_json(record) + '\n' for record in records)
            if shown is not None:
              print(*(record[shown] for record in records), sep='\n')
          logging.info('%d examples done', count)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise
  if writes and not count:
    partial.unlink()
  elif writes:
    partial.replace(path)
    told = f'{count} lines in {path}'
    print(told, file=sys.stdout if shown is None else sys.stderr)
  return count


def _own_prompt(
  named: Mapping[str, str] | None,
  default: str | None,
  where: str,
  record: Mapping[str, Any],
) -> dict[str, str]:
  """{'prompt': the row's prompt}, or {} if there are not several prompts."""
  if named is None:
    return {}
  name = record.get('prompt', default)
  if name is None:
    raise UserError(
      f'{where}: this row names no prompt; set DEFAULT_PROMPT to one of'
      f' {sorted(named)}, or write them into a .jsonl file:'
      ' {"inputs": "...", "prompt": "..."}'
    )
  if not isinstance(name, str) or name not in named:
    raise UserError(f'{where}: {unknown(str(name), named)}')
  return {'prompt': name}


def _stem(file: str) -> str:
  """'/data/rows.csv.gz' -> 'rows'; standard input -> 'stdin'."""
  if file == STDIN:
    return 'stdin'
  return epath.Path(file.removesuffix('.gz')).stem


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
  while chunk := list(itertools.islice(items, size)):
    yield chunk


if __name__ == '__main__':
  # The same as `ptune infer`; gin imports this module under its own name.
  from ptune import cli

  sys.argv.insert(1, 'infer')
  sys.exit(cli.main())
