"""The test suite. `conftest` sets how programs are compiled and run."""

import itertools

# Tests run most programs only a few times. Without XLA's newest loop emitters,
# compiling takes half as long.
QUICK_FLAGS = '--xla_cpu_use_fusion_emitters=false'

_numbers = itertools.count()


def new_name(prefix: str) -> str:
  """Returns a new name to register with SeqIO.

  SeqIO's registries accept each name only once. A mixture reads its tasks in
  the order of their names, and later calls return names that sort later.
  """
  return f'{prefix}_{next(_numbers):05d}'
