"""What our kernels for TPUs share: sizes of the chip, and how to call them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Elements of a register, and rows of one.
LANES, SUBLANES = 128, 8
# The part of VMEM that kernels of attention use; XLA keeps arrays there too.
USABLE = 0.75
# Added to the logits of masked keys. It is finite, so that a row without any
# key (the last evaluation batch is filled with such rows) gives no NaN.
MASKED = -1e10


def platform() -> str:
  """The platform of the traced program's devices."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device or jax.devices()[0]).platform


def vmem() -> int:
  """Bytes of VMEM per core of the traced program's devices."""
  if platform() != 'tpu':
    return 128 * 2**20
  from jax.experimental.pallas import tpu as pltpu

  return pltpu.get_tpu_info().vmem_capacity_bytes


def matrix_unit() -> int:
  """Rows and columns of a matrix unit of the traced program's devices."""
  if platform() != 'tpu':
    return 128
  from jax.experimental.pallas import tpu as pltpu

  return pltpu.get_tpu_info().mxu_column_size


def narrow(dtype: Any) -> Any:
  """The type to compute in where the precision of `dtype` is enough.

  The chips with large matrix units also multiply bfloat16 as it is, twice as
  much in a register. Others widen it first.
  """
  return dtype if matrix_unit() > LANES else jnp.float32


def up(n: int, multiple: int) -> int:
  """n rounded up to a multiple."""
  return -(-n // multiple) * multiple


def values(*arguments: Any) -> tuple[jax.Array | None, ...]:
  """The arrays of a forward rule's arguments, under `symbolic_zeros`."""
  return tuple(None if x is None else x.value for x in arguments)


def materialized(cotangent: Any) -> jax.Array:
  """The cotangent of an output, zeros if nothing reads the output."""
  if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
    return jnp.zeros(cotangent.shape, cotangent.dtype)
  return cotangent


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
  """A product of two matrices over an axis of each, summed in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((over[0],), (over[1],)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def on_mesh(call, in_specs, out_specs):
  """Shards a kernel, which XLA cannot do by itself."""
  if jax.sharding.get_abstract_mesh().empty:
    return call
  return jax.shard_map(
    call, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def call_settings(
  grid: tuple[int, ...],
  semantics: tuple[str, ...],
  needed: float,
  arrays: Sequence[Any],
  weights: int,
  flops: int,
) -> dict[str, Any]:
  """Settings of `pl.pallas_call` that all our kernels share.

  Args:
    grid: Its steps.
    semantics: The axes of the grid: 'parallel' or 'arbitrary'.
    needed: Bytes of VMEM.
    arrays: All inputs and outputs, or None.
    weights: How many exponentials, or other such functions, are computed.
    flops: Operations of all products.
  """
  # Imported here because they are slow to import.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  return {
    'grid': grid,
    # `tools.tpu_compiler` reads it in the compiled program.
    'metadata': {'steps': str(math.prod(grid))},
    # Tests compute it on other devices, slowly.
    'interpret': platform() != 'tpu',
    'compiler_params': pltpu.CompilerParams(
      dimension_semantics=semantics,
      # XLA may use the rest for other arrays.
      vmem_limit_bytes=int(min(0.9 * vmem(), needed)),
    ),
    'cost_estimate': pl.CostEstimate(
      flops=flops,
      transcendentals=weights,
      bytes_accessed=sum(
        math.prod(x.shape) * x.dtype.itemsize for x in arrays if x is not None
      ),
    ),
  }
