"""`ptune eval`: computes a task's metrics on a split for a trained prompt."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from ptune.data import device_feed, seqio_task
from ptune.errors import UserError
from ptune.model import parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving import bank as bank_lib
from ptune.serving import classes, ensemble, trained_model
from ptune.serving.evaluation import Scores, evaluation_of
from ptune.training import report as report_lib
from ptune.training import settings


def evaluate(
  *,
  data: settings.Data,
  config: Config,
  method: Method,
  trained: settings.Trained,
  evaluation: settings.Evaluation = settings.Evaluation(),
  model: Callable[..., EncoderDecoderModel] = EncoderDecoderModel,
  output_dir: str | None = None,
  seed: int = 0,
  model_parallel: int = 1,
) -> Scores:
  """Evaluates a trained prompt, or any other trained parameters.

  Args:
    data: The task and its batches. The batch size does not change any score,
      except by rounding in bfloat16.
    config: The network's sizes.
    method: The method that was trained.
    trained: The trained model. Several prompts are evaluated one by one and as
      an ensemble; they must be for the same task. A batch then holds every row
      once for each prompt.
    evaluation: The split, and how to decode predictions.
    model: Makes the loss of a network.
    output_dir: The directory for metrics.jsonl and predictions; None for
      MODEL_DIR/eval_<split>.
    seed: For sampling.
    model_parallel: The number of devices that share one copy of the weights.

  Returns:
    The scores by task: those of the ensemble if there are several prompts.
  """
  settings.check(data, evaluation)
  split, prompts = evaluation.split, trained.prompts
  if split is None:
    raise UserError('EVAL_SPLIT is None; name the split to evaluate')
  task = seqio_task.load(data.task, data.module)
  seqio_task.check(task, data.feature_lengths, split, data.use_cached)
  seqio_task.check_vocabulary(
    task, config.vocab_size, config.ids, trained_model.base_of(trained)
  )
  if prompts is not None:
    named = trained_model.named_prompts(trained, method)
    if ensemble.NAME in named:
      raise UserError(
        f'a prompt is named {ensemble.NAME!r}, which is the name of their vote;'
        ' give it another name'
      )
    method = bank_lib.METHOD
  plan = parameters.plan(config, method, partitioning.make_mesh(model_parallel))
  at_once = evaluation.batch_size or data.batch_size
  device_feed.check_batch_size(at_once, plan.mesh)
  if prompts is None:
    trained_model.check(plan, trained)
  directory = trained_model.output_directory(
    'EVAL_OUTPUT_DIR', output_dir, trained.model_dir, f'eval_{split}'
  )
  evaluate_all = evaluation_of(
    task, plan, model(plan.network), data, evaluation, seed, directory
  )
  if prompts is not None:
    bank = trained_model.load_bank(
      config,
      trained.checkpoint_path,
      data.feature_lengths['targets'],
      named,
      mesh=plan.mesh,
      model=model,
      decoding=evaluation.decoding,
      seed=seed,
    )
    decode = seqio_task.vocabulary(task).decode
    tell = functools.partial(_tell, directory)
    return ensemble.report(evaluate_all, bank, decode, tell, directory)
  params, step = trained_model.load(plan, trained)
  scores = evaluate_all((params,), step)
  for name, values in scores.items():
    _tell(directory, {'step': step, 'split': split, 'task': name}, values)
    told = classes.text(directory / name, step)
    if told and jax.process_index() == 0:
      print(told)
  return scores


def _tell(directory: epath.Path, about: dict[str, Any], values) -> None:
  """Writes scores to metrics.jsonl and prints them."""
  if jax.process_index() == 0:
    with (directory / 'metrics.jsonl').open('a') as f:
      f.write(report_lib.to_json({**about, **values}) + '\n')
    texts = [str(v) for k, v in about.items() if k != 'step']
    split, task, *which = texts
    title = ' '.join([task, split, *which])
    print(f'{title}: {report_lib.format_scores(values)}')


if __name__ == '__main__':
  # The same as `ptune eval`; gin imports this module under its own name.
  from ptune import cli

  sys.argv.insert(1, 'eval')
  sys.exit(cli.main())
