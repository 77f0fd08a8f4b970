"""Full tuning: every parameter is trained, nothing is frozen.

The baseline that a parameter-efficient method is compared with ("model
tuning" in Lester et al. 2021), and what pre-training uses.

    --gin_file=methods/full.gin
"""

from ptune.model.adapters import Method, take


def full() -> Method:
  """Trains all parameters of the network as it is."""
  return Method(name='full', placements=(), trainable=('*',), merge=take)
