"""Checks values against the annotations of the functions that receive them.

Gin passes any value to any parameter, so `models.Decoding.top_k = '5'` would
fail in the middle of a compilation. The annotations of ptune's functions give
the expected types.
"""

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ptune.errors import UserError

_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)


def check_bindings() -> None:
  """Checks the values that gin has bound to ptune's functions.

  References and macros have no value yet, so they are skipped.

  Raises:
    UserError: It lists each value that does not have the annotated type.
  """
  import gin

  wrong = []
  for (_, selector), bound in gin.config._CONFIG.items():
    function = gin.config._REGISTRY[selector].wrapped
    if getattr(function, '__module__', '').startswith('ptune.'):
      where = '.'.join(selector.split('.')[-2:])
      if isinstance(function, type):
        function = function.__init__
      wrong += _wrong(bound, _hints(function), f'{where}.')
  if wrong:
    raise UserError('\n'.join(sorted(wrong)))


def check_fields(dataclass: Any) -> None:
  """Checks the fields of a dataclass.

  Raises:
    UserError: It lists each value that does not have the annotated type.
  """
  hints = _hints(type(dataclass))
  wrong = _wrong({name: getattr(dataclass, name) for name in hints}, hints)
  if wrong:
    raise UserError('\n'.join(sorted(wrong)))


def _wrong(
  values: Mapping[str, Any], hints: Mapping[str, Any], where: str = ''
) -> list[str]:
  return [
    f'{where}{name} is {value!r}; expected {text(hints[name])}'
    for name, value in values.items()
    if name in hints and not fits(value, hints[name])
  ]


def _hints(annotated: Callable[..., Any]) -> dict[str, Any]:
  """Returns the annotations of a function's parameters, or a class's fields."""
  try:
    return typing.get_type_hints(inspect.unwrap(annotated))
  except NameError:  # The name's module is imported only for type checking.
    return {}


def fits(value: Any, hint: Any) -> bool:
  """Returns whether a value has an annotated type; True if we cannot tell.

  A whole number is also a number. A boolean, NaN or infinity is not a number.
  A list counts as a tuple.
  """
  import gin

  if isinstance(value, gin.config.ConfigurableReference):
    return True
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return any(fits(value, one) for one in inner)
  if hint in (None, type(None)):
    return value is None
  if hint in (bool, str):
    return type(value) is hint
  if hint is int:
    return type(value) is int and abs(value) < 2**63
  if hint is float:
    return type(value) in (int, float) and math.isfinite(value)
  if origin is typing.Literal:
    return value in inner
  if origin in _LISTS:
    items = [one for one in inner if one is not Ellipsis]
    return isinstance(value, list | tuple) and (
      len(items) != 1 or all(fits(one, items[0]) for one in value)
    )
  if origin in (dict, collections.abc.Mapping):
    return isinstance(value, Mapping) and all(
      fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items()
    )
  if origin is collections.abc.Callable or getattr(hint, '_is_protocol', False):
    return callable(value)
  if hint is typing.Any or not isinstance(hint, type):
    return True
  # Gin's literals have no other classes.
  plain = value is None or isinstance(value, str | int | float | Sequence)
  return not plain or isinstance(value, hint) or hint is object


def text(hint: Any) -> str:
  """Returns a type in words: 'a number, or None'."""
  words = {
    None: 'None',
    type(None): 'None',
    bool: 'True or False',
    str: 'a text in quotes',
    int: 'a whole number',
    float: 'a number',
  }
  if hint in words:
    return words[hint]
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return ', or '.join(dict.fromkeys(map(text, inner)))
  if origin is typing.Literal:
    return ' or '.join(map(repr, inner))
  if origin in _LISTS:
    return f'a list, each {text(inner[0])}'
  if origin in (dict, collections.abc.Mapping):
    return 'a dict'
  return 'a reference, such as @module.function'
