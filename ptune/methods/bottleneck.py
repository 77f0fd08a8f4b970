"""Bottleneck adapters: a narrow MLP at every sublayer.

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan and
Gelly 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751),
section 2.1. What a sublayer (an attention or an MLP) makes of its input x is,
before it is added to the residual stream,

    sequential    y + relu(y D) U
    parallel      y + relu(x D) U     (He et al. 2022, arXiv 2110.04366)

D [embed, bottleneck], U [bottleneck, embed], without biases, as T5 has none. U
starts at zero, so that the model starts as it is; x is behind the norm.

Trained: D and U of every sublayer.

    --gin_file=methods/bottleneck.gin
"""

import functools

import jax
from flax import linen as nn

from ptune.errors import UserError
from ptune.model.adapters import Method, Placement
from ptune.model.layers import Dense

PLACES = ('sequential', 'parallel')


class Bottleneck(nn.Module):
  """See the module.

  Attributes:
    size: Units in the middle.
    parallel: Whether it reads what went into the sublayer.
  """

  size: int
  parallel: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """[batch, length, embed], both -> the same shape."""
    h = Dense(
      self.size, ('adapter_in', 'adapter_hidden'), y.dtype, name='down'
    )(x if self.parallel else y)
    return y + Dense(
      y.shape[-1],
      ('adapter_hidden', 'adapter_out'),
      y.dtype,
      kernel_init=nn.initializers.zeros,
      name='up',
    )(nn.relu(h))


def bottleneck(size: int = 64, place: str = 'sequential') -> Method:
  """An adapter at every attention and MLP; the rest is frozen.

  Args:
    size: Units in the middle.
    place: 'sequential' or 'parallel'.

  Raises:
    ValueError: If the size is below 1, or the place unknown.
  """
  if size < 1:
    raise UserError(f'bottleneck size is {size}; it must be at least 1')
  if place not in PLACES:
    raise UserError(f'bottleneck place {place!r} is not one of {PLACES}')
  adapter = functools.partial(
    Bottleneck, size=size, parallel=place == 'parallel'
  )
  return Method(
    name='bottleneck',
    placements=(
      # The encoder's attention, and both of the decoder's.
      Placement('encoder/layers_*/attention', 'attention_adapter', adapter),
      Placement(
        'decoder/layers_*/self_attention', 'self_attention_adapter', adapter
      ),
      Placement(
        'decoder/layers_*/encoder_decoder_attention',
        'encoder_decoder_attention_adapter',
        adapter,
      ),
      Placement('*/layers_*/mlp', 'mlp_adapter', adapter),
    ),
    trainable=('*_adapter/*',),
    settings={'place': place},
  )
