"""ptune: soft prompts for frozen T5-family models, in JAX.

    import ptune
    tuned = ptune.tune('ptune://tiny', train, validation=dev, steps=300)
    tuned.predict(['so insightful'])

Importing the package loads nothing heavy: its names are loaded when they are
used, and so are its modules, such as `ptune.model.network`.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from ptune.api import Bank, Base, Tuned, bank, load, tune

__version__ = '0.1.0'

# In a checkout, `tasks/` is beside this package; in an installed ptune, it is
# inside. Python that starts in the checkout finds this package first.
_beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_beside, 'tasks', 'registry.py')):
  __path__.append(_beside)

__all__ = ['Bank', 'Base', 'Tuned', 'bank', 'load', 'tune']


def __getattr__(name: str) -> Any:
  """Loads a name of `ptune.api` when it is first used."""
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  importlib.import_module('ptune.host.collector').collect_rarely()
  found = getattr(importlib.import_module('ptune.api'), name)
  globals()[name] = found
  return found


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
