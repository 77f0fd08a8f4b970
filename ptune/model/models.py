"""A network with its loss: training, scoring targets, predicting."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ptune.errors import UserError
from ptune.model import decoding as decoding_lib
from ptune.model import scan
from ptune.model.network import Transformer

Params = Mapping[str, Any]
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Decoding:
  """Settings of decoding: greedy, sampling or beam search.

  Attributes:
    num_beams: Beams of a beam search; 1 decodes greedily or samples.
    alpha: Strength of the length penalty in beam search.
    temperature: 0 takes the most probable token; more samples.
    top_k: Sample from the k most probable tokens; 0 from all.
    top_p: Sample from the most probable tokens with this total probability; 0
      from all.
  """

  num_beams: int = 1
  alpha: float = 0.6
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 0.0

  def __post_init__(self):
    if self.num_beams < 1:
      raise UserError(f'num_beams is {self.num_beams}; it must be at least 1')
    decoding_lib.check_sampling(self.temperature, self.top_k, self.top_p)
    if self.num_beams > 1 and self.temperature:
      raise UserError(
        f'num_beams is {self.num_beams} and temperature {self.temperature}:'
        ' beam search does not sample; set one of the two'
      )


@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel:
  """A network with its loss, as T5 is trained.

  Attributes:
    network: The Flax module.
    z_loss: Coefficient of log(Z)^2, which keeps the logits from drifting.
    label_smoothing: Probability that is spread over the wrong tokens.
    loss_normalizing_factor: Divides the summed loss: None (nothing), a number,
      or 'NUM_REAL_TARGET_TOKENS'.
    objective: Replaces the cross entropy, one of `losses`; called with the
      model and then the arguments of `loss`.
  """

  network: Transformer
  z_loss: float = 1e-4
  label_smoothing: float = 0.0
  loss_normalizing_factor: float | str | None = None
  objective: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None

  def __post_init__(self):
    if not 0 <= self.label_smoothing < 1:
      raise UserError(
        f'label_smoothing is {self.label_smoothing}; it must be in [0, 1)'
      )

  def variables(self, params: Params) -> dict[str, Params]:
    """The variables of `network.apply`, from the network's parameters."""
    return {
      'params': scan.stacked(params) if self.network.config.scan else params
    }

  def logits(
    self,
    params: Params,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    """Logits [batch, length, vocab], with dropout if an rng is given."""
    return self.network.apply(
      self.variables(params),
      batch['encoder_input_tokens'],
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      encoder_segment_ids=batch.get('encoder_segment_ids'),
      decoder_segment_ids=batch.get('decoder_segment_ids'),
      enable_dropout=dropout_rng is not None,
      rngs=None if dropout_rng is None else {'dropout': dropout_rng},
    )

  def loss(
    self,
    params: Params,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch, summed over target tokens.

    It is the cross entropy unless there is another `objective`.

    Args:
      params: Parameters of the network.
      batch: The features of `seqio.EncDecFeatureConverter`.
      dropout_rng: Turns dropout on.

    Returns:
      The loss, and sums that can be added over batches: `loss` (z-loss
      included), `z_loss`, `correct` and `tokens`.
    """
    objective = self.objective or EncoderDecoderModel.cross_entropy
    return objective(self, params, batch, dropout_rng)

  def cross_entropy(
    self,
    params: Params,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The cross entropy; arguments and results as in `loss`."""
    logits = self.logits(params, batch, dropout_rng)
    targets = batch['decoder_target_tokens']
    weights = batch['decoder_loss_weights'].astype(jnp.float32)
    cross_entropy, z_loss = token_loss(
      logits, targets, self.z_loss, self.label_smoothing
    )
    right = jnp.argmax(logits, axis=-1) == targets
    loss = jnp.sum((cross_entropy + z_loss) * weights)
    return loss, {
      'loss': loss,
      'z_loss': jnp.sum(z_loss * weights),
      'correct': jnp.sum(right * weights),
      'tokens': jnp.sum(weights),
    }

  def normalizer(self, batch: Batch) -> jax.Array | float | None:
    """The number that divides the summed loss of a batch; None for none."""
    if self.loss_normalizing_factor == 'NUM_REAL_TARGET_TOKENS':
      tokens = jnp.sum(batch['decoder_loss_weights']).astype(jnp.float32)
      # A batch of padding has a loss of 0, not 0 / 0.
      return jnp.maximum(tokens, 1.0)
    if isinstance(self.loss_normalizing_factor, str):
      raise UserError(
        f'loss_normalizing_factor is {self.loss_normalizing_factor!r}; it'
        " must be None, a number or 'NUM_REAL_TARGET_TOKENS'"
      )
    return self.loss_normalizing_factor

  def score(self, params: Params, batch: Batch) -> jax.Array:
    """Log probability of each row's targets, summed: [batch] float32."""
    cross_entropy, _ = token_loss(
      self.logits(params, batch), batch['decoder_target_tokens'], 0.0, 0.0
    )
    return -jnp.sum(cross_entropy * batch['decoder_loss_weights'], axis=-1)

  def predict(
    self,
    params: Params,
    encoder_input_tokens: jax.Array,
    max_decode_length: int,
    decoding: Decoding = Decoding(),
    rng: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Decodes the model's answer to each row.

    Args:
      params: Parameters of the network.
      encoder_input_tokens: [batch, length] int32.
      max_decode_length: Most tokens of an answer, its EOS included.
      decoding: Settings of decoding; greedy if not given.
      rng: To sample, a key, or one key for each row.

    Returns:
      Tokens [batch, max_decode_length] int32, padded after EOS, and the score
      [batch]: summed log probability, in beam search with the length penalty.
    """
    variables = self.variables(params)
    encoded = self.network.apply(
      variables,
      encoder_input_tokens,
      enable_dropout=False,
      method='encode',
    )
    rows = encoder_input_tokens.shape[0]
    special = self.network.config.ids
    ids = {
      'eos_id': special.eos,
      'also_ends': special.also_ends,
      'start_id': special.start,
      'pad_id': special.pad,
    }

    def decode(tokens, cache):
      beams = tokens.shape[0] // rows
      return self.network.apply(
        variables | cache,
        jnp.repeat(encoded, beams, axis=0),
        jnp.repeat(encoder_input_tokens, beams, axis=0),
        tokens,
        tokens,
        enable_dropout=False,
        decode=True,
        mutable=['cache'],
        method='decode',
      )

    # The first call makes the cache. XLA removes its unused logits.
    whole = jnp.ones((rows, max_decode_length), jnp.int32)
    _, cache = decode(whole, {})
    if decoding.num_beams > 1:
      tokens, scores = decoding_lib.beam_search(
        decode,
        cache,
        rows,
        max_decode_length,
        num_beams=decoding.num_beams,
        alpha=decoding.alpha,
        **ids,
      )
      return tokens[:, -1], scores[:, -1]
    return decoding_lib.sample(
      decode,
      cache,
      rows,
      max_decode_length,
      rng=rng,
      temperature=decoding.temperature,
      top_k=decoding.top_k,
      top_p=decoding.top_p,
      **ids,
    )


def token_loss(
  logits: jax.Array,
  targets: jax.Array,
  z_loss: float,
  label_smoothing: float,
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy and z-loss of every target token.

  As in T5, label smoothing subtracts the entropy of the smoothed label, so a
  perfect prediction has a loss of 0.

  Args:
    logits: [batch, length, vocab] float32.
    targets: [batch, length] int32.
    z_loss: Coefficient of log(Z)^2.
    label_smoothing: Probability that is spread over the wrong tokens.

  Returns:
    Two arrays [batch, length] float32.
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)
  label = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  cross_entropy = log_z - label
  if label_smoothing:
    others = logits.shape[-1] - 1
    right, wrong = 1.0 - label_smoothing, label_smoothing / others
    entropy = -right * jnp.log(right) - label_smoothing * jnp.log(wrong)
    mean_loss = (others + 1) * log_z - jnp.sum(
      logits, axis=-1
    )  # Summed over all labels.
    cross_entropy = (right - wrong) * cross_entropy + wrong * mean_loss
    cross_entropy = cross_entropy - entropy
  return cross_entropy, z_loss * jnp.square(log_z)
