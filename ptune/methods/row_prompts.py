"""Batches whose rows have prompts of their own, as a bank of prompts asks them.

Shorter prompts are padded on the left, so that a row reads [padding; P; X] and
distances are those of [P; X]; the padding is hidden from all that is read.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from ptune.model.adapters import Placement

# The parameters of `per_row`.
ROWS = 'encoder/row_prompts/prompts'
LENGTHS = ('encoder/row_lengths/lengths', 'decoder/row_lengths/lengths')


class RowPrompts(nn.Module):
  """Puts before the tokens of every row a prompt of its own.

  The parameter is float32 [batch, prompt, embed], of any prompt length.
  """

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, length, embed] -> [batch, prompt + length, embed]."""
    del x
    rows, _, embed = y.shape
    prompts = partitioning.param_with_axes(
      'prompts',
      nn.initializers.zeros,
      (rows, _given(self, 'prompts', 1, axis=1), embed),
      jnp.float32,
      axes=('batch', 'prompt', 'prompt_embed'),
    )
    return jnp.concatenate([prompts.astype(y.dtype), y], axis=1)


class RowLengths(nn.Module):
  """Hides the padding before prompts that are shorter than others.

  The parameter, int32 [batch], is how long each row's prompt is.
  """

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """Masks the first positions of the encoder.

    Args:
      x: [batch, length] the encoder's tokens; [batch * beams, length] in the
        decoder of a beam search.
      y: Which positions are seen, [batch, heads, q, k] or what broadcasts to
        it; k is prompt + length.

    Returns:
      The same, [batch, heads, q, k] or what broadcasts to it.
    """
    rows = _given(self, 'lengths', x.shape[0], axis=0)
    lengths = partitioning.param_with_axes(
      'lengths', nn.initializers.ones, (rows,), jnp.int32, axes=('batch',)
    )
    lengths = jnp.repeat(lengths, x.shape[0] // rows)  # For every beam.
    longest = y.shape[-1] - x.shape[1]
    shown = jnp.arange(y.shape[-1])[None, :] >= (longest - lengths)[:, None]
    return y & shown[:, None, None, :]


def _given(module: nn.Module, name: str, default: int, axis: int) -> int:
  """The size of a parameter that says its own."""
  if not module.has_variable('params', name):
    return default
  return module.get_variable('params', name).shape[axis]


def per_row() -> tuple[Placement, ...]:
  """The adapters with which every row of a batch has a prompt of its own.

  Their parameters, see `row_parameters`, are made for each batch.
  """
  return (
    Placement('encoder/embed', 'row_prompts', RowPrompts),
    Placement('encoder/mask', 'row_lengths', RowLengths),
    Placement('decoder/encoder_mask', 'row_lengths', RowLengths),
  )


def row_parameters(
  prompts: jax.Array, lengths: jax.Array
) -> dict[str, jax.Array]:
  """The parameters of `per_row`, by path.

  Args:
    prompts: [batch, prompt, embed] float32; those shorter than the longest
      stand at its end.
    lengths: [batch] int32, how long they are.
  """
  return {ROWS: prompts, **dict.fromkeys(LENGTHS, lengths)}
