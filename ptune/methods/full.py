"""Full tuning: every parameter is trained, nothing is frozen.

This is the baseline of parameter-efficient methods ("model tuning" in Lester et
al. 2021). Pre-training uses it too.

    --gin_file=methods/full.gin
"""

from ptune.model.adapters import Method, take


def full() -> Method:
  """Trains all parameters of the network; adds no adapter."""
  return Method(name='full', placements=(), trainable=('*',), merge=take)
