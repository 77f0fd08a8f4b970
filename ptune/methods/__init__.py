"""Parameter-efficient methods, one per module; see `adapters.Method`.

A method knows the sites of a network, but no network, data or files of a run.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from ptune.errors import UserError
from ptune.model.adapters import Method, combine


def functions() -> dict[str, Callable[..., Method]]:
  """All methods by name: the functions that have the name of their module."""
  found = {}
  for module in pkgutil.iter_modules(__path__):
    of = importlib.import_module(f'{__name__}.{module.name}')
    if hasattr(of, module.name):
      found[module.name] = getattr(of, module.name)
  return found


def make(name: str, settings: Mapping[str, Any] | None = None) -> Method:
  """Makes the method of a run again, except for its sizes.

  Args:
    name: The run's `Method.name`, such as 'lora', 'prefix/mlp', 'prompt+lora'.
    settings: The run's `Method.settings`.

  Raises:
    UserError: If there is no such method.
  """
  settings = dict(settings or {})
  if '+' in name:
    parts = zip(name.split('+'), settings['methods'], strict=True)
    return combine([make(*part) for part in parts])
  known = functions()
  function = known.get(name.partition('/')[0])
  if function is None:
    raise UserError(f'no method {name!r}; there are {sorted(known)}')
  return function(**settings)
