"""`ptune eval`: a task's metrics over whole splits, for a trained prompt."""

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from ptune.data import batches as data
from ptune.data import seqio_task
from ptune.errors import UserError, check_counts
from ptune.model import parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.model.sizes import T5Config
from ptune.serving import bank as bank_lib
from ptune.serving import ensemble, predictor
from ptune.serving.evaluation import Evaluation, Scores
from ptune.training import report as report_lib


def evaluate(
  *,
  mixture_or_task_name: str,
  task_feature_lengths: Mapping[str, int],
  config: T5Config,
  method: Method,
  model: Callable[..., EncoderDecoderModel] = EncoderDecoderModel,
  mixture_or_task_module: str | Sequence[str] | None = None,
  model_dir: str | None = None,
  checkpoint_path: str | None = None,
  prompt_file: str | None = None,
  prompts: str | Mapping[str, str] | None = None,
  output_dir: str | None = None,
  split: str = 'validation',
  batch_size: int = 32,
  eval_steps: int | None = None,
  decoding: Decoding = Decoding(),
  use_cached: bool = False,
  seed: int = 0,
  model_parallel: int = 1,
  bucket_multiple: int | None = data.BUCKET_MULTIPLE,
) -> Scores:
  """Evaluates a trained prompt, or any other trained parameters.

  Args:
    mixture_or_task_name: The task.
    task_feature_lengths: Longest inputs and targets, in tokens.
    config: The network's sizes.
    method: What was trained.
    model: The loss.
    mixture_or_task_module: Imported first; registers the task.
    model_dir: A run of `ptune train`.
    checkpoint_path: The base model.
    prompt_file: A prompt, where there is no model_dir.
    prompts: Several of the task in place of one, by name or as `bank.parse`
      reads them: evaluated each, and as an ensemble, in batches that hold every
      row once a prompt.
    output_dir: Where metrics.jsonl and predictions go; MODEL_DIR/eval_<split>
      if not given.
    split: The split to evaluate.
    batch_size: Rows that are computed at once; no score depends on it, but for
      rounding in bfloat16.
    eval_steps: Only so many batches; the whole split if not given.
    decoding: How predictions are made.
    use_cached: USE_CACHED_TASKS.
    seed: For sampling.
    model_parallel: Devices that one copy of the weights is split over.
    bucket_multiple: Inputs are padded to a multiple of it; None pads to
      task_feature_lengths.

  Returns:
    The scores, by task; of the ensemble, if there are several prompts.
  """
  check_counts(BATCH_SIZE=batch_size)
  check_counts(optional=True, EVAL_STEPS=eval_steps)
  task = seqio_task.load(mixture_or_task_name, mixture_or_task_module)
  seqio_task.check(task, task_feature_lengths, split, use_cached)
  seqio_task.check_vocabulary(task, config.vocab_size)
  if prompts is not None:
    named = predictor.named_prompts(prompts, method, model_dir, prompt_file)
    if ensemble.NAME in named:
      raise UserError(f'a prompt is named {ensemble.NAME!r}, as their vote is')
    method = bank_lib.METHOD
  plan = parameters.plan(config, method, partitioning.make_mesh(model_parallel))
  data.check_batch_size(batch_size, plan.mesh)
  if prompts is None:
    predictor.check(plan, model_dir, checkpoint_path, prompt_file)
  directory = predictor.output_directory(
    'EVAL_OUTPUT_DIR', output_dir, model_dir, f'eval_{split}'
  )
  evaluation = Evaluation(
    task,
    plan,
    model(plan.network),
    split=split,
    feature_lengths=task_feature_lengths,
    batch_size=batch_size,
    how=decoding,
    num_examples=eval_steps and eval_steps * batch_size,
    bucket_multiple=bucket_multiple,
    use_cached=use_cached,
    seed=seed,
    directory=directory,
  )
  if prompts is not None:
    bank = predictor.load_bank(
      config,
      checkpoint_path,
      task_feature_lengths['targets'],
      named,
      mesh=plan.mesh,
      model=model,
      how=decoding,
      seed=seed,
    )
    decode = seqio_task.vocabulary(task).decode
    tell = functools.partial(_tell, directory)
    return ensemble.report(evaluation, bank, decode, tell, directory)
  params, step = predictor.load(plan, model_dir, checkpoint_path, prompt_file)
  scores = evaluation((params,), step)
  for name, values in scores.items():
    _tell(directory, {'step': step, 'split': split, 'task': name}, values)
  return scores


def _tell(directory: epath.Path, about: dict[str, Any], values) -> None:
  """Writes scores to metrics.jsonl, and prints them."""
  if jax.process_index() == 0:
    with (directory / 'metrics.jsonl').open('a') as f:
      f.write(json.dumps({**about, **values}) + '\n')
    texts = [str(v) for k, v in about.items() if k != 'step']
    split, task, *which = texts
    title = ' '.join([task, split, *which])
    print(f'{title}: {report_lib.format_scores(values)}')


if __name__ == '__main__':
  # The same as `ptune eval`; gin imports this module under its own name.
  from ptune import cli

  sys.argv.insert(1, 'eval')
  sys.exit(cli.main())
