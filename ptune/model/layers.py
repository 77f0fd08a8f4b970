"""The layers below attention: dense, norm, embedding, MLP, sublayer.

Parameters have the names and logical axes of T5X checkpoints. Layers compute in
`dtype`, but norms, activations, softmax and logits always in float32.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning
from jax import lax

from ptune.model import fused, tpu, tpu_sublayer
from ptune.model.activations import ACTIVATIONS, precisely
from ptune.model.adapters import Placement, adapt, matches
from ptune.model.config import ModelConfig

Initializer = Callable[..., jax.Array]

# Positions in a tile of bfloat16, by platform.
TILES = {'tpu': 16}


def traced_once(init: Initializer) -> Initializer:
  """The same initialiser, but its trace is kept for each shape and type.

  Flax traces it for the shape of every parameter, whenever a network is traced.
  """
  return jax.jit(init, static_argnums=(1, 2))


kernel_init = traced_once(
  nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')
)
embedding_init = traced_once(nn.initializers.normal(stddev=1.0))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Shards an activation by its logical axes, if axis rules are in force."""
  return nn.with_logical_constraint(x, axes)


def fill_tiles(length: int, multiple: int | None) -> int:
  """Rounds a length up so that it fills the tiles of the device.

  A TPU computes whole tiles of positions. According to its compiler, 612
  positions (512 tokens and a prompt of 100) take longer than 624, because XLA
  moves arrays of 612 to other layouts and back.

  Args:
    length: Positions, the prompt included.
    multiple: Round up to a multiple of this; None uses the tile of the device.
  """
  if multiple is None:
    multiple = TILES.get(tpu.platform(), 1)
  return tpu.up(length, multiple)


def pad_to(x: jax.Array, axis: int, length: int) -> jax.Array:
  """Appends zeros (or False) along an axis until it has `length` entries."""
  more = [(0, 0)] * x.ndim
  more[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, more) if length > x.shape[axis] else x


def cap(logits: jax.Array, limit: float | None) -> jax.Array:
  """Bends logits smoothly so that they stay within (-limit, limit)."""
  return logits if limit is None else limit * jnp.tanh(logits / limit)


def times_root(x: jax.Array) -> jax.Array:
  """x [..., embed] times sqrt(embed), which is rounded to the type of x."""
  return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)


