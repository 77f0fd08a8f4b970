"""A TPU's kernels for the frozen matrices of an encoder's layer.

    project   before = norm(x) wi: queries, keys and values
    output    y = x + kept_out (hidden wo): what follows attention
    mlp       before = norm(x) wi, y = x + kept_out (kept activation(before) wo)

XLA computes each product by itself, and reads and writes its operands each
time. Here one step of the grid computes a block of positions and a tile of
units with all kernels wi, and reads nothing twice:

    grid            (rows, blocks of positions, tiles of units)
    x, y            [batch, length, embed]
    before          [batch, length, units] for each wi; an MLP returns it for
                    the backward pass only
    hidden          [batch, length, units]
    kept            [batch, 1, units], the dropout of an MLP's hidden units
    kept_out        [batch, 1, embed], the dropout of its output

The tiles of a block are summed in float32. If all weights fit into VMEM, they
are read once. Otherwise, each block reads them again.

If the norm or a matrix is trained, XLA computes all of it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ptune.model import tpu
from ptune.model.activations import identity, precisely
from ptune.model.tpu import LANES, SUBLANES, dot, materialized, on_mesh, up

# Positions of a block, at most (but see `_step`). More of them need larger
# programs; with fewer, the matrix units wait for weights.
POSITIONS = 320
# The most cycles that the products of one step of the grid may take. The
# program of a step has no loops, so it has about as many instructions.
CYCLES = 40_000
# The part of VMEM that a kernel may use; XLA keeps arrays there too.
USABLE = 0.85
# Names of the kernels in a compiled program.
MLP, MLP_BACKWARD = 't5_mlp', 't5_mlp_backward'
PROJECT, PROJECT_BACKWARD = 't5_project', 't5_project_backward'
OUTPUT, OUTPUT_BACKWARD = 't5_output', 't5_output_backward'


class Weights(NamedTuple):
  """The frozen arrays, and the dropout.

  Attributes:
    scale: [embed], of the norm, or None.
    wi: The matrices after the norm, each [embed, units].
    wo: [units, embed], or None.
    kept: [batch, 1, units], multiplies the hidden units, or None.
    kept_out: [batch, 1, embed], multiplies the output, or None.
  """

  scale: Any = None
  wi: tuple[Any, ...] = ()
  wo: Any = None
  kept: Any = None
  kept_out: Any = None


class Settings(NamedTuple):
  """What is known when the program is traced.

  Attributes:
    activations: The functions that follow each of an MLP's wi, in float32.
    epsilon: Added to the mean square in the norm.
    axes: The mesh axes over which rows and units are sharded, if any.
  """

  activations: tuple[Callable[[jax.Array], jax.Array], ...] = ()
  epsilon: float = 1e-6
  axes: tuple[str | None, str | None] = (None, None)


def tile_size(
  embed: int, units: int, products: int, positions: int | None = None
) -> int:
  """How many units one step of the grid computes; 0 if none fit.

  Args:
    embed: Width of the network.
    units: Units on one device.
    products: Number of kernels, 3 for a gated MLP.
    positions: Those of a block, at most; `POSITIONS` if None.
  """
  if embed % LANES or units % LANES:
    return 0
  positions = positions or POSITIONS
  usable = USABLE * tpu.vmem()
  per_unit = products * positions * embed / _rate()
  for size in range(units, 0, -LANES):
    if (
      units % size == 0
      and _vmem_bytes(embed, units, products, size, positions) <= usable
      and (size * per_unit <= CYCLES or size == LANES)
    ):
      return size
  return 0


def _step(
  embed: int, units: int, products: int, activations: bool
) -> tuple[int, int]:
  """Positions of a block, at most, and units, of one step of the grid.

  Large matrix units are so fast that what comes before the first and after the
  last product of a step weighs. There a step that has all units has twice as
  many positions. But then the compiler would not run activations beside
  products any more, which the backward pass of an MLP does.

  Args:
    embed: Width of the network.
    units: Units on one device.
    products: Number of kernels.
    activations: Whether activations are to run beside products.
  """
  twice = 2 * POSITIONS
  large = tpu.matrix_unit() > LANES and not activations
  if large and tile_size(embed, units, products, twice) == units:
    return twice, units
  return POSITIONS, tile_size(embed, units, products)


def _rate() -> float:
  """Multiplications that the matrix units of a device make in a cycle."""
  return 4 * tpu.matrix_unit() ** 2


def _resident(embed: int, units: int, products: int) -> bool:
  """Whether all weights stay in VMEM."""
  return 2 * products * embed * units <= 0.6 * tpu.vmem()


def _vmem_bytes(
  embed: int, units: int, products: int, size: int, positions: int
) -> int:
  """Estimates the VMEM of the backward kernel, which needs more."""
  # Of weights that are read again, one tile is copied and one in use.
  here = units if _resident(embed, units, products) else 2 * size
  weights = 2 * products * embed * here
  # So it is with inputs and outputs.
  arrays = 2 * 2 * positions * (3 * embed + products * size)
  # The rest, as the TPU's compiler counts it for several sizes.
  return weights + arrays + positions * (16 * embed + 2 * size)


# ------------------------------------------------------------------- functions


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mlp(x: jax.Array, weights: Weights, settings: Settings) -> jax.Array:
  """x + kept_out ((kept prod(activation(norm(x) wi))) wo).

  Args:
    x: [batch, length, embed].
    weights: The arrays; dropout has no gradient.
    settings: How to compute it.

  Returns:
    [batch, length, embed], in the type of x.
  """
  return _forward(x, None, weights, settings)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(
  x: jax.Array, weights: Weights, settings: Settings
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """x, and norm(x) wi for each wi.

  It returns x so that the backward pass can add the gradient that x gets from
  the residual connection.

  Args:
    x: [batch, length, embed].
    weights: The arrays, without wo and dropout.
    settings: How to compute it.

  Returns:
    x, and arrays [batch, length, units] in the type of x.
  """
  return x, _forward(x, None, weights, settings, keep=True)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def output(
  x: jax.Array, hidden: jax.Array, weights: Weights, settings: Settings
) -> jax.Array:
  """x + kept_out (hidden wo).

  Args:
    x: [batch, length, embed].
    hidden: [batch, length, units].
    weights: wo, and kept_out, which has no gradient.
    settings: How to compute it.

  Returns:
    [batch, length, embed], in the type of x.
  """
  return _forward(x, hidden, weights, settings)[0]


def _plain_mlp(x, weights, settings) -> jax.Array:
  """`mlp` by XLA, which has the gradients of all arrays."""
  _, before = _plain_project(x, weights, settings)
  hidden = functools.reduce(
    jnp.multiply, map(precisely, settings.activations, before)
  )
  if weights.kept is not None:
    hidden = (hidden * weights.kept).astype(x.dtype)
  return _plain_output(x, hidden, weights)


def _plain_output(x, hidden, weights) -> jax.Array:
  """`output` by XLA."""
  y = jnp.einsum('bti,io->bto', hidden, weights.wo.astype(x.dtype))
  if weights.kept_out is not None:
    y = (y * weights.kept_out).astype(x.dtype)
  return x + y


def _plain_project(x, weights, settings):
  """`project` by XLA."""
  wide = x.astype(jnp.float32)
  h = wide * _inverse(wide, settings) * weights.scale[None, None]
  h = h.astype(x.dtype)
  before = (jnp.einsum('bti,io->bto', h, w.astype(x.dtype)) for w in weights.wi)
  if not jax.sharding.get_abstract_mesh().empty:
    middle = _specs(settings)[1]
    before = (lax.with_sharding_constraint(y, middle) for y in before)
  return x, tuple(before)


def _inverse(x: jax.Array, settings: Settings) -> jax.Array:
  """One divided by the root mean square of the last axis."""
  mean = jnp.mean(lax.square(x), axis=-1, keepdims=True)
  return lax.rsqrt(mean + settings.epsilon)


def _values(x, weights):
  """The arrays, and whether one of the weights is trained."""
  # Each argument has a value, and says whether it is differentiated.
  leaves, tree = jax.tree.flatten(
    (x, weights), is_leaf=lambda a: hasattr(a, 'perturbed')
  )
  trained = any(leaf.perturbed for leaf in leaves[1:])
  return *tree.unflatten([leaf.value for leaf in leaves]), trained


def _mlp_forward(x, weights, settings):
  x, weights, trained = _values(x, weights)
  if trained:
    return jax.vjp(functools.partial(_plain_mlp, settings=settings), x, weights)
  y, before = _forward(x, None, weights, settings, keep=True)
  return y, (x, before, weights)


def _mlp_backward(settings, saved, dy):
  dy = materialized(dy)
  if not isinstance(saved, tuple):
    return saved(dy)
  x, before, weights = saved
  return _backward(x, dy, before, weights, settings), _nothing(weights)


def _project_forward(x, weights, settings):
  x, weights, trained = _values(x, weights)
  if trained:
    call = functools.partial(_plain_project, settings=settings)
    return jax.vjp(call, x, weights)
  _, before = _forward(x, None, weights, settings, keep=True)
  return (x, before), (x, weights)


def _project_backward(settings, saved, given):
  dx, dbefore = given[0], tuple(given[1])
  dx, *dbefore = map(materialized, (dx, *dbefore))
  if not isinstance(saved, tuple):
    return saved((dx, tuple(dbefore)))
  x, weights = saved
  dx = _backward(x, dx, tuple(dbefore), weights, settings)
  return dx, _nothing(weights)


def _output_forward(x, hidden, weights, settings):
  x, (hidden, weights, trained) = x.value, _values(hidden, weights)
  if trained:
    return jax.vjp(_plain_output, x, hidden, weights)
  return _forward(x, hidden, weights, settings)[0], weights


def _output_backward(settings, weights, dy):
  dy = materialized(dy)
  if not isinstance(weights, Weights):
    return weights(dy)
  dhidden = _backward(None, dy, None, weights, settings)
  return dy, dhidden, _nothing(weights)


def _nothing(weights: Weights) -> Weights:
  """No gradients."""
  return jax.tree.map(lambda _: None, weights)


mlp.defvjp(_mlp_forward, _mlp_backward, symbolic_zeros=True)
project.defvjp(_project_forward, _project_backward, symbolic_zeros=True)
output.defvjp(_output_forward, _output_backward, symbolic_zeros=True)


def _specs(settings: Settings):
  """Shardings of [batch, length, embed], [..., units], and the weights."""
  rows, units = settings.axes
  wide, middle = PartitionSpec(rows), PartitionSpec(rows, None, units)
  first, last = PartitionSpec(None, units), PartitionSpec(units)
  every = Weights(PartitionSpec(), first, last, middle, wide)
  return wide, middle, every


def _forward(x, hidden, weights, settings, keep=False):
  """y if there is a wo, and, to `keep`, what the matrices wi give."""
  wide, middle, shardings = _specs(settings)

  def call(x, hidden, weights):
    given = None if hidden is None else (hidden,)
    y, before = _call(False, x, None, given, weights, settings, keep)
    return None if y is None else _summed(x, y, settings), before

  call = on_mesh(call, (wide, middle, shardings), (wide, middle))
  return call(x, hidden, _inputs(x, weights))


def _backward(x, dy, before, weights, settings):
  """The gradient of x, or of what `output` gets as hidden.

  Args:
    x: The residual stream; None for `output`.
    dy: The gradient of the output, which is a sum with x.
    before: What comes before an MLP's activations, or the gradients of what
      `project` returned; None for `output`.
    weights: The arrays.
    settings: How to compute it.
  """
  wide, middle, shardings = _specs(settings)
  into_x = bool(weights.wi)

  def call(x, dy, before, weights):
    dx, dhidden = _call(True, x, dy, before, weights, settings, not into_x)
    return _summed(dy, dx, settings) if into_x else dhidden[0]

  inputs = (wide, wide, middle, shardings)
  call = on_mesh(call, inputs, wide if into_x else middle)
  return call(x, dy, before, _inputs(dy, weights))


def _summed(x: jax.Array, y: jax.Array, settings: Settings) -> jax.Array:
  """Adds up what devices with some of the units have.

  A device that has all of them adds x in the kernel.
  """
  over = settings.axes[1]
  return x + lax.psum(y, over) if over else y


def _inputs(x: jax.Array, weights: Weights) -> Weights:
  """Matrices in the type of x, and the rest in float32."""
  scale, wi, wo, kept, kept_out = weights
  return Weights(
    None if scale is None else scale.astype(jnp.float32)[None],
    tuple(w.astype(x.dtype) for w in wi),
    None if wo is None else wo.astype(x.dtype),
    None if kept is None else kept.astype(jnp.float32),
    None if kept_out is None else kept_out.astype(jnp.float32),
  )


# -------------------------------------------------------------------- kernels


def _forward_kernel(
  x_ref,
  _,
  given_refs,
  weights: Weights,
  y_ref,
  before_refs,
  h_ref,
  sum_ref,
  *,
  settings: Settings,
  size: int,
  tiles: int,
):
  _, wi_refs, wo_ref, kept_ref, kept_out_ref = weights

  def finish(y):
    if kept_out_ref is not None:
      y = y * kept_out_ref[0]
    if not settings.axes[1]:
      y = x_ref[0].astype(jnp.float32) + y
    y_ref[0] = y.astype(y_ref.dtype)

  if not wi_refs:
    part = dot(given_refs[0][0], _tile(wo_ref, 0, size), (1, 0))
    _add_up(part, sum_ref, tiles, finish)
    return

  @_at_first_tile
  def _():
    x = x_ref[0].astype(jnp.float32)
    h = x * _inverse(x, settings) * weights.scale[...]
    h_ref[...] = h.astype(h_ref.dtype)

  h = h_ref[...]
  before = []
  for i, w_ref in enumerate(wi_refs):
    before.append(dot(h, _tile(w_ref, 1, size), (1, 0)).astype(h.dtype))
    if before_refs:
      before_refs[i][0] = before[i]
  if wo_ref is None:
    return
  hidden = 1.0 if kept_ref is None else kept_ref[0]
  for activation, given in zip(settings.activations, before, strict=True):
    hidden *= activation(given.astype(jnp.float32))
  part = dot(hidden.astype(h.dtype), _tile(wo_ref, 0, size), (1, 0))
  _add_up(part, sum_ref, tiles, finish)


def _backward_kernel(
  x_ref,
  dy_ref,
  before_refs,
  weights: Weights,
  dx_ref,
  dhidden_refs,
  dy_kept_ref,
  sum_ref,
  *,
  settings: Settings,
  size: int,
  tiles: int,
):
  def dbefore(chunk: slice) -> list[jax.Array]:
    if weights.wo is None:
      return [ref[0, :, chunk] for ref in before_refs]
    wo = _tile(weights.wo, 0, size, chunk)
    return _dbefore(chunk, before_refs, wo, weights.kept, dy_kept_ref, settings)

  if weights.wo is not None:

    @_at_first_tile
    def _():
      dy = dy_ref[0]
      if weights.kept_out is not None:
        dy = (dy.astype(jnp.float32) * weights.kept_out[0]).astype(dy.dtype)
      dy_kept_ref[...] = dy

  if not weights.wi:
    dhidden = dot(dy_kept_ref[...], _tile(weights.wo, 0, size), (1, 1))
    dhidden_refs[0][0] = dhidden.astype(dhidden_refs[0].dtype)
    return
  pieces = _chunks(x_ref.shape[2])
  sums = [0.0 for _ in pieces]
  chunks = _chunks(size) if weights.wo is not None else [slice(0, size)]
  coming = dbefore(chunks[0])
  for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
    # The next chunk's activations are written before this one's products.
    given, coming = coming, following and dbefore(following)
    for i, piece in enumerate(pieces):
      for d, w_ref in zip(given, weights.wi, strict=True):
        sums[i] += dot(d, _tile(w_ref, 1, size, chunk, piece), (1, 1))
  part = jnp.concatenate(sums, axis=1)

  def finish(dh):
    x, dh = x_ref[0].astype(jnp.float32), dh * weights.scale[...]
    inverse = _inverse(x, settings)
    mean = jnp.mean(x * dh, axis=1, keepdims=True)
    dx = inverse * dh - (inverse**3 * mean) * x
    if not settings.axes[1]:
      dx = dy_ref[0].astype(jnp.float32) + dx
    dx_ref[0] = dx.astype(dx_ref.dtype)

  _add_up(part, sum_ref, tiles, finish)


def _chunks(length: int) -> list[slice]:
  """Parts whose products can run beside the activations of others.

  Only large matrix units are so fast that it saves time.
  """
  size = tpu.matrix_unit()
  size = size if size > LANES else length
  return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _dbefore(chunk, before_refs, wo, kept_ref, dy_kept_ref, settings):
  """The gradients of what comes before an MLP's activations, for a chunk."""
  dhidden = dot(dy_kept_ref[...], wo, (1, 1))
  if kept_ref is not None:
    dhidden *= kept_ref[0, :, chunk]
  # From here on in the type of dy: in bfloat16, a register holds twice as much.
  dhidden = dhidden.astype(dy_kept_ref.dtype)
  found = [
    _value_and_slope(activation, ref[0, :, chunk])
    for activation, ref in zip(settings.activations, before_refs, strict=True)
  ]
  return [
    functools.reduce(
      jnp.multiply,
      [x[i == j] for j, x in enumerate(found) if x[i == j] is not None],
      dhidden,
    )
    for i in range(len(found))
  ]


