"""Bottleneck adapters: a narrow MLP at every sublayer.

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan and
Gelly 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751),
section 2.1. A sublayer (an attention or an MLP) maps its input x to y. Before y
is added to the residual stream, the adapter turns it into

    sequential    y + relu(y D) U
    parallel      y + relu(x D) U     (He et al. 2022, arXiv 2110.04366)

D [embed, bottleneck], U [bottleneck, embed], without biases because T5 has
none; x is the input after the norm. U starts at zero, so training starts from
the model as it is.

Trained: D and U of every sublayer.

    --gin_file=methods/bottleneck.gin
"""

import functools

import jax
from flax import linen as nn

from ptune.errors import UserError
from ptune.methods.adapter_layers import narrow_mlp
from ptune.model.adapters import Method, Placement

PLACES = ('sequential', 'parallel')


class Bottleneck(nn.Module):
  """Adds the output of a narrow MLP to that of a sublayer.

  Attributes:
    size: Hidden units.
    parallel: Whether the MLP reads the input of the sublayer, not its output.
  """

  size: int
  parallel: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """x and y [batch, length, embed] -> the same shape."""
    return y + narrow_mlp(
      (x if self.parallel else y).astype(y.dtype),
      self.size,
      names=('down', 'up'),
      axes=('adapter_in', 'adapter_hidden', 'adapter_out'),
      features=y.shape[-1],
      last_init=nn.initializers.zeros,
    )


def bottleneck(size: int = 64, place: str = 'sequential') -> Method:
  """An adapter at every attention and MLP; the rest is frozen.

  Args:
    size: Hidden units.
    place: 'sequential' or 'parallel'.

  Raises:
    UserError: If the size is below 1 or the place is unknown.
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
