"""Losses other than the cross entropy; each works with every method.

Each function makes an objective for `EncoderDecoderModel.objective`. It is
called like `EncoderDecoderModel.loss`, with the model as the first argument. A
file of gin/losses/ selects it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptune.errors import UserError
from ptune.model.models import Batch, EncoderDecoderModel, Params, token_loss

Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def wayward(
  ids: Sequence[int],
  gamma: float = 0.01,
  path: str = 'encoder/prompt/prompt/prompt',
) -> Objective:
  """The cross entropy, plus a penalty that keeps the prompt close to a text.

  Khashabi et al. 2022, "Prompt Waywardness" (arXiv 2112.08348), section 3.3.
  With the prompt P [prompt, embed] and the text's embeddings E of the same
  shape, the loss of each target token is

      cross entropy + gamma / prompt * sum((P - E)^2)

  The penalty is per token, so that its weight depends neither on the batch size
  nor on MICROBATCHES. The gradient flows into P, not into E.

  Args:
    ids: The token ids of the text, without EOS.
    gamma: The weight of the penalty; 0 gives the cross entropy alone.
    path: The path of the parameter P.

  Returns:
    An objective.

  Raises:
    ValueError: When called, if there is no P, or if its length is not that of
      the text.
  """

  def objective(
    model: EncoderDecoderModel,
    params: Params,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
  ):
    prompt: Any = params
    for name in path.split('/'):
      prompt = prompt.get(name) if hasattr(prompt, 'get') else None
    if prompt is None:
      raise UserError(
        f'losses/wayward.gin pulls the parameter {path} towards a text, and the'
        ' method has no such parameter; choose methods/prompt.gin or a file of'
        ' prompts/'
      )
    if len(ids) != prompt.shape[0]:
      raise UserError(
        f'TARGET_TEXT has {len(ids)} pieces and the prompt {prompt.shape[0]}'
        f' rows; set PROMPT_LENGTH to {len(ids)}, or change the text'
      )
    table, rows = params['token_embedder'], np.asarray(ids)
    text = table['embedding'][rows].astype(jnp.float32)
    if 'embedding_scale' in table:  # int8 weights; see `frozen_weights.freeze`.
      text *= table['embedding_scale'][rows][:, None]
    text *= model.network.config.embedding_scale
    text = jax.lax.stop_gradient(text)
    distance = jnp.sum(jnp.square(prompt - text)) / prompt.shape[0]
    loss, sums = model.cross_entropy(params, batch, dropout_rng)
    loss = loss + gamma * distance * sums['tokens']
    return loss, sums | {'loss': loss}

  return objective


def distill(
  context: Sequence[int],
  task_feature_lengths: Mapping[str, int],
  answers: str = 'teacher',
) -> Objective:
  """Context distillation: the trained prompt replaces a long text.

  The teacher is the frozen model, which reads the context before each input.
  The student is the same model with a prompt (or other parameters of the
  method) instead of the context. With the teacher's distribution T over the
  vocabulary and the student's distribution S, the loss of each token of an
  answer is

      KL(T || S) = sum of T (log T - log S)

  (Snell, Klein and Zhong 2022, "Learning by Distilling Context", arXiv
  2209.15189; for a key/value prefix: Eyuboglu et al. 2025, "Cartridges", arXiv
  2506.06266). By default the teacher decodes the answers greedily in every
  step, so the task needs inputs only.

  Args:
    context: The token ids of the text, without EOS.
    task_feature_lengths: TASK_FEATURE_LENGTHS; its `targets` limits the length
      of an answer.
    answers: 'teacher', or 'targets' to use the task's targets.

  Returns:
    An objective. Its `correct` counts the tokens where student and teacher have
    the same most likely token, so the accuracy of an evaluation is their
    agreement.

  Raises:
    ValueError: If the context is empty or `answers` is unknown. When called, if
      the method adds nothing to the model, or rows are packed.
  """
  if answers not in ('teacher', 'targets'):
    raise UserError(
      f"answers is {answers!r}; it must be 'teacher' or 'targets'"
    )
  if not len(context):
    raise UserError('CONTEXT is empty; set it to the text to distill')
  length = task_feature_lengths['targets']

  def objective(
    model: EncoderDecoderModel,
    params: Params,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
  ):
    if not model.network.placements:
      raise UserError(
        'losses/distill.gin needs the frozen model beside the trained one, and'
        ' the method trains the model itself; choose methods/prompt.gin or'
        ' methods/prefix.gin'
      )
    if 'encoder_segment_ids' in batch:
      raise UserError(
        'losses/distill.gin reads the context before every row, which must hold'
        ' one example; turn packing off (PACK)'
      )
    plain = model.network.clone(placements=())
    teacher = dataclasses.replace(model, network=plain, objective=None)
    frozen = jax.lax.stop_gradient(params)
    ids = plain.config.ids
    long = after_context(context, batch['encoder_input_tokens'])
    targets = batch['decoder_target_tokens']
    real = jnp.any(batch['decoder_loss_weights'] > 0, axis=1)[:, None]
    if answers == 'teacher':
      targets, _ = teacher.predict(frozen, long, length)
      # After its EOS, an answer has only padding, which gets no weight.
      weights = (targets != ids.pad) & real
    else:
      weights = batch['decoder_loss_weights'] > 0
    weights = weights.astype(jnp.float32)
    before = ((0, 0), (1, 0))
    shifted = jnp.pad(targets, before, constant_values=ids.start)[:, :-1]
    batch = {
      **batch,
      'decoder_input_tokens': shifted,
      'decoder_target_tokens': targets,
    }
    said = teacher.logits(frozen, {**batch, 'encoder_input_tokens': long})
    logits = model.logits(params, batch, dropout_rng)
    wanted = jax.nn.log_softmax(said)
    apart = jnp.sum(
      jnp.exp(wanted) * (wanted - jax.nn.log_softmax(logits)), axis=-1
    )
    same = jnp.argmax(said, axis=-1) == jnp.argmax(logits, axis=-1)
    loss = jnp.sum(apart * weights)
    return loss, {
      'loss': loss,
      'z_loss': jnp.zeros_like(loss),
      'correct': jnp.sum(same * weights),
      'tokens': jnp.sum(weights),
    }

  return objective


def after_context(context: Sequence[int], tokens: jax.Array) -> jax.Array:
  """[batch, length] -> [batch, context + length]: the context, then the row."""
  first = jnp.asarray(context, tokens.dtype)[None]
  first = jnp.broadcast_to(first, (tokens.shape[0], first.shape[1]))
  return jnp.concatenate([first, tokens], axis=1)


def perceptron(
  targets: Sequence[Sequence[int]], margin: float = 0.0
) -> Objective:
  """A ranking loss: the right target against the best of the wrong ones.

  S(Y | X) is the sum of the log probabilities of the tokens of Y. For a row X
  with the right target Y, and the set C of all targets, the loss is

      max(0, margin + max over Y' in C except Y of S(Y' | X) - S(Y | X))

  With margin 0 this is the perceptron loss, otherwise a hinge loss. The source
  is the extension "perceptron" of the prompt-tuning code of Lester et al. 2021.

  Args:
    targets: The targets C as token ids, each with its EOS.
    margin: The score of the right target must be higher by this much.

  Returns:
    An objective, summed over rows; `correct` counts tokens.
  """
  length = max(map(len, targets))

  def objective(
    model: EncoderDecoderModel,
    params: Params,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
  ):
    if 'encoder_segment_ids' in batch:
      raise UserError(
        'losses/perceptron.gin scores every target with every row, which must'
        ' hold one example; turn packing off (PACK)'
      )
    network, variables = model.network, model.variables(params)
    dropout = {
      'enable_dropout': dropout_rng is not None,
      'rngs': None if dropout_rng is None else {'dropout': dropout_rng},
    }
    ids = network.config.ids
    candidates = np.array(
      [[*own, *[ids.pad] * (length - len(own))] for own in targets], np.int32
    )
    inputs = batch['encoder_input_tokens']
    encoded = network.apply(variables, inputs, method='encode', **dropout)

    def scores(targets, encoded, inputs):
      """The logits and log probabilities [n] of targets [n, length]."""
      before = ((0, 0), (1, 0))
      shifted = jnp.pad(targets, before, constant_values=ids.start)[:, :-1]
      logits = network.apply(
        variables, encoded, inputs, shifted, targets, method='decode', **dropout
      )
      losses, _ = token_loss(logits, targets, 0.0, 0.0)
      return logits, -jnp.sum(losses * (targets != ids.pad), axis=1)

    rows, classes = inputs.shape[0], len(candidates)
    right = batch['decoder_target_tokens']
    logits, right_score = scores(right, encoded, inputs)
    # Pair every row with every target: [rows * classes, ...].
    _, all_scores = scores(
      jnp.tile(candidates, (rows, 1)),
      jnp.repeat(encoded, classes, axis=0),
      jnp.repeat(inputs, classes, axis=0),
    )
    longest = max(right.shape[1], length)
    same = jnp.all(
      _padded(right, longest, ids.pad)[:, None]
      == _padded(candidates, longest, ids.pad)[None],
      axis=-1,
    )
    wrong = jnp.where(same, -jnp.inf, all_scores.reshape(rows, classes))
    weights = batch['decoder_loss_weights'].astype(jnp.float32)
    real = jnp.max(weights, axis=1)  # 0 in rows that only fill the batch.
    loss = jnp.maximum(margin + jnp.max(wrong, axis=1) - right_score, 0.0)
    loss = jnp.sum(loss * real)
    return loss, {
      'loss': loss,
      'z_loss': jnp.zeros_like(loss),
      'correct': jnp.sum((jnp.argmax(logits, axis=-1) == right) * weights),
      'tokens': jnp.sum(weights),
    }

  return objective


def _padded(tokens, length: int, pad: int) -> jax.Array:
  after = ((0, 0), (0, length - tokens.shape[1]))
  return jnp.pad(tokens, after, constant_values=pad)
