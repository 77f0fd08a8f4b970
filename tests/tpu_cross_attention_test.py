"""The TPU's cross-attention against the formula; interpreted on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ptune.model import fused, partitioning, tpu, tpu_cross_attention
from tests.tpu_attention_test import (
  assert_as_exact_as_bfloat16,
  dropped,
  padding,
)

ROWS, HEADS, QUERIES, KEYS, EMBED = 3, 4, 16, 70, 640


def draw():
  """asked, x, and what the output is multiplied with, float32."""
  rng = np.random.default_rng(0)
  make = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  asked = make(ROWS, HEADS, QUERIES, EMBED) / EMBED**0.5
  return asked, make(ROWS, KEYS, EMBED), make(*asked.shape) / 16


def plain(asked, x, mask, kept=None):
  logits = jnp.einsum('bhqi,bki->bhqk', asked, x)
  weights = jax.nn.softmax(jnp.where(mask, logits, tpu.MASKED))
  if kept is not None:
    weights = weights * kept.swapaxes(2, 3)
  return jnp.einsum('bhqk,bki->bhqi', weights, x)


def derivatives(attend, asked, x, mask, kept, dy):
  """The output, and gradients of asked and x."""

  def loss(asked, x):
    y = attend(asked, x, mask, kept)
    return jnp.sum(y.astype(jnp.float32) * dy), y

  grads, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(asked, x)
  return y, *grads


@pytest.mark.parametrize('dropout', [False, True])
def test_values_and_derivatives_are_those_of_the_formula(dropout):
  asked, x, dy = draw()
  mask = padding(ROWS, KEYS)
  dy *= mask.any(axis=3)[..., None]  # Nobody asks without a key.
  kept = dropped(ROWS, HEADS, KEYS) if dropout else None
  want = derivatives(plain, asked, x, mask, kept, dy)
  got = derivatives(tpu_cross_attention.attend, asked, x, mask, kept, dy)
  assert all(np.abs(expected).max() > 0.01 for expected in want)
  for one, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(one, expected, atol=1e-5)


def test_in_bfloat16_it_is_as_exact_as_bfloat16():
  asked, x, dy = draw()
  mask, kept = padding(ROWS, KEYS), dropped(ROWS, HEADS, KEYS)
  dy *= mask.any(axis=3)[..., None]
  asked, x = (jnp.asarray(a, jnp.bfloat16) for a in (asked, x))
  wide = (a.astype(jnp.float32) for a in (asked, x))
  want = derivatives(plain, *wide, mask, kept, dy)
  got = derivatives(tpu_cross_attention.attend, asked, x, mask, kept, dy)
  assert_as_exact_as_bfloat16(got, want)


def test_on_a_mesh_each_device_has_its_rows_and_heads():
  mesh = partitioning.make_mesh(2, jax.devices()[:4])
  asked, x, dy = (a[:2] for a in draw())
  mask, kept = padding(3, KEYS)[:2], dropped(2, HEADS, KEYS)
  want = derivatives(plain, asked, x, mask, kept, dy)

  def on_mesh(*arrays):
    return tpu_cross_attention.attend(*arrays, ('data', 'model'))

  split = NamedSharding(mesh, PartitionSpec('data', 'model'))
  with jax.set_mesh(mesh):
    asked = jax.device_put(asked, split)
    got = derivatives(on_mesh, asked, x, mask, kept, dy)
  assert got[0].sharding.is_equivalent_to(split, 4)
  for one, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(one, expected, atol=1e-5)


def test_only_inputs_that_are_trained_have_a_gradient():
  asked, x, _ = draw()
  mask = padding(ROWS, KEYS)

  def outputs(argument):
    """Of the kernels that a gradient calls, how many arrays each returns."""

    def loss(a):
      arrays = [asked, x]
      arrays[argument] = a
      return jnp.sum(tpu_cross_attention.attend(*arrays, mask))

    jaxpr = jax.make_jaxpr(jax.grad(loss))((asked, x)[argument])
    calls = [e for e in jaxpr.eqns if e.primitive.name == 'pallas_call']
    return [len(call.outvars) for call in calls]

  assert outputs(0) == [1, 1]
  assert outputs(1) == [1, 2]


def test_it_is_used_where_it_fits(monkeypatch):
  monkeypatch.setattr(fused, 'platform', lambda: 'tpu')
  monkeypatch.setattr(jax, 'device_count', lambda: 1)

  def fits(queries=16, keys=624, heads=32, embed=2048, **how):
    array = functools.partial(
      jax.ShapeDtypeStruct, dtype=how.get('dtype', jnp.bfloat16)
    )
    mask = jax.ShapeDtypeStruct((2, 1, how.get('masks', 1), keys), bool)
    return fused.fits_absorbed(
      how.get('wanted'),
      array((2, queries, heads, embed)),
      array((2, keys, embed)),
      mask,
    )

  assert fits()
  assert fits(heads=16, embed=4096)  # XXL, along a `model` of four.
  assert not fits(wanted=False)
  assert not fits(dtype=jnp.float32)
  assert not fits(queries=20)  # Would have to be moved to be merged.
  assert not fits(keys=100)
  assert not fits(masks=16)  # Packed rows.
  assert not fits(heads=64, embed=4096)  # Too large for VMEM.
