"""A frozen MLP sublayer on a TPU: a Pallas kernel forward, and one backward.

    before = norm(x) wi,   y = x + kept_out (kept activation(before) wo)

A gated MLP has two `wi`, and multiplies the activations of both. XLA computes
each product by itself, and writes arrays of [batch, length, mlp] between them.
Here one step of the grid computes a block of positions and a tile of hidden
units, and reads nothing twice:

    grid            (rows, blocks of positions, tiles of hidden units)
    x, y            [batch, length, embed]
    before          [batch, length, mlp] for each wi, for the backward pass
    kept            [batch, 1, mlp], the dropout of hidden units
    kept_out        [batch, 1, embed], the dropout of the output

The tiles of a block are summed in float32. If all weights fit into VMEM, they
are read once. Otherwise, each block reads them again.

If the norm or a kernel is trained, XLA computes the sublayer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ptune.model import tpu_attention
from ptune.model.tpu_attention import LANES, dot, on_mesh, up

# Positions of a block, at most. More of them need larger programs; with fewer,
# the matrix units wait for weights.
POSITIONS = 320
# Positions in a tile of bfloat16.
SUBLANES = 16
# The most cycles that the products of one step of the grid may take. The
# program of a step has no loops, so it has about as many instructions.
CYCLES = 40_000
# Names of the two kernels in a compiled program.
FORWARD, BACKWARD = 't5_mlp', 't5_mlp_backward'


def identity(x: jax.Array) -> jax.Array:
  """The second activation of most gated MLPs."""
  return x


class Weights(NamedTuple):
  """The frozen arrays, and the dropout.

  Attributes:
    scale: [embed], of the norm.
    wi: The kernels before the activations, one or two of [embed, mlp].
    wo: [mlp, embed].
    kept: [batch, 1, mlp], multiplies the hidden units, or None.
    kept_out: [batch, 1, embed], multiplies the output, or None.
  """

  scale: Any
  wi: tuple[Any, ...]
  wo: Any
  kept: Any = None
  kept_out: Any = None


class Settings(NamedTuple):
  """What is known when the program is traced.

  Attributes:
    activations: The functions that follow each of wi, computed in float32.
    epsilon: Added to the mean square in the norm.
    axes: The mesh axes over which rows and hidden units are sharded, if any.
  """

  activations: tuple[Callable[[jax.Array], jax.Array], ...]
  epsilon: float = 1e-6
  axes: tuple[str | None, str | None] = (None, None)


def tile_size(embed: int, mlp: int, products: int) -> int:
  """How many hidden units one step of the grid computes; 0 if none fit.

  Args:
    embed: Width of the network.
    mlp: Hidden units on one device.
    products: Number of matrix products: 3 if the MLP is gated, else 2.
  """
  if embed % LANES or mlp % LANES:
    return 0
  usable = tpu_attention.USABLE * tpu_attention.vmem()
  per_unit = products * POSITIONS * embed / _rate()
  for size in range(mlp, 0, -LANES):
    if (
      mlp % size == 0
      and _vmem_bytes(embed, mlp, products, size) <= usable
      and (size * per_unit <= CYCLES or size == LANES)
    ):
      return size
  return 0


def _rate() -> float:
  """Multiplications that the matrix units of a device make in a cycle."""
  if tpu_attention.platform() != 'tpu':
    return 4 * 128**2
  from jax.experimental.pallas import tpu as pltpu

  return 4 * pltpu.get_tpu_info().mxu_column_size ** 2


def _resident(embed: int, mlp: int, products: int) -> bool:
  """Whether all weights stay in VMEM."""
  return 2 * products * embed * mlp <= 0.6 * tpu_attention.vmem()


def _vmem_bytes(embed: int, mlp: int, products: int, size: int) -> int:
  """Estimates the VMEM of the backward kernel, which needs more."""
  # Of weights that are read again, one tile is copied and one in use.
  units = mlp if _resident(embed, mlp, products) else 2 * size
  weights = 2 * products * embed * units
  # So it is with inputs and outputs.
  arrays = 2 * 2 * POSITIONS * (3 * embed + (products - 1) * size)
  # The sum over tiles, the input of the products, and hidden units.
  return weights + arrays + POSITIONS * (6 * embed + 16 * size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sublayer(x: jax.Array, weights: Weights, settings: Settings) -> jax.Array:
  """x + kept_out ((kept prod(activation(norm(x) wi))) wo).

  Args:
    x: [batch, length, embed].
    weights: The arrays of the sublayer; dropout has no gradient.
    settings: How to compute it.

  Returns:
    [batch, length, embed], in the type of x.
  """
  return _forward(x, weights, settings, keep=False)[0]


def plain(x: jax.Array, weights: Weights, settings: Settings) -> jax.Array:
  """The same by XLA, which has the gradients of all arrays."""
  scale, wi, wo, kept, kept_out = weights
  wide = x.astype(jnp.float32)
  h = (_unit(wide, settings) * scale[None, None]).astype(x.dtype)
  hidden = 1.0 if kept is None else kept
  for activation, kernel in zip(settings.activations, wi, strict=True):
    before = jnp.einsum('bti,io->bto', h, kernel.astype(x.dtype))
    hidden *= activation(before.astype(jnp.float32))
  hidden = hidden.astype(x.dtype)
  y = jnp.einsum('bti,io->bto', hidden, wo.astype(x.dtype))
  return x + (y if kept_out is None else (y * kept_out).astype(x.dtype))


def _unit(x: jax.Array, settings: Settings) -> jax.Array:
  """Divides by the root mean square of the last axis, in float32."""
  return x * _inverse(x, settings)


def _inverse(x: jax.Array, settings: Settings) -> jax.Array:
  mean = jnp.mean(lax.square(x), axis=-1, keepdims=True)
  return lax.rsqrt(mean + settings.epsilon)


def _sublayer_forward(x, weights, settings):
  # Each argument has a value, and says whether it is differentiated.
  scale, wi, wo, kept, kept_out = weights
  trained = any(w.perturbed for w in (scale, wo, *wi))
  x, *arrays = tpu_attention.values(x, scale, wo, kept, kept_out, *wi)
  scale, wo, kept, kept_out, *wi = arrays
  weights = Weights(scale, tuple(wi), wo, kept, kept_out)
  if trained:
    call = functools.partial(plain, settings=settings)
    return jax.vjp(call, x, weights)
  y, before = _forward(x, weights, settings, keep=True)
  return y, (x, before, weights)


def _sublayer_backward(settings, saved, dy):
  if isinstance(dy, jax.custom_derivatives.SymbolicZero):
    dy = jnp.zeros(dy.shape, dy.dtype)
  if not isinstance(saved, tuple):
    return saved(dy)
  x, before, weights = saved
  dx = _backward(x, dy, before, weights, settings)
  return dx, jax.tree.map(lambda _: None, weights)


sublayer.defvjp(_sublayer_forward, _sublayer_backward, symbolic_zeros=True)


def _specs(settings: Settings):
  """Shardings of [batch, length, embed], [..., mlp], and the weights."""
  rows, units = settings.axes
  wide, middle = PartitionSpec(rows), PartitionSpec(rows, None, units)
  first, last = PartitionSpec(None, units), PartitionSpec(units)
  return wide, middle, Weights(PartitionSpec(), first, last, middle, wide)


def _forward(x, weights, settings, keep):
  """y, and, to `keep`, what comes before the activations."""
  wide, middle, shardings = _specs(settings)

  def call(x, weights):
    y, before = _call(FORWARD, x, None, None, weights, settings, keep)
    return _summed(x, y, settings), before

  call = on_mesh(call, (wide, shardings), (wide, middle))
  return call(x, _inputs(x, weights))


def _backward(x, dy, before, weights, settings):
  """The gradient of x."""
  wide, middle, shardings = _specs(settings)

  def call(x, dy, before, weights):
    dx, _ = _call(BACKWARD, x, dy, before, weights, settings)
    return _summed(dy, dx, settings)

  call = on_mesh(call, (wide, wide, middle, shardings), wide)
  return call(x, dy, before, _inputs(x, weights))


def _summed(x: jax.Array, y: jax.Array, settings: Settings) -> jax.Array:
  """Adds up what devices with some of the hidden units have.

  A device that has all of them adds x in the kernel.
  """
  over = settings.axes[1]
  return x + lax.psum(y, over) if over else y


def _inputs(x: jax.Array, weights: Weights) -> Weights:
  """Matrices in the type of x, and the rest in float32."""
  scale, wi, wo, kept, kept_out = weights
  return Weights(
    scale.astype(jnp.float32)[None],
    tuple(w.astype(x.dtype) for w in wi),
    wo.astype(x.dtype),
    None if kept is None else kept.astype(jnp.float32),
    None if kept_out is None else kept_out.astype(jnp.float32),
  )


# -------------------------------------------------------------------- kernels


def _forward_kernel(
  x_ref,
  _,
  __,
  weights: Weights,
  y_ref,
  before_refs,
  h_ref,
  sum_ref,
  *,
  settings: Settings,
  size: int,
):
  _, wi_refs, _, kept_ref, kept_out_ref = weights

  @_at_first_tile
  def _():
    h = _unit(x_ref[0].astype(jnp.float32), settings) * weights.scale[...]
    h_ref[...] = h.astype(h_ref.dtype)

  h = h_ref[...]
  hidden = 1.0 if kept_ref is None else kept_ref[0]
  for i, w_ref in enumerate(wi_refs):
    before = dot(h, _tile(w_ref, 1, size), (1, 0)).astype(h.dtype)
    if before_refs:
      before_refs[i][0] = before
    hidden *= settings.activations[i](before.astype(jnp.float32))

  def finish(y):
    if kept_out_ref is not None:
      y = y * kept_out_ref[0]
    if not settings.axes[1]:
      y = x_ref[0].astype(jnp.float32) + y
    y_ref[0] = y.astype(y_ref.dtype)

  part = dot(hidden.astype(h.dtype), _tile(weights.wo, 0, size), (1, 0))
  _add_up(part, sum_ref, finish)


def _backward_kernel(
  x_ref,
  dy_ref,
  before_refs,
  weights: Weights,
  dx_ref,
  _,
  dy_kept_ref,
  sum_ref,
  *,
  settings: Settings,
  size: int,
):
  _, wi_refs, wo_ref, kept_ref, kept_out_ref = weights

  @_at_first_tile
  def _():
    dy = dy_ref[0]
    if kept_out_ref is not None:
      dy = (dy.astype(jnp.float32) * kept_out_ref[0]).astype(dy.dtype)
    dy_kept_ref[...] = dy

  dhidden = dot(dy_kept_ref[...], _tile(wo_ref, 0, size), (1, 1))
  if kept_ref is not None:
    dhidden *= kept_ref[0]
  # From here on in the type of x: in bfloat16, a register holds twice as much.
  dhidden = dhidden.astype(x_ref.dtype)
  found = [
    _value_and_slope(activation, ref[0])
    for activation, ref in zip(settings.activations, before_refs, strict=True)
  ]
  part = 0.0
  for i, w_ref in enumerate(wi_refs):
    factors = [x[i == j] for j, x in enumerate(found)]
    dbefore = functools.reduce(
      jnp.multiply, [x for x in factors if x is not None], dhidden
    )
    part += dot(dbefore, _tile(w_ref, 1, size), (1, 1))

  def finish(dh):
    x, dh = x_ref[0].astype(jnp.float32), dh * weights.scale[...]
    inverse = _inverse(x, settings)
    unit = x * inverse
    dx = inverse * (dh - unit * jnp.mean(unit * dh, axis=1, keepdims=True))
    if not settings.axes[1]:
      dx = dy_ref[0].astype(jnp.float32) + dx
    dx_ref[0] = dx.astype(dx_ref.dtype)

  _add_up(part, sum_ref, finish)


def _value_and_slope(activation, x):
  """An activation and its derivative, in the type of x; None for 1."""
  if activation is identity:
    return x, None
  wide = x.astype(jnp.float32)
  found = jax.jvp(activation, (wide,), (jnp.ones_like(wide),))
  return tuple(a.astype(x.dtype) for a in found)


def _tile(ref, axis: int, size: int):
  """The current tile of a kernel, which may be in VMEM as a whole."""
  from jax.experimental import pallas as pl

  if ref.shape[axis] == size:
    return ref[...]
  start = pl.multiple_of(pl.program_id(2) * size, size)
  return ref[:, pl.ds(start, size)] if axis else ref[pl.ds(start, size), :]


def _at_first_tile(function: Callable[[], None]) -> None:
  from jax.experimental import pallas as pl

  pl.when(pl.program_id(2) == 0)(function)


def _add_up(part, sum_ref, finish: Callable[[jax.Array], None]) -> None:
  """Sums the parts of all tiles; calls `finish` with the sum."""
  from jax.experimental import pallas as pl

  if sum_ref is None:
    finish(part)
    return
  tile, last = pl.program_id(2), pl.num_programs(2) - 1

  @_at_first_tile
  def _():
    sum_ref[...] = part

  @pl.when((tile > 0) & (tile < last))
  def _():
    sum_ref[...] += part

  @pl.when(tile == last)
  def _():
    finish(sum_ref[...] + part)


def _of_given(specs, inputs):
  """The same specs, but None for inputs that are None."""
  return jax.tree.map(
    lambda x, spec: x if x is None else spec,
    inputs,
    specs,
    is_leaf=lambda x: x is None,
  )


def _call(name, x, dy, before, weights, settings, keep=False):
  """Calls a kernel on one device.

  Args:
    name: FORWARD or BACKWARD.
    x: The residual stream.
    dy: The gradient of the output, for the backward pass.
    before: What comes before the activations, for the backward pass.
    weights: As `_inputs` returns them.
    settings: How to compute it.
    keep: Whether to return what comes before the activations.

  Returns:
    An array like x, and what comes before the activations or ().
  """
  # Imported here because they are slow to import.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  rows, length, embed = x.shape
  units, kernels = weights.wo.shape[0], len(weights.wi)
  sizes = embed, units, kernels + 1
  size = tile_size(*sizes)
  tiles = units // size
  # Blocks of about the same size; the last one may end after the row.
  blocks = math.ceil(length / POSITIONS)
  block = min(up(math.ceil(length / blocks), SUBLANES), length)
  wide = pl.BlockSpec((1, block, embed), lambda b, i, j: (b, i, 0))
  middle = pl.BlockSpec((1, block, size), lambda b, i, j: (b, i, j))
  once = functools.partial(pl.BlockSpec, pipeline_mode=pl.Buffered(1))
  if _resident(*sizes):
    first = once((embed, units), lambda b, i, j: (0, 0))
    last = once((units, embed), lambda b, i, j: (0, 0))
  else:
    first = pl.BlockSpec((embed, size), lambda b, i, j: (0, j))
    last = pl.BlockSpec((size, embed), lambda b, i, j: (j, 0))
  of_weights = Weights(
    once((1, embed), lambda b, i, j: (0, 0)),
    (first,) * kernels,
    last,
    pl.BlockSpec((1, 1, size), lambda b, i, j: (b, 0, j)),
    pl.BlockSpec((1, 1, embed), lambda b, i, j: (b, 0, 0)),
  )
  inputs = (x, dy, before, weights)
  specs = (wide, wide, (middle,) * kernels, of_weights)
  out = (
    jax.ShapeDtypeStruct(x.shape, x.dtype),
    (jax.ShapeDtypeStruct((rows, length, units), x.dtype),) * kernels * keep,
  )
  return pl.pallas_call(
    functools.partial(
      _forward_kernel if name == FORWARD else _backward_kernel,
      settings=settings,
      size=size,
    ),
    in_specs=_of_given(specs, inputs),
    out_specs=(wide, (middle,) * kernels * keep),
    out_shape=out,
    scratch_shapes=(
      pltpu.VMEM((block, embed), x.dtype),
      pltpu.VMEM((block, embed), jnp.float32) if tiles > 1 else None,
    ),
    name=name,
    **tpu_attention.call_settings(
      (rows, blocks, tiles),
      ('parallel', 'parallel', 'arbitrary'),
      1.25 * _vmem_bytes(*sizes, size),
      jax.tree.leaves((inputs, out)),
      rows * length * units,
      2 * math.prod(sizes) * rows * length,
    ),
  )(*inputs)
