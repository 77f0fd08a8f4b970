"""The suite; `conftest` says how its programs are compiled and run."""

import itertools

# Most programs run a few times only: without XLA's newest emitters for loops
# they are compiled in half of the time.
QUICK_FLAGS = '--xla_cpu_use_fusion_emitters=false'

_numbers = itertools.count()


def new_name(prefix: str) -> str:
  """Returns a name to register.

  SeqIO's registries take a name once, and a mixture reads its tasks in the
  order of their names: later ones come later.
  """
  return f'{prefix}_{next(_numbers):05d}'
