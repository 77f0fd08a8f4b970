"""Norm tuning: the scales of the layer norms are trained.

Ben Zaken, Goldberg and Ravfogel 2021, "BitFit" (arXiv 2106.10199), trains the
biases of a model. T5 has none. Its closest parameters are the scales s of

    s * x / sqrt(mean(x^2))

before each sublayer and at the end of both stacks, as in Qi et al. 2022,
"Parameter-Efficient Tuning on Layer Normalization" (arXiv 2211.08682).

Trained: these scales and, with relative_bias, the relative position bias of
each stack. Nothing is added to the model. The merged model has the trained
scales instead of the base's.

    --gin_file=methods/norms.gin
"""

from ptune.model.adapters import Method, take


def norms(relative_bias: bool = False) -> Method:
  """The scales of all layer norms; the rest is frozen.

  Args:
    relative_bias: Whether the relative position bias is trained too.
  """
  bias = ('*/relpos_bias/rel_embedding',) if relative_bias else ()
  return Method(
    name='norms',
    placements=(),
    trainable=('*_norm/scale', *bias),
    merge=take,
    settings={'relative_bias': relative_bias},
  )
