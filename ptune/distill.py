"""`ptune distill`: replaces a long text by a trained prompt or prefix.

First it trains as `ptune train` does, with the loss `losses.distill`; with
tasks/made_up.gin, on inputs that the model makes up for the text. Then it
compares three models on a split that was not trained on: the base model with
the text, the base model with the trained prompt, and the base model alone. It
prints the result and writes it to MODEL_DIR/distilled.json.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ptune.data import batches, seqio_task
from ptune.errors import UserError
from ptune.host.files import write_atomically
from ptune.methods import prompt_init
from ptune.model import parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving import made_up as made_up_lib
from ptune.serving import trained_model
from ptune.training import losses, report, run_file, settings


def distill(
  *,
  train: Callable[[], Any],
  context: Sequence[int],
  model_dir: str,
  data: settings.Data,
  config: Config,
  method: Method,
  evaluation: settings.Evaluation = settings.Evaluation(),
  model_parallel: int = 1,
  made_up: made_up_lib.MadeUp | None = None,
) -> dict[str, Any]:
  """Trains, then compares the trained prompt with the text.

  Args:
    train: `train.train` with its settings.
    context: The token ids of the text, without EOS.
    model_dir, data, config, method, evaluation, model_parallel: See `train`.
    made_up: How the model makes up the inputs of the task `made_up.task`; None
      for a task that has inputs.

  Returns:
    The result of `compare`; {} if the training was stopped.

  Raises:
    ValueError: If the split to compare on does not exist or is too small.
  """
  split = evaluation.split
  task = seqio_task.load(data.task, data.module)
  if split is None or split not in seqio_task.splits(task):
    raise UserError(
      f'EVAL_SPLIT is {split!r}, and task {task.name!r} has the splits'
      f' {seqio_task.splits(task)}; name one of them. On its inputs, the models'
      ' with and without the text are compared'
    )
  if made_up is not None:
    made_up_lib.make(made_up, context, model_dir, data, config, model_parallel)
  inputs = held_out(task, data, config, split, evaluation.steps)
  state = train()
  run = run_file.run_directory(model_dir)
  if not report.scores_at(report.read_records(run), int(state.step)):
    return {}  # Stopped; the same command resumes.
  plan = parameters.plan(config, method, partitioning.make_mesh(model_parallel))
  params, _ = trained_model.load(plan, settings.Trained(model_dir=model_dir))
  length = data.feature_lengths['targets']
  found = compare(plan, params, context, inputs, length)
  if jax.process_index() == 0:
    text = json.dumps(found, indent=2) + '\n'
    write_atomically(run / 'distilled.json', text)
    print(describe(found))
  return found


def held_out(
  task: seqio_task.Provider,
  data: settings.Data,
  config: Config,
  split: str,
  steps: int | None,
) -> Iterator[np.ndarray]:
  """The inputs of a split, [batch, length]; drops an incomplete batch.

  Args:
    task: The task.
    data: Its lengths and batch size.
    config: The network's sizes and special tokens.
    split: The split.
    steps: The most batches; None for all.

  Raises:
    ValueError: If the split has fewer rows than a batch.
  """
  read = batches.Batches(
    task,
    data.feature_lengths,
    data.batch_size,
    split=split,
    bucket_multiple=None,
    use_cached=data.use_cached,
    in_memory=True,
    ids=config.ids,
    embedding_rows=config.vocab_size,
  )
  assert read.num_examples is not None
  whole = read.num_examples // data.batch_size
  if not whole:
    raise UserError(
      f'split {split!r} has {read.num_examples} rows, fewer than BATCH_SIZE'
      f' {data.batch_size}; lower BATCH_SIZE'
    )
  steps = min(whole, steps or whole)
  return (read(step)['encoder_input_tokens'] for step in range(steps))


def compare(
  plan: parameters.Plan,
  params: Mapping[str, Any],
  context: Sequence[int],
  inputs: Iterator[np.ndarray],
  max_decode_length: int,
) -> dict[str, Any]:
  """Compares the model with the text, with the trained prompt, and alone.

  Args:
    plan: The parameters.
    params: Their values.
    context: The token ids of the text.
    inputs: Batches of token ids [batch, length], all of one shape.
    max_decode_length: The most tokens of an answer.

  Returns:
    A dict with
      inputs: the number of inputs;
      tokens: the tokens that the encoder reads for the longest input, with the
        text and with the trained prompt;
      prefix: the keys and values that every attention reads beside these; 0
        unless the method is a prefix;
      same_answer: the share of inputs where the whole answer equals that of
        the model with the text, for the trained prompt and for the base alone;
      answers: the number of distinct answers of the model with the text;
      milliseconds: the time for one input, in batches of the given size: the
        median over all batches, without compilation.
  """
  student = EncoderDecoderModel(plan.network)
  base = EncoderDecoderModel(plan.network.clone(placements=()))

  def answer(model, context):
    def predict(params, tokens):
      tokens = losses.after_context(context, tokens)
      return model.predict(params, tokens, max_decode_length)[0]

    return jax.jit(predict, out_shardings=partitioning.replicated(plan.mesh))

  asked = {
    'text': answer(base, context),
    'trained': answer(student, ()),
    'base': answer(base, ()),
  }
  said: dict[str, list[np.ndarray]] = {name: [] for name in asked}
  seconds: dict[str, list[float]] = {name: [] for name in asked}
  shape = (0, 0)
  for number, tokens in enumerate(inputs):
    shape = tokens.shape
    for name, predict in asked.items():
      if not number:  # Compiles, which must not be timed.
        with plan.scope():
          predict(params, tokens).block_until_ready()
      start = time.perf_counter()
      with plan.scope():
        said[name].append(np.asarray(predict(params, tokens)))
      seconds[name].append(time.perf_counter() - start)
  answers = {name: np.concatenate(rows) for name, rows in said.items()}

  def same(name):
    return float(np.mean(np.all(answers[name] == answers['text'], axis=1)))

  def milliseconds(name):
    return 1000 * statistics.median(seconds[name]) / shape[0]

  encoded = jax.eval_shape(
    lambda p: plan.network.apply(
      student.variables(p),
      np.ones(shape, np.int32),  # Any tokens.
      enable_dropout=False,
      method='encode',
    ),
    params,
  )
  return {
    'inputs': len(answers['text']),
    'tokens': {
      'text': len(context) + shape[1],
      'trained': encoded.shape[1],
    },
    'prefix': max(
      (
        plan.params[path].shape[0]
        for path in plan.trainable
        if path.endswith(prompt_init.PREFIX)
      ),
      default=0,
    ),
    'same_answer': {name: same(name) for name in ('trained', 'base')},
    'answers': len(np.unique(answers['text'], axis=0)),
    'milliseconds': {name: milliseconds(name) for name in ('text', 'trained')},
  }


def describe(found: Mapping[str, Any]) -> str:
  """The result of `compare` as three lines of text."""
  tokens, same, time_of = (
    found[name] for name in ('tokens', 'same_answer', 'milliseconds')
  )
  beside = ''
  if found['prefix']:
    beside = f', and each attention {found["prefix"]} keys and values'
  return (
    f'the encoder reads {tokens["text"]} -> {tokens["trained"]} tokens of an'
    f' input{beside}\n'
    f'{time_of["text"]:.2f} -> {time_of["trained"]:.2f} ms a prediction\n'
    f'the answer is that with the text for {100 * same["trained"]:.1f} % of'
    f' {found["inputs"]} inputs ({100 * same["base"]:.1f} % without either;'
    f' {found["answers"]} different answers)'
  )


if __name__ == '__main__':
  # The same as `ptune distill`; gin imports this module under its own name.
  from ptune import cli

  sys.argv.insert(1, 'distill')
  sys.exit(cli.main())
