"""Gin files and --gin flags: finds, reads and checks them.

Gin silently accepts some mistakes, such as a macro that nothing reads, or a
file that overrides another because it comes later. This module refuses them. It
also turns gin's other errors into one line that suggests the nearest right
name.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ptune.config import annotations, gin_source, macros
from ptune.config.gin_source import Reference, Source
from ptune.config.macros import MACROS, flag
from ptune.errors import UserError, nearest

# Macros that a user sets by choosing a file of such a directory. The file sets
# related macros too.
CHOICES = {
  'MODEL': (('models',), ()),
  'METHOD': (('methods', 'prompts'), ('OPTIMIZER', 'LEARNING_RATE')),
}
# The file that is read if no file and no binding sets MODEL.
DEFAULT_MODEL = 'models/from_checkpoint.gin'
KINDS = ('losses', 'methods', 'models', 'prompts', 'runs', 'studies', 'tasks')

# @configurable, configurable.parameter = value, and the head of a block.
_NAMES = re.compile(r'@([\w.]+)|^([\w.]+)\.\w+\s*=|^([\w.]+):', re.MULTILINE)


# A file and the files that it includes: the file first.
Sources = dict[pathlib.Path, Source]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Gin files and flags after `read` has checked them.

  Attributes:
    files: Paths, in the order in which gin must read them.
    bindings: Flags, which gin reads last.
    folders: The directories that gin searches for files.
    sources: All files, including the files that others include.
  """

  files: Sequence[pathlib.Path]
  bindings: Sequence[Source]
  folders: Sequence[str]
  sources: Sources

  @property
  def all(self) -> list[Source]:
    return [*self.sources.values(), *self.bindings]


def own_directory() -> pathlib.Path:
  """Returns the directory of ptune's own gin files."""
  # In a wheel, `ptune.gin` is inside the package; in a checkout, beside it.
  package = pathlib.Path(__file__).resolve().parents[1]
  inside = package / 'gin'
  return inside if inside.is_dir() else package.parent / 'gin'


def own_files(kinds: Iterable[str] = KINDS) -> list[str]:
  """Returns the names of ptune's own files, such as 'runs/train.gin'."""
  directory = own_directory()
  return sorted(
    str(path.relative_to(directory))
    for kind in kinds
    for path in directory.glob(f'{kind}/*.gin')
  )


def find(file: str, search_paths: Iterable[str] = ()) -> pathlib.Path:
  """Returns the path of a gin file.

  Raises:
    UserError: If there is no such file; the error suggests the nearest names.
  """
  places = [*search_paths, '.', str(own_directory())]
  for place in places:
    path = pathlib.Path(place, os.path.expanduser(file))
    if path.is_file():
      return path.resolve()
  raise UserError(
    f'there is no gin file {file!r} in {", ".join(places)}'
    + nearest(file, own_files())
  )


def parse(
  files: Sequence[str],
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  program: Callable[..., object] | None = None,
) -> None:
  """`read`s gin files and bindings, then `bind`s their values."""
  bind(read(files, bindings, search_paths), program)


def read(
  files: Sequence[str],
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
) -> Settings:
  """Reads gin files and bindings, and checks every macro; imports nothing.

  The order of the files makes no difference: each of ptune's own files sets
  different macros, the user's files are read after them, and the bindings last.

  Args:
    files: Names of gin files.
    bindings: The texts after `--gin.`; a later one replaces an earlier one.
    search_paths: Directories to search, before the working directory and
      ptune's own.

  Raises:
    UserError: If a file or macro is unknown or unreadable, two files set the
      same macro, or a macro has an invalid value.
  """
  own = own_directory()
  found = sorted({find(file, search_paths) for file in files})
  folders = [*(str(pathlib.Path(p).resolve()) for p in search_paths), str(own)]
  flags = [gin_source.read_flag(binding) for binding in bindings]
  sources = {path: _with_includes(path, folders) for path in found}
  if _lacks('MODEL', sources, flags):
    path = own / DEFAULT_MODEL
    sources[path] = _with_includes(path, folders)
  ours = {p: s for p, s in sources.items() if p.is_relative_to(own)}
  yours = {p: s for p, s in sources.items() if p not in ours}
  everything: Sources = {}
  for some in sources.values():
    everything |= some
  for group in (ours, yours):
    _check_one_sets_each(group, own)
  _check_one_choice(everything, own)
  settings = Settings([*ours, *yours], flags, folders, everything)
  _check_known(settings, yours)
  values: dict[str, Any] = {}
  for path in settings.files:
    for source in _in_order(path, everything, folders):
      values |= source.macros
  for source in flags:
    values |= source.macros
  resolved = {name: _resolved(name, values) for name in values}
  macros.check({k: v for k, v in resolved.items() if _is_literal(v)})
  return settings