def _value_and_slope(activation, x):
  """An activation and its derivative, in the type of x; None for 1."""
  if activation is identity:
    return x, None
  wide = x.astype(jnp.float32)
  found = jax.jvp(activation, (wide,), (jnp.ones_like(wide),))
  return tuple(a.astype(x.dtype) for a in found)


def _tile(ref, axis: int, size: int, chunk=None, others=slice(None)):
  """The current tile of a kernel, which may be in VMEM as a whole.

  Args:
    ref: Reference to the kernel.
    axis: That of the units.
    size: Units in a tile.
    chunk: A part of the tile, or None.
    others: A part of the other axis.
  """
  from jax.experimental import pallas as pl

  units: Any = chunk or slice(0, size)
  if ref.shape[axis] != size:
    start = pl.program_id(2) * size + units.start
    units = pl.ds(pl.multiple_of(start, LANES), units.stop - units.start)
  return ref[others, units] if axis else ref[units, others]


def _at_first_tile(function: Callable[[], None]) -> None:
  from jax.experimental import pallas as pl

  pl.when(pl.program_id(2) == 0)(function)


def _add_up(part, sum_ref, tiles: int, finish: Callable[[jax.Array], None]):
  """Sums the parts of all tiles; calls `finish` with the sum."""
  from jax.experimental import pallas as pl

  if tiles == 1:
    finish(part)
    return
  tile = pl.program_id(2)

  @_at_first_tile
  def _():
    sum_ref[...] = part

  if tiles > 2:

    @pl.when((tile > 0) & (tile < tiles - 1))
    def _():
      sum_ref[...] += part

  @pl.when(tile == tiles - 1)
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


