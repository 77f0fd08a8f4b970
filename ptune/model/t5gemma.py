"""The encoder and decoder layers of T5Gemma and T5Gemma 2.

T5Gemma (arXiv 2504.06225) is Gemma 2 as an encoder-decoder; T5Gemma 2 (arXiv
2512.14856) is Gemma 3. Unlike T5, they have

- rotary positions, and no position bias;
- fewer heads of keys and values than of queries;
- local layers, which see a window of positions, between global ones;
- a norm before and a norm after each sublayer, which store scale - 1;
- logits that tanh caps.

Sites and parameter names are those of `t5`. Embeddings are multiplied by
sqrt(embed). T5Gemma does so after the site `encoder/embed`, so a prompt is
multiplied too and has the scale of the embedding's rows. T5Gemma 2 does so in
the lookup, before the site, so a prompt is read as it is and has sqrt(embed)
times that scale. PEFT inserts prompts at the same places, so they are
interchangeable.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.model import cache, scan
from ptune.model.adapters import Placement, adapt
from ptune.model.layers import (
  Embed,
  LayerNorm,
  Mlp,
  constrain,
  embedding_init,
  residual_dropout,
  sublayer,
  times_root,
)
from ptune.model.masks import same_example
from ptune.model.t5gemma_attention import Attention, Rotary, rotary
from ptune.model.t5gemma_sizes import Stack, T5GemmaConfig


class ImageAwareEmbed(Embed):
  """The embedding of T5Gemma 2: rows times sqrt(embed).

  The token "end of image" has its own vector beside the table, which is not
  multiplied.
  """

  eoi_id: int = 0

  def setup(self):
    super().setup()
    self.eoi_embedding = partitioning.param_with_axes(
      'eoi_embedding',
      embedding_init,
      (self.features,),
      jnp.float32,
      axes=('embed',),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Looks up rows: [...] -> [..., embed]."""
    x = times_root(super().__call__(tokens))
    own = self.eoi_embedding.astype(x.dtype).reshape((1,) * tokens.ndim + (-1,))
    return jnp.where((tokens == self.eoi_id)[..., None], own, x)


def embedder(config: T5GemmaConfig, stack: Stack) -> Embed:
  """The token embedding of a stack."""
  dtype = jnp.dtype(config.dtype)
  if config.version == 1:
    return Embed(config.vocab_size, stack.emb_dim, dtype)
  return ImageAwareEmbed(config.vocab_size, stack.emb_dim, dtype, config.eoi_id)


class View(NamedTuple):
  """The positions that a kind of layer, global or local, attends to.

  Attributes:
    mask: Broadcasts to [batch, 1, q, k]; True where a query may attend.
    positions: Rotations of the queries and of their own keys.
  """

  mask: jax.Array
  positions: Rotary


def _view(is_global: jax.Array, views: tuple[View, View]) -> View:
  """The first view for a global layer, the second for a local one."""
  return jax.tree.map(lambda a, b: jnp.where(is_global, a, b), *views)


def _views(
  config: T5GemmaConfig,
  stack: Stack,
  mask: jax.Array,
  near: jax.Array,
  positions: jax.Array,
) -> tuple[View, View]:
  """The views of global and of local layers.

  Args:
    config: The sizes.
    stack: Those of the encoder or decoder.
    mask: Broadcasts to [batch, 1, q, k].
    near: [q, k] True within the window.
    positions: [rows, q] of the queries.
  """
  turned = functools.partial(rotary, positions, stack.head_dim)
  return (
    View(mask, turned(config.theta, config.rope_factor)),
    View(mask & near[None, None], turned(config.local_theta)),
  )


def _global_layers(config: T5GemmaConfig, stack: Stack) -> np.ndarray:
  """Which layers are global: [layers] bool."""
  return np.arange(1, stack.num_layers + 1) % config.window_pattern == 0