def residual_dropout(config: ModelConfig, enable_dropout: bool) -> nn.Dropout:
  """Dropout of [batch, length, embed], one draw for all positions of a row."""
  return nn.Dropout(
    config.dropout_rate,
    broadcast_dims=(-2,),
    deterministic=not enable_dropout,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """An einsum of two arrays that keeps their type in both passes.

  It sums in float32. JAX's own derivative multiplies the float32 cotangent with
  a bfloat16 operand; no hardware has a unit for that, so XLA converts both to
  float32. Here the cotangent is rounded to the operands' type instead. With
  float32 operands nothing changes.

  XLA removes the cotangent of a frozen operand, because nothing reads it.

  Args:
    spec: As for einsum, such as 'bti,io->bto'. Each letter must be in at least
      two of the three terms.
    a: An array.
    b: An array of the same type.

  Returns:
    The product, float32.
  """
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _product_forward(spec, a, b):
  return product(spec, a, b), (a, b)


def _product_backward(spec, operands, cotangent):
  a, b = operands
  terms, out = spec.split('->')
  left, right = terms.split(',')
  cotangent = cotangent.astype(a.dtype)
  da = product(f'{out},{right}->{left}', cotangent, b)
  db = product(f'{left},{out}->{right}', a, cotangent)
  return da.astype(a.dtype), db.astype(b.dtype)


product.defvjp(_product_forward, _product_backward)


def scale_of(module: nn.Module, name: str) -> jax.Array | None:
  """The scales [features] of an int8 parameter; see `frozen_weights`."""
  name = f'{name}_scale'
  if module.has_variable('params', name):
    return module.get_variable('params', name)
  return None


def project(
  x: jax.Array,
  weights: jax.Array,
  scale: jax.Array | None,
  term: str = 'io',
) -> jax.Array:
  """x [..., i] times weights, 'io' or 'oi' (`term`): [..., o] float32."""
  rows = 'abcd'[: x.ndim - 1]
  y = product(f'{rows}i,{term}->{rows}o', x, weights.astype(x.dtype))
  if scale is not None:
    y = y * scale.reshape((1,) * (x.ndim - 1) + (-1,))
  return y


class Dense(nn.Module):
  """A linear map of the last axis, without bias.

  Attributes:
    features: Size of the output's last axis.
    axes: Logical axes of the kernel.
    dtype: Type of the operands. Sums are float32.
    out_dtype: Type of the output; `dtype` if not given.
    kernel_init: Initialiser of the [in, features] kernel.
  """

  features: int
  axes: tuple[str, str]
  dtype: jnp.dtype = jnp.float32
  out_dtype: jnp.dtype | None = None
  kernel_init: Initializer = kernel_init

  @nn.compact
  def __call__(
    self, x: jax.Array, apply: Callable[..., jax.Array] = project
  ) -> jax.Array:
    """Returns apply(x, kernel, scales of an int8 kernel or None)."""
    kernel = partitioning.param_with_axes(
      'kernel',
      self.kernel_init,
      (x.shape[-1], self.features),
      jnp.float32,
      axes=self.axes,
    )
    y = apply(x.astype(self.dtype), kernel, scale_of(self, 'kernel'))
    return y.astype(self.out_dtype or self.dtype)


class LayerNorm(nn.Module):
  """T5's layer norm: divides by the root mean square, without mean or bias.

  Attributes:
    dtype: Type of the output; the norm is computed in float32.
    epsilon: Added to the mean square.
    offset: Added to the stored scale; 1 for Gemma's checkpoints.
    axis: Logical axis of the scale.
  """

  dtype: jnp.dtype = jnp.float32
  epsilon: float = 1e-6
  offset: float = 0.0
  axis: str = 'embed'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = partitioning.param_with_axes(
      'scale',
      nn.initializers.constant(1.0 - self.offset),
      (x.shape[-1],),
      jnp.float32,
      axes=(self.axis,),
    )
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(lax.square(x), axis=-1, keepdims=True)
    y = x * lax.rsqrt(mean_square + self.epsilon)
    scale = scale.astype(jnp.float32) + self.offset
    y = y * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return y.astype(self.dtype)


class Embed(nn.Module):
  """The token embedding, and the output layer of models that tie the two."""

  vocab_size: int
  features: int
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.embedding = partitioning.param_with_axes(
      'embedding',
      embedding_init,
      (self.vocab_size, self.features),
      jnp.float32,
      axes=('vocab', 'embed'),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Looks up rows: [batch, length] -> [batch, length, embed]."""
    x = jnp.take(self.embedding, tokens, axis=0)
    scale = scale_of(self, 'embedding')
    if scale is not None:
      x = x * jnp.take(scale, tokens)[..., None]
    return x.astype(self.dtype)

  def attend(self, x: jax.Array) -> jax.Array:
    """Logits of all tokens: [..., embed] -> [..., vocab], float32."""
    scale = scale_of(self, 'embedding')
    return project(x.astype(self.dtype), self.embedding, scale, 'oi')


class Mlp(nn.Module):
  """The MLP, gated if it has two activations.

  With ('gelu', 'linear'), T5 1.1's: wo(gelu(wi_0 x) * (wi_1 x)); with
  ('relu',), T5 1.0's: wo(relu(wi x)).

  Sites: `wi` or `wi_0`, `wi_1` (before the activation), `hidden` [batch,
  length, mlp], `wo` [batch, length, embed].

  With `fused`, a TPU's kernel computes the sublayer, if it fits; None does so.
  """

  hidden: int
  activations: tuple[str, ...] = ('gelu', 'linear')
  dtype: jnp.dtype = jnp.float32
  dropout_rate: float = 0.0
  placements: tuple[Placement, ...] = ()
  fused: bool | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    *,
    enable_dropout: bool = False,
    around: tuple[jax.Array, jax.Array | None] | None = None,
  ) -> jax.Array:
    """Maps [batch, length, embed] to the same shape.

    Args:
      x: [batch, length, embed].
      enable_dropout: Whether hidden units are dropped.
      around: If `fuses`: the scale [embed] of the norm and the dropout [batch,
        1, embed] of the output or None. Then it computes the whole sublayer: x
        is the residual stream, and so is the output.
    """
    dropout = nn.Dropout(
      self.dropout_rate, broadcast_dims=(-2,), deterministic=not enable_dropout
    )
    if around is not None:
      *wi, wo = self._kernels()
      weights = tpu_sublayer.Weights(
        scale=around[0],
        wi=tuple(wi),
        wo=wo,
        kept=kept_by(dropout, x.shape[0], self.hidden),
        kept_out=around[1],
      )
      activations = tuple(ACTIVATIONS[name] for name in self.activations)
      return fused.mlp(x, weights, activations, LayerNorm.epsilon)
    h = None
    for name, activation in zip(self._names, self.activations, strict=True):
      y = Dense(self.hidden, ('embed', 'mlp'), self.dtype, name=name)(x)
      y = constrain(y, 'batch', 'length', 'mlp')
      y = adapt(self, self.placements, name, x, y)
      y = precisely(ACTIVATIONS[activation], y)
      h = y if h is None else h * y
    assert h is not None, 'an MLP needs an activation'
    h = dropout(adapt(self, self.placements, 'hidden', x, h))
    out = Dense(x.shape[-1], ('mlp', 'embed'), self.dtype, name='wo')(h)
    return adapt(self, self.placements, 'wo', h, out)

  @property
  def _names(self) -> list[str]:
    """The kernels, and sites, before the activations."""
    n = len(self.activations)
    return ['wi'] if n == 1 else [f'wi_{i}' for i in range(n)]

  def _kernels(self) -> list[jax.Array]:
    """Those before the activations, and wo."""
    params = self.variables['params']
    return [params[name]['kernel'] for name in (*self._names, 'wo')]

  def fuses(self, x: jax.Array) -> bool:
    """Whether a kernel can compute the sublayer.

    Args:
      x: [batch, length, embed], the residual stream.
    """
    names = (*self._names, 'wo')
    return untouched(
      self, self.placements, names, (*names, 'hidden')
    ) and fused.fits_sublayer(
      self.fused, self.dtype, x.shape, self.hidden, len(names), 'mlp'
    )


def untouched(
  module: nn.Module,
  placements: tuple[Placement, ...],
  kernels: Sequence[str],
  sites: Sequence[str],
) -> bool:
  """Whether a module may be computed without its sites.

  This is so if no adapter is placed at them or at the module itself, nothing
  reads them, and its kernels are not int8.
  """
  path = '/'.join(module.path)
  paths = (path, *(f'{path}/{site}' for site in sites))
  return (
    not module.is_initializing()
    and not module.is_mutable_collection('intermediates')
    and not any(matches(p.site, site) for p in placements for site in paths)
    and not any(
      'kernel_scale' in module.variables['params'][name] for name in kernels
    )
  )


def kept_by(dropout: nn.Dropout, rows: int, width: int) -> jax.Array | None:
  """What a dropout that is the same for all positions of a row multiplies with.

  Returns:
    [rows, 1, width] with the draws of [rows, length, width]; None for no
    dropout.
  """
  if dropout.deterministic or not dropout.rate:
    return None
  return dropout(jnp.ones((rows, 1, width)))


def sublayer(
  layer: nn.Module,
  config: ModelConfig,
  placements: tuple[Placement, ...],
  site: str,
  compute: Callable[..., jax.Array],
  x: jax.Array,
  dropout: nn.Dropout,
  norm: str | None = None,
  fuses: bool = False,
) -> jax.Array:
  """Norm, an attention or MLP, its site, and the residual connection.

  Call it in a compact method of `layer`, which owns the parameters.

  Args:
    layer: The encoder or decoder layer.
    config: Its sizes.
    placements: All placements of the network.
    site: The site of the output, before it is added to the residual stream.
    compute: The attention or MLP; it gets x after the norm.
    x: [batch, length, embed] the residual stream.
    dropout: Dropout of that output.
    norm: The name of the norm in `pre_<norm>_layer_norm`; None for `site`.
    fuses: Whether `compute` does all this, see `around` of `Mlp`.

  Returns:
    [batch, length, embed].
  """
  name = f'pre_{norm or site}_layer_norm'
  if fuses:
    scale = layer.variables['params'][name]['scale'] + config.norm_offset
    return compute(x, around=(scale, kept_by(dropout, x.shape[0], x.shape[2])))
  h = LayerNorm(jnp.dtype(config.dtype), offset=config.norm_offset, name=name)(
    x
  )
  return x + dropout(adapt(layer, placements, site, h, compute(h)))
