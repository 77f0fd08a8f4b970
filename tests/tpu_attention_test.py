"""The TPU's attention kernel against the formula, interpreted on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ptune.model import partitioning, tpu, tpu_attention, tpu_attention_kernels


def plain(q, k, v, bias, mask, kept=None):
  if kept is not None:
    v = v * kept.swapaxes(1, 2)
  logits = jnp.einsum('bqhd,bkhd->bhqk', q, k)
  if bias is not None:
    logits = logits + bias
  weights = jax.nn.softmax(jnp.where(mask, logits, tpu.MASKED))
  return jnp.einsum('bhqk,bkhd->bqhd', weights, v)


def draw(rows, queries, keys, heads, head_dim):
  """Returns float32 q, k, v, bias, and a factor of the output."""
  rng = np.random.default_rng(0)
  make = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  q = make(rows, queries, heads, head_dim) / head_dim**0.5
  k, v = (make(rows, keys, heads, head_dim) for _ in range(2))
  return q, k, v, make(1, heads, queries, keys), make(*q.shape) / 8


def padding(rows, keys):
  """Returns [rows, 1, 1, keys]; each row is shorter, and the last is empty."""
  lengths = np.linspace(keys, 0, rows).astype(int)
  return (np.arange(keys) < lengths[:, None])[:, None, None]


def packed(rows, length):
  """Returns [rows, 1, length, length]; an example is a third of a row."""
  segments = np.arange(length) * 3 // length
  same = segments[:, None] == segments
  return np.broadcast_to(same, (rows, 1, length, length))


def causal(length):
  return np.tril(np.ones((length, length), bool))[None, None]


def dropped(rows, heads, keys):
  """Returns [rows, heads, keys, 1]: the keys kept by a dropout of a quarter."""
  rng = np.random.default_rng(1)
  kept = rng.random((rows, heads, keys, 1)) < 0.75
  return (kept / 0.75).astype(np.float32)


def derivatives(attend, q, k, v, bias, mask, dy, kept=None):
  """Returns the output, and gradients of q, k, v and of a bias if given."""

  def loss(q, k, v, bias):
    y = attend(q, k, v, bias, mask, kept)
    return jnp.sum(y.astype(jnp.float32) * dy), y

  asked = (0, 1, 2) if bias is None else (0, 1, 2, 3)
  grads, y = jax.jit(jax.grad(loss, asked, has_aux=True))(q, k, v, bias)
  return y, *grads


CASES = {
  # Rows, queries, keys, heads, head size. No length is a multiple of a tile.
  'encoder': ((3, 140, 140, 2, 64), padding(3, 140)),
  'packed': ((2, 140, 140, 1, 128), packed(2, 140)),
  'decoder': ((2, 150, 150, 1, 256), causal(150) & padding(2, 150)),
  'causal': ((2, 130, 130, 2, 64), causal(130)),
  'cross, three heads': ((2, 130, 70, 3, 64), padding(2, 70)),
  'four heads': ((2, 140, 140, 4, 64), padding(2, 140)),
}


@pytest.fixture
def unit(request, monkeypatch):
  """Rows of a matrix unit: 128, or 256 with room for summands of logits."""
  monkeypatch.setattr(
    tpu_attention_kernels, 'matrix_unit', lambda: request.param
  )


units = pytest.mark.parametrize('unit', [128, 256], indirect=True)


@units
@pytest.mark.parametrize('case', CASES)
def test_values_and_derivatives_are_those_of_the_formula(
  case, unit, monkeypatch
):
  # Two chunks of keys.
  monkeypatch.setattr(tpu_attention_kernels, 'CHUNK', 64)
  shape, mask = CASES[case]
  q, k, v, bias, dy = draw(*shape)
  bias = None if 'cross' in case else bias
  dy *= mask.any(axis=(1, 3))[..., None, None]  # Ignore queries without a key.
  kept = (
    None if 'causal' in case else dropped(k.shape[0], k.shape[2], k.shape[1])
  )
  want = derivatives(plain, q, k, v, bias, mask, dy, kept)
  got = derivatives(tpu_attention.attend, q, k, v, bias, mask, dy, kept)
  for one, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(one, expected, atol=1e-5)


def assert_as_exact_as_bfloat16(got, want):
  for one, expected in zip(got, want, strict=True):
    assert one.dtype == jnp.bfloat16
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
      one.astype(np.float32), expected, atol=1e-2 * scale
    )


@units
def test_in_bfloat16_it_is_as_exact_as_bfloat16(unit):
  shape, mask = CASES['encoder']
  q, k, v, bias, dy = draw(*shape)
  dy *= mask.any(axis=(1, 3))[..., None, None]
  q, k, v = (x.astype(jnp.bfloat16).astype(np.float32) for x in (q, k, v))
  want = derivatives(plain, q, k, v, bias, mask, dy)[:4]
  q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
  got = derivatives(tpu_attention.attend, q, k, v, bias, mask, dy)[:4]
  assert_as_exact_as_bfloat16(got, want)


def test_on_a_mesh_each_device_has_its_rows_and_heads():
  mesh = partitioning.make_mesh(2, jax.devices()[:4])
  q, k, v, bias, dy = draw(2, 130, 130, 4, 64)
  mask = padding(3, 130)[:2]
  kept = dropped(2, 4, 130)
  want = derivatives(plain, q, k, v, bias, mask, dy, kept)

  def on_mesh(*arrays):
    return tpu_attention.attend(*arrays, ('data', 'model'))

  split = NamedSharding(mesh, PartitionSpec('data', None, 'model'))
  with jax.set_mesh(mesh):
    q, k, v = (jax.device_put(x, split) for x in (q, k, v))
    got = derivatives(on_mesh, q, k, v, bias, mask, dy, kept)
  assert got[0].sharding.is_equivalent_to(split, 4)
  for one, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(one, expected, atol=1e-5)


def test_only_a_trained_bias_has_a_gradient():
  shape, mask = CASES['causal']
  q, k, v, bias, _ = draw(*shape)

  def outputs(argument):
    """Returns the number of outputs of each kernel that a gradient calls."""

    def loss(x):
      arrays = [q, k, v, bias]
      arrays[argument] = x
      return jnp.sum(tpu_attention.attend(*arrays, mask))

    jaxpr = jax.make_jaxpr(jax.grad(loss))([q, k, v, bias][argument])
    calls = [e for e in jaxpr.eqns if e.primitive.name == 'pallas_call']
    return [len(call.outvars) for call in calls]

  assert outputs(0) == [2, 3]
  assert outputs(3) == [2, 4]


@pytest.mark.parametrize(
  ('heads', 'head_dim', 'expected'),
  [(16, 64, 2), (6, 64, 2), (3, 64, 3), (8, 128, 1), (4, 256, 1), (8, 32, 4)],
)
def test_heads_that_fill_registers_are_a_group(heads, head_dim, expected):
  assert tpu_attention_kernels.group(heads, head_dim) == expected


def test_a_step_takes_as_many_heads_as_fit(monkeypatch):
  def at_once(length, megabytes, heads=16):
    monkeypatch.setattr(tpu, 'vmem', lambda: megabytes * 2**20)
    return tpu_attention.heads_at_once(length, length, heads, 64, False)

  assert at_once(612, 128) == 4  # v5e and v6e.
  assert at_once(612, 128, heads=6) == 2
  assert at_once(1124, 128) == 2
  assert at_once(612, 16) == 2  # v4.
  assert at_once(1124, 16) is None
  assert at_once(4096, 128) is None


@pytest.mark.parametrize('unit', [128, 256], indirect=True)
@pytest.mark.parametrize('queries', [128, 200, 256, 640])
def test_units_cover_the_queries_of_each_head_once(queries, unit):
  units = tpu_attention_kernels._units(queries, 4 * 64, 64)
  found = {head: [] for head in range(4)}
  for unit_of in units:
    for part in unit_of.parts:
      found[part.head] += [*range(part.queries.start, part.queries.stop)]
      assert part.columns.stop <= tpu_attention_kernels.matrix_unit()
  assert all(sorted(x) == [*range(queries)] for x in found.values())
  assert sum(x.last for x in units) == 2  # Of two heads each.


@pytest.mark.parametrize('unit', [256], indirect=True)
def test_what_is_left_of_two_heads_fills_the_matrix_unit(unit):
  *_, last = tpu_attention_kernels._units(640, 2 * 64, 64)
  assert [x.head for x in last.parts] == [0, 1]
  assert last.parts[1].columns == slice(128, 256)