def _call(backward, x, dy, given, weights, settings, keep):
  """Calls a kernel on one device.

  Args:
    backward: Whether it is the backward pass.
    x: The residual stream, or None.
    dy: As for `_backward`, or None.
    given: Arrays [batch, length, units]: `before` as for `_backward`, or hidden
      of `output`; or None.
    weights: As `_inputs` returns them.
    settings: How to compute it.
    keep: Whether to return such arrays.

  Returns:
    An array like x, or None; and arrays [batch, length, units], or ().
  """
  # Imported here because they are slow to import.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  inner, outer = len(weights.wi), weights.wo is not None
  stream = dy if x is None else x
  rows, length, embed = stream.shape
  units = weights.wo.shape[0] if outer else weights.wi[0].shape[1]
  arrays = max(inner, 1)  # Of width `units`.
  sizes = embed, units, inner + outer
  activations = backward and inner > 0 and outer
  positions, size = _step(*sizes, activations)
  tiles = units // size
  # Blocks of about the same size; the last one may end after the row.
  blocks = math.ceil(length / positions)
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
    (first,) * inner,
    last,
    pl.BlockSpec((1, 1, size), lambda b, i, j: (b, 0, j)),
    pl.BlockSpec((1, 1, embed), lambda b, i, j: (b, 0, 0)),
  )
  inputs = (x, dy, given, weights)
  specs = (wide, wide, (middle,) * arrays, of_weights)
  sums = inner > 0 if backward else outer
  out = (
    jax.ShapeDtypeStruct(stream.shape, stream.dtype) if sums else None,
    (jax.ShapeDtypeStruct((rows, length, units), stream.dtype),)
    * (arrays * keep),
  )
  name = {
    (True, True): (MLP, MLP_BACKWARD),
    (True, False): (PROJECT, PROJECT_BACKWARD),
    (False, True): (OUTPUT, OUTPUT_BACKWARD),
  }[inner > 0, outer]
  return pl.pallas_call(
    functools.partial(
      _backward_kernel if backward else _forward_kernel,
      settings=settings,
      size=size,
      tiles=tiles,
    ),
    in_specs=_of_given(specs, inputs),
    out_specs=(wide if sums else None, (middle,) * (arrays * keep)),
    out_shape=out,
    scratch_shapes=(
      pltpu.VMEM((block, embed), stream.dtype),
      pltpu.VMEM((block, embed), jnp.float32) if sums and tiles > 1 else None,
    ),
    name=name[backward],
    **tpu.call_settings(
      (rows, blocks, tiles),
      ('parallel', 'parallel', 'arbitrary'),
      1.25 * _vmem_bytes(*sizes, size, positions),
      jax.tree.leaves((inputs, out)),
      rows * length * units * (inner > 0 and outer),
      2 * math.prod(sizes) * rows * length,
    ),
  )(*inputs)