def bind(
  settings: Settings, program: Callable[..., object] | None = None
) -> None:
  """Gives the settings to gin, and imports the modules that the files name.

  Args:
    settings: The result of `read`.
    program: The program to run. If it is given, we check that it can run.

  Raises:
    UserError: If a name is unknown, a module cannot be imported, a value does
      not have its parameter's type, or macros are unset or have no effect.
  """
  import gin

  texts = [source.text for source in settings.sources.values()]
  for folder in settings.folders:
    gin.add_config_file_search_path(folder)
  # Keep gin from searching Python's packages: it takes a directory runs/ for a
  # package, and fails. `read` has already found all files.
  reader = functools.partial(open, encoding='utf-8-sig')
  gin.config._FILE_READERS[:] = [(reader, os.path.isfile)]
  for path in settings.files:
    with _one_line(texts):
      gin.parse_config_file(str(path))
  for binding in settings.bindings:
    with _one_line(texts, binding.text):
      gin.parse_config(binding.text)
  annotations.check_bindings()
  if program is not None:
    _check_needed(program)
    _check_read(settings)
  # Not finalised: a task's module, imported later, may define configurables.


@contextlib.contextmanager
def isolated() -> Iterator[None]:
  """Runs the code inside with an empty gin config; restores the old one."""
  import gin
  from gin import config

  state = (config._CONFIG, config._OPERATIVE_CONFIG, config._SINGLETONS)
  imports = config._IMPORTS
  kept, kept_imports = [dict(part) for part in state], set(imports)
  locked = gin.config_is_locked()
  gin.clear_config()
  try:
    yield
  except UserError as error:
    raise UserError(message(error)) from None
  finally:
    gin.clear_config()
    for part, before in zip(state, kept, strict=True):
      part.update(before)
    imports |= kept_imports
    config._set_config_is_locked(locked)


# --------------------------------------------------------------------- sources


def message(error: Exception) -> str:
  """An error's message, without what gin adds about its configurables."""
  return re.sub(r'\n\s*In call to configurable .*', '', str(error))


def _included(
  path: pathlib.Path, file: str, folders: Iterable[str]
) -> pathlib.Path:
  """Returns the path of an included file."""
  for place in ('.', *folders):
    if pathlib.Path(place, file).is_file():
      return pathlib.Path(place, file).resolve()
  raise UserError(
    f'{path} includes {file!r}, which is not in ., {", ".join(folders)}'
    + nearest(file, own_files())
  )


def _with_includes(path: pathlib.Path, folders: Sequence[str]) -> Sources:
  """Returns a file and all files that it includes, directly or not."""
  found: Sources = {}

  def add(path: pathlib.Path, above: tuple[pathlib.Path, ...]) -> None:
    if path in above:
      raise UserError(
        f'{" includes ".join(map(str, (*above, path)))}; remove one of these'
        ' includes'
      )
    if path not in found:
      found[path] = gin_source.read_file(path)
    for file in found[path].includes:
      add(_included(path, file, folders), (*above, path))

  add(path, ())
  return found


def _lacks(
  macro: str, sources: Mapping[pathlib.Path, Sources], flags: Sequence[Source]
) -> bool:
  """Returns whether a macro is read and nothing sets it."""
  given = [*flags, *(s for some in sources.values() for s in some.values())]
  return any(macro in source.reads for source in given) and not any(
    macro in source.macros for source in given
  )


def _in_order(
  path: pathlib.Path, sources: Sources, folders: Sequence[str]
) -> Iterator[Source]:
  """Returns a file and its includes in gin's order: the file itself is last.

  Files include others at their top; gin would read a later include later.
  """
  for file in sources[path].includes:
    yield from _in_order(_included(path, file, folders), sources, folders)
  yield sources[path]


def _resolved(name: str, values: Mapping[str, Any]) -> Any:
  """Returns a macro's value, with the macros in it replaced by their values."""

  def value_of(value: Any, above: tuple[str, ...]) -> Any:
    if isinstance(value, Reference):
      name = value.name.removeprefix('%')
      if value.name == name or name not in values:
        return value
      if name in above:
        circle = ' = %'.join((*above[above.index(name) :], name))
        raise UserError(f'{circle}: a macro cannot be its own value')
      return value_of(values[name], (*above, name))
    if isinstance(value, list | tuple):
      return type(value)(value_of(v, above) for v in value)
    if isinstance(value, dict):
      return {k: value_of(v, above) for k, v in value.items()}
    return value

  return value_of(values[name], (name,))


def _is_literal(value: Any) -> bool:
  """Returns whether a value is complete: gin has nothing left to resolve."""
  if isinstance(value, Reference):
    return False
  if isinstance(value, dict):
    value = [*value, *value.values()]
  return not isinstance(value, list | tuple) or all(map(_is_literal, value))


# ---------------------------------------------------------------------- checks


def _check_one_sets_each(
  group: Mapping[pathlib.Path, Sources], own: pathlib.Path
) -> None:
  """Refuses two files that set the same macro, such as two of models/."""
  set_by: dict[str, tuple[pathlib.Path, pathlib.Path]] = {}
  for path, sources in group.items():
    # A file may override the files that it includes.
    for source, text in sources.items():
      for key in text.sets:
        other, its_source = set_by.setdefault(key, (path, source))
        if other != path and its_source != source:
          both = _names(own, path, other)
          raise UserError(f'{both} both set {key}; choose one of them')