def near_both_ways(config: T5GemmaConfig, positions: jax.Array) -> jax.Array:
  """Which keys are in the window of an encoder's query: [length] -> [q, k].

  In version 1, the window is `window` positions on either side. In version 2,
  it is `window` positions in all, the query's own among them.
  """
  window = config.encoder.window
  before = positions[:, None] - positions[None, :]
  if config.version == 1:
    return jnp.abs(before) <= window
  return (before < (window + 1) // 2) & (-before < window // 2 + 1)


def encoder_layers(
  encoder: nn.Module,
  config: T5GemmaConfig,
  placements: tuple[Placement, ...],
  x: jax.Array,
  mask: jax.Array,
  *,
  enable_dropout: bool,
) -> jax.Array:
  """All layers of the encoder; see `t5.encoder_layers`."""
  del encoder  # Flax finds it by itself.
  stack = config.encoder
  positions = jnp.arange(x.shape[1])
  near = near_both_ways(config, positions)
  return scan.through_layers(
    functools.partial(EncoderLayer, config, placements),
    stack.num_layers,
    x,
    (_views(config, stack, mask, near, positions[None]),),
    each=(_global_layers(config, stack),),
    remat=config.remat,
    scans=config.scan,
    enable_dropout=enable_dropout,
  )


def decoder_layers(
  decoder: nn.Module,
  config: T5GemmaConfig,
  placements: tuple[Placement, ...],
  x: jax.Array,
  encoded: jax.Array,
  mask: jax.Array,
  encoder_mask: jax.Array,
  positions: cache.Positions,
  segment_ids: jax.Array | None,
  *,
  prefill: bool,
  enable_dropout: bool,
) -> jax.Array:
  """All layers of the decoder; see `t5.decoder_layers`.

  Packed examples count their positions from their own start, because queries,
  which are rotated, meet keys of the encoder, which are not.
  """
  stack = config.decoder
  cache.keep_length(decoder, positions)
  before = positions.queries[:, None] - positions.keys[None, :]  # [q, k]
  rotated = positions.queries[None]
  if segment_ids is not None:
    own = same_example(segment_ids, segment_ids)
    rotated = rotated - jnp.argmax(own[:, 0], axis=-1)
  return scan.through_layers(
    functools.partial(DecoderLayer, config, placements),
    stack.num_layers,
    x,
    (
      encoded,
      encoder_mask,
      _views(config, stack, mask, before < stack.window, rotated),
    ),
    each=(_global_layers(config, stack),),
    remat=config.remat and positions.cache_index is None,
    scans=config.scan,
    cache_index=positions.cache_index,
    prefill=prefill,
    enable_dropout=enable_dropout,
  )


class EncoderLayer(nn.Module):
  """Self-attention and MLP. The sites are those of `t5.EncoderLayer`."""

  config: T5GemmaConfig
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(self, x, views, is_global, *, enable_dropout: bool = False):
    """[batch, length, embed] -> the same shape."""
    cfg, place = self.config, self.placements
    mask, positions = _view(is_global, views)
    add = functools.partial(_sublayer, self, cfg, place, enable_dropout)

    def attention(h):
      module = Attention(cfg, cfg.encoder, place, name='attention')
      return module(h, h, mask, positions, enable_dropout=enable_dropout)

    x = adapt(self, place, 'input', x, x)
    x = add('attention', attention, x)
    x = add('mlp', _mlp(cfg, place, cfg.encoder, enable_dropout), x)
    return constrain(x, 'batch', 'length', 'embed')


class DecoderLayer(nn.Module):
  """Self-attention, attention to the encoder and MLP.

  In version 2, self-attention attends to the encoder too, and there is no
  second attention. The sites are those of `t5.DecoderLayer`.
  """

  config: T5GemmaConfig
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(
    self,
    x,
    encoded,
    encoder_mask,
    views,
    is_global,
    *,
    cache_index=None,
    prefill: bool = False,
    enable_dropout: bool = False,
  ):
    """[batch, length, embed] -> the same shape."""
    cfg, place = self.config, self.placements
    mask, positions = _view(is_global, views)
    add = functools.partial(_sublayer, self, cfg, place, enable_dropout)

    def self_attention(h):
      return Attention(cfg, cfg.decoder, place, name='self_attention')(
        h,
        h,
        mask,
        positions,
        context=(encoded, encoder_mask) if cfg.version == 2 else None,
        cache_index=cache_index,
        prefill=prefill,
        enable_dropout=enable_dropout,
      )

    def cross_attention(h):
      name = 'encoder_decoder_attention'
      module = Attention(cfg, cfg.decoder, place, name=name)
      return module(h, encoded, encoder_mask, enable_dropout=enable_dropout)

    x = adapt(self, place, 'input', x, x)
    x = add('self_attention', self_attention, x)
    if cfg.version == 1:
      x = add(
        'encoder_decoder_attention', cross_attention, x, norm='cross_attention'
      )
    x = add('mlp', _mlp(cfg, place, cfg.decoder, enable_dropout), x)
    return constrain(x, 'batch', 'length', 'embed')


def _sublayer(
  layer: nn.Module,
  config: T5GemmaConfig,
  placements: tuple[Placement, ...],
  enable_dropout: bool,
  site: str,
  compute: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  norm: str | None = None,
) -> jax.Array:
  """`layers.sublayer` with a second norm, after the attention or MLP."""
  post = LayerNorm(
    jnp.dtype(config.dtype),
    offset=config.norm_offset,
    name=f'post_{norm or site}_layer_norm',
  )
  return sublayer(
    layer,
    config,
    placements,
    site,
    lambda h: post(compute(h)),
    x,
    residual_dropout(config, enable_dropout),
    norm,
  )


def _mlp(
  config: T5GemmaConfig,
  placements: tuple[Placement, ...],
  stack: Stack,
  enable_dropout: bool,
) -> Callable[[jax.Array], jax.Array]:
  mlp = Mlp(
    stack.mlp_dim,
    ('gelu', 'linear'),
    jnp.dtype(config.dtype),
    config.dropout_rate,
    placements,
    name='mlp',
  )
  return functools.partial(mlp, enable_dropout=enable_dropout)
