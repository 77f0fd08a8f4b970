"""LongT5's encoder attention: blocks of positions, and sums of blocks.

A position attends to those at most `local_radius` away. Blocks of
`local_radius + 1` positions attend to themselves and to both neighbours, so
that memory grows with the length and not with its square.

Transient-global attention adds keys that every position sees: the sums of all
blocks of `global_block_size` positions, through a norm of their own. They have
a relative bias of their own too, by the distance in such blocks. What is left
over at the end of a row belongs to its last whole block.

    positions  p p p a b c d . .      global_block_size 3, p: the prompt
    block      0 0 0 1 1 1 1 - -

Source: LongT5 (arXiv 2112.07916), section 3. Parameters have the names of T5X
checkpoints.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ptune.errors import UserError
from ptune.model.adapters import adapt
from ptune.model.attention import Attention, project_out, relative_bias
from ptune.model.layers import LayerNorm, pad_to, product
from ptune.model.sizes import T5Config


class Sums(NamedTuple):
  """The sums of blocks that an encoder's positions attend to.

  Attributes:
    members: [batch, length, sums] bool, the positions that are added up.
    seen: [batch, sums] bool, which of them there are in a row.
    bias: [batch, heads, length, sums] float32, added to the logits.
  """

  members: jax.Array
  seen: jax.Array
  bias: jax.Array


class Bias(NamedTuple):
  """What the layers of an encoder share.

  Attributes:
    local: [1, heads, block, 3 * block] float32: of a block's positions to their
      own block, between its two neighbours.
    sums: With transient-global attention.
  """

  local: jax.Array
  sums: Sums | None


def bias(config: T5Config, mask: jax.Array) -> Bias:
  """The position biases of an encoder; to be called in its compact method.

  Args:
    config: Its sizes.
    mask: Which positions are seen, broadcasts to [batch, heads, q, k].

  Raises:
    ValueError: With transient-global attention, if not all positions see the
      same ones: the sums are of a whole row.
  """
  block = config.local_radius + 1
  made = relative_bias(config, bidirectional=True)
  # [1, heads, 3 * block, 3 * block] -> the rows of the block in the middle.
  local = made(3 * block)[:, :, block : 2 * block]
  if not config.global_block_size:
    return Bias(local, None)
  if mask.shape[1:3] != (1, 1):
    raise UserError(
      "LongT5's transient-global attention adds up blocks of a whole row, so"
      ' all positions of a row must see the same ones: examples cannot be'
      ' packed (set PACK = False), and a prompt cannot be causal'
    )
  members, seen, number = _blocks(mask[:, 0, 0], config.global_block_size)
  side = relative_bias(config, bidirectional=True, name='side_relpos_bias')
  sums = members.shape[-1]
  # [heads, blocks, sums] -> [heads, batch, length, sums]
  table = side(max(sums, 1))[0, :, :, :sums]
  by_position = jnp.take(table, number, axis=1)
  return Bias(local, Sums(members, seen, jnp.moveaxis(by_position, 0, 1)))


def _blocks(
  real: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Which block of a row each position belongs to.

  Blocks are counted from the first position that is seen: in a batch of prompts
  of several lengths, the shorter ones stand behind padding.

  Args:
    real: [batch, length] bool.
    size: Positions of a block.

  Returns:
    `Sums.members`, `Sums.seen`, and the number of each position's block, int32
    [batch, length].
  """
  length = real.shape[1]
  first = jnp.argmax(real, axis=1).astype(jnp.int32)
  place = jnp.arange(length, dtype=jnp.int32)[None, :] - first[:, None]
  ends = real & (place % size == size - 1)
  whole = jnp.sum(ends, axis=1, dtype=jnp.int32)
  number = jnp.minimum(place // size, whole[:, None] - 1)
  numbers = jnp.arange(length // size, dtype=jnp.int32)
  members = real[..., None] & (number[..., None] == numbers[None, None, :])
  seen = numbers[None, :] < whole[:, None]
  return members, seen, jnp.maximum(number, 0)


class LongAttention(Attention):
  """Self-attention in blocks; sites and parameters are those of `Attention`.

  At its sites, what is attended to is [positions, sums of blocks]. What
  adapters put before the keys is seen from everywhere.

  Attributes:
    radius: How far away a position sees.
  """

  radius: int = 127

  @nn.compact
  def __call__(
    self,
    inputs_q: jax.Array,
    inputs_kv: jax.Array,
    mask: jax.Array,
    bias: Bias,
    *,
    enable_dropout: bool = False,
  ) -> jax.Array:
    """Attends from each position to those nearby, and to the sums of blocks.

    Args:
      inputs_q: [batch, length, embed].
      inputs_kv: The same.
      mask: Broadcasts to [batch, 1, length, length]; True where a position may
        look, if it is near.
      bias: From `bias`.
      enable_dropout: Whether attention weights are dropped.

    Returns:
      [batch, length, embed].
    """
    length, embed = inputs_q.shape[1:]
    x, sums = inputs_kv, bias.sums
    if sums is not None:
      # [batch, length, embed] -> [batch, sums, embed]
      added = product('btd,btg->bgd', x, sums.members.astype(x.dtype))
      added = LayerNorm(self.dtype, name='T5LayerNorm_0')(added)
      x = jnp.concatenate([x, added], axis=1)
    q = self._project('query', inputs_q)
    k = self._project('key', x)
    v = self._project('value', x)
    k = adapt(self, self.placements, 'keys', x, k)
    v = adapt(self, self.placements, 'values', x, v)
    kept = self._kept(v, enable_dropout)
    if kept is not None:  # Rather than the weight of a key, its value.
      v = v * kept.swapaxes(1, 2)
    front = k.shape[1] - x.shape[1]
    y = self._in_blocks(q, k, v, mask, bias, front)
    return project_out(self, self.placements, y[:, :length], embed, self.dtype)

  def _in_blocks(self, q, k, v, mask, bias, front):
    """[b, q, h, d], [b, front + q + sums, h, d] -> [b, at least q, h, d]."""
    rows, length, heads = q.shape[:3]
    block = self.radius + 1
    blocks = -(-length // block)

    def split(x):
      """[b, q, ...] -> [b, blocks, block, ...]."""
      x = pad_to(x, 1, blocks * block)
      return x.reshape(x.shape[0], blocks, block, *x.shape[2:])

    def with_neighbours(x):
      """[b, q, ...] -> [b, blocks, 3 * block, ...]."""
      x = split(x)
      x = jnp.pad(x, [(0, 0), (1, 1)] + [(0, 0)] * (x.ndim - 2))
      return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)

    def everywhere(x):
      """The keys that all blocks see: [b, front + sums, h, d]."""
      return jnp.concatenate([x[:, :front], x[:, front + length :]], axis=1)

    near = [with_neighbours(x[:, front : front + length]) for x in (k, v)]
    far = [everywhere(x) for x in (k, v)]
    q = split(q)
    logits = jnp.concatenate(
      [
        product('bnkhd,bnqhd->bnhqk', near[0], q) + bias.local[:, None],
        product('bshd,bnqhd->bnhqs', far[0], q)
        + self._far_bias(bias, front, split),
      ],
      axis=-1,
    )
    seen = jnp.concatenate(
      [
        self._near_mask(mask, blocks, with_neighbours),
        self._far_mask(bias, front, rows, blocks),
      ],
      axis=-1,
    )
    # [b, n, h, q, keys], [b, n, h, q, 1]
    weights, total = self._weights(logits, seen, None)
    y = product('bnhqk,bnkhd->bnqhd', weights[..., : 3 * block], near[1])
    y += product('bnhqs,bshd->bnqhd', weights[..., 3 * block :], far[1])
    y = (y / total.swapaxes(2, 3)).astype(self.dtype)
    return y.reshape(rows, blocks * block, heads, -1)

  def _near_mask(self, mask, blocks, with_neighbours):
    """[b or 1, 1, q or 1, k] -> [b or 1, blocks, 1, block, 3 * block]."""
    block = self.radius + 1
    place = jnp.arange(3 * block)[None, :] - block - jnp.arange(block)[:, None]
    near = (jnp.abs(place) <= self.radius)[None, None, None]
    # [b, 1, q, k] -> [b, k, q] -> [b, blocks, 3 * block, q]
    mask = with_neighbours(mask[:, 0].swapaxes(1, 2))
    if mask.shape[-1] == 1:
      return mask.swapaxes(2, 3)[:, :, None] & near
    # Each block's own queries.
    mask = pad_to(mask, 3, blocks * block)
    mask = mask.reshape(*mask.shape[:3], blocks, block)
    own = jnp.arange(blocks)[None, :, None, None, None]
    mask = jnp.take_along_axis(mask, own, axis=3)[:, :, :, 0]
    return mask.swapaxes(2, 3)[:, :, None] & near

  def _far_mask(self, bias, front, rows, blocks):
    """[b, blocks, 1, block, front + sums]: all, but sums of padding."""
    seen = jnp.ones((rows, front), bool)
    if bias.sums is not None:
      seen = jnp.concatenate([seen, bias.sums.seen], axis=1)
    shape = (rows, blocks, 1, self.radius + 1, seen.shape[1])
    return jnp.broadcast_to(seen[:, None, None, None], shape)

  def _far_bias(self, bias, front, split):
    """Broadcasts to [b, blocks, h, block, front + sums]."""
    if bias.sums is None:
      return jnp.zeros((1,) * 4 + (front,))
    # [b, h, q, sums] -> [b, blocks, block, h, sums]
    x = split(bias.sums.bias.swapaxes(1, 2)).swapaxes(2, 3)
    return jnp.pad(x, [(0, 0)] * 4 + [(front, 0)])
