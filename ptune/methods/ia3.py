"""IA3: learned scales of keys, values and the MLP's hidden units.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal and Raffel 2022, "Few-Shot
Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
(arXiv 2205.05638), section 3.3. In every attention, of encoder and decoder,
and in every MLP

    softmax(Q (l_k * K)^T) (l_v * V)        wo (l_ff * hidden)

with l_k and l_v [heads, kv], l_ff [mlp]. All start at 1, so training starts
from the model as it is. `hidden` is the gated product in T5 1.1, and relu(wi x)
in T5 1.0.

Trained: the three vectors of each layer. Merging multiplies l_k and l_v into
the columns of the key and value kernels, and l_ff into the rows of wo.

    --gin_file=methods/ia3.gin
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.model.adapters import Method, Placement

# Site -> name of the adapter below the attention or the MLP (users of T5X know
# these names), and logical axes of the vector.
_HEADS = ('adapter_heads', 'adapter_kv')
SITES = {
  '*attention/key': ('k_conv', _HEADS),
  '*attention/value': ('v_conv', _HEADS),
  'mlp/hidden': ('intermediate_conv', ('adapter_hidden',)),
}
SCALING = 'ia3_scaling'


class Scale(nn.Module):
  """Multiplies the output of a site by a vector, at every position."""

  axes: tuple[str, ...]

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, length, *shape] -> the same shape."""
    del x
    scaling = partitioning.param_with_axes(
      SCALING, nn.initializers.ones, y.shape[2:], jnp.float32, axes=self.axes
    )
    return y * scaling.astype(y.dtype)[None, None]


def _merge(path, value, trained):
  module, _, kernel = path.removesuffix('/kernel').rpartition('/')
  name = {'key': 'k_conv', 'value': 'v_conv', 'wo': 'intermediate_conv'}
  scaling = trained.get(f'{module}/{name.get(kernel)}/{SCALING}')
  if scaling is None:
    return value
  scaling = np.reshape(scaling, -1)
  return value * (scaling[:, None] if kernel == 'wo' else scaling[None, :])


def ia3() -> Method:
  """IA3's vectors at every attention and MLP; the rest is frozen."""
  return Method(
    name='ia3',
    placements=tuple(
      Placement(
        f'*/layers_*/{site}',
        name,
        # The default binds `axes` now, before the loop changes it.
        lambda name, axes=axes: Scale(axes, name=name),
      )
      for site, (name, axes) in SITES.items()
    ),
    trainable=(f'*/{SCALING}',),
    merge=_merge,
  )