def _check_one_choice(sources: Sources, own: pathlib.Path) -> None:
  """Refuses two models or methods, even if a user's file includes one."""
  ours = {p: s for p, s in sources.items() if p.is_relative_to(own)}
  included = {
    _included(path, file, [str(own)])
    for path, source in ours.items()
    for file in source.includes
  }
  for macro, (kinds, _) in CHOICES.items():
    chosen = [
      path
      for path in ours
      if path.relative_to(own).parts[0] in kinds and path not in included
    ]
    if len(chosen) > 1:
      raise UserError(
        f'{_names(own, *chosen)} both set {macro}; choose one of them'
      )


def _names(own: pathlib.Path, *paths: pathlib.Path) -> str:
  return ' and '.join(
    sorted(
      str(path.relative_to(own) if path.is_relative_to(own) else path)
      for path in paths
    )
  )


def _check_known(
  settings: Settings, yours: Mapping[pathlib.Path, Sources]
) -> None:
  """Refuses macros that neither ptune knows nor any file reads."""
  known = set(MACROS).union(*(source.reads for source in settings.all))
  for source in settings.bindings:
    for macro in source.macros:
      if macro not in known:
        raise UserError(f'there is no macro {macro!r}{nearest(macro, known)}')
  for sources in yours.values():
    for path, source in sources.items():
      for macro in source.macros:
        if macro not in known:
          raise UserError(
            f'{path} sets {macro}, which nothing reads{nearest(macro, known)}'
          )


@contextlib.contextmanager
def _one_line(
  texts: Iterable[str], binding: str | None = None
) -> Iterator[None]:
  """Turns gin's error about a file or binding into one line with the fix.

  Args:
    texts: The texts of all gin files, which provide the names to suggest.
    binding: The binding, if gin was reading one and not a file.
  """
  where = '' if binding is None else f'--gin.{binding}: '
  try:
    yield
  except (ValueError, ImportError, AttributeError) as error:
    # After gin's message come the file and line, and the text of that line.
    message, *rest = str(error).strip().splitlines()
    if binding is None:
      where = ''.join(f'{part.strip()}: ' for part in rest)
    names = [n for t in texts for m in _NAMES.findall(t) for n in m if n]
    near = ''
    if match := re.search(r"matching (?:reference )?'@?([\w.]+)", message):
      near = nearest(match[1], names)
    if match := re.search(r"'([\w.]+)' doesn't have a parameter", message):
      parameter = message.rstrip("'.").split("'")[-1]
      near = nearest(parameter, _parameters(match[1]))
    raise UserError(f'{where}{message.rstrip(".")}{near}') from error


def _parameters(configurable: str) -> list[str]:
  import gin

  found = gin.get_configurable(configurable)
  # Gin makes a subclass of a class; the subclass's __init__ takes anything.
  original = found.__mro__[1] if isinstance(found, type) else found
  return list(inspect.signature(original).parameters)


def _check_needed(program: Callable[..., object]) -> None:
  """Refuses a command without a file of runs/, or with unset macros.

  The error names all macros that are missing.
  """
  import gin

  module = program.__module__.rpartition('.')[2]
  try:
    bound = gin.get_bindings(program, resolve_references=False)
  except ValueError:  # No file has imported it.
    bound = {}
  if not bound:
    files = [f for f in own_files(['runs']) if _mentions(f, f'{module}.')]
    raise UserError(
      'no gin file says which program to run; add'
      f' --gin_file={" or --gin_file=".join(files)}'
    )
  config = gin.config_str()
  source = gin_source.parse(config)
  missing = source.reads - set(source.macros)
  lines = []
  for name, (kinds, others) in CHOICES.items():
    if name in missing:
      missing -= {name, *others}
      files = ', '.join(own_files(kinds))
      lines.append(f'{name}, by a --gin_file: one of {files}, or your own')
  for name in sorted(missing):
    what = MACROS[name].what if name in MACROS else 'read by your gin files'
    lines.append(f'{name} ({what}), for example {flag(name)}')
  if lines:
    raise UserError('to be set: ' + '\n  and '.join(lines))


def _mentions(file: str, text: str) -> bool:
  return text in (own_directory() / file).read_text()


def _check_read(settings: Settings) -> None:
  """Refuses macros on the command line that have no effect."""
  read = frozenset().union(*(source.reads for source in settings.all))
  for source in settings.bindings:
    for name in source.macros:
      if name in read:
        continue
      readers = [f for f in own_files() if _mentions(f, f'%{name}\n')]
      raise UserError(
        f'--gin.{name} has no effect: no gin file reads it'
        + (f'; {" and ".join(readers)} would' if readers else '')
        + nearest(name, read, most=0)
      )
