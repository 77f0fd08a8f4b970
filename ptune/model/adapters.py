"""Adapters, and the one hook through which a network is changed.

The network names its *sites*, the places where a method may change something,
and calls `adapt` at each. A site has a path, for example `encoder/embed` or
`encoder/layers_0/attention/key`. A `Placement` puts an adapter at every site
that its pattern matches. An adapter is a Flax module `__call__(x, y) -> y`: x
is the input of the site, y its output, and the result replaces y.

    soft prompt   encoder/embed                    concat(prompt, y)
    IA3           */layers_*/attention/key         y * scale
    LoRA          */layers_*/attention/query       y + x A B

A parameter-efficient method is a `Method`: its placements, and the parameters
that it trains.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from ptune.errors import UserError

# Ids from here on are virtual tokens, see `Packed`.
VIRTUAL = 2**30
# Padding in the tokens that adapters see, whatever the model's own pad id is.
PADDING = -1
# Reads rows of a base's token embedding: ids [n] -> [n, embed] float32.
Rows = Callable[[Sequence[int]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Placement:
  """An adapter at every site that a pattern matches.

  Attributes:
    site: Path pattern; `*` matches any text within one path component.
    name: Name of the adapter's parameters below the module that owns the site.
    adapter: Makes the adapter, called with `name=`. Each site gets a new
      module, so two sites never share parameters.
  """

  site: str
  name: str
  adapter: Callable[..., nn.Module] = dataclasses.field(compare=False)
  # Two placements are equal if they make equal adapters. So a network is traced
  # once, although each program makes its own method.
  made: Any = dataclasses.field(init=False, repr=False)

  def __post_init__(self):
    object.__setattr__(self, 'made', _content(self.adapter))


def _content(value: Any) -> Any:
  """A partial as a tuple, because two partials are never equal."""
  if not isinstance(value, functools.partial):
    return value
  keywords = sorted(value.keywords.items())
  content = (
    value.func,
    *map(_content, value.args),
    *((name, _content(x)) for name, x in keywords),
  )
  try:
    hash(content)
  except TypeError:  # For example, an array.
    return value
  return content


@dataclasses.dataclass(frozen=True)
class Packed:
  """How a method reads packed rows, which hold several examples.

  Each example needs its own copy of the prompt. The data makes the places: it
  inserts *virtual tokens*, ids from VIRTUAL on, into each example, and an
  adapter replaces the token VIRTUAL + i by row i of the prompt. Masks,
  segments and distances follow from the tokens. See `data.packing`.

  Attributes:
    placements: Replace `Method.placements`; the parameters are the same.
    insert: For the stacks 'encoder' and 'decoder': how many tokens each example
      gets, and the function that inserts them, [length] -> [length + as many].
  """

  placements: tuple[Placement, ...]
  insert: Mapping[str, tuple[int, Callable[[np.ndarray], np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Method:
  """A method: its adapters, and the parameters that it trains.

  Attributes:
    name: Stored with a run. A run can only be resumed with the same method.
    placements: The adapters. Those at the same site are applied in this order.
    trainable: Path patterns of the parameters that are trained; all others are
      frozen. Here `*` matches any text, `/` included.
    prompt: For methods that have one, the path of the prompt [prompt, embed]
      among the folded parameters. A run writes it to `prompts/step_N.npy`.
    fold: Turns the trained parameters, by path, into those of a simpler method
      that gives the same answers. For example, it turns a network that computes
      a prompt into the prompt. Called with these and `Rows` of the base. None
      if there is nothing to fold.
    merge: Called with the path and value (float32, NumPy) of a base parameter
      and with the folded parameters. Returns the value of the parameter in a
      model without adapters that gives the same answers. None if there is no
      such model.
    settings: Arguments of the method's function that the names and shapes of
      the folded parameters do not tell, as JSON. Stored with a run and beside
      its parameters.
    check: Checks the encoder's input tokens [batch, length] of a batch, on the
      host, and raises a UserError if the adapters cannot read them.
    initial: Initialisers of `prompt_init`, by path pattern, for parameters
      that are initialised on the host; Flax initialises the others.
    packed: How the method reads packed rows; None if it reads them like others,
      because it inserts nothing.
  """

  name: str
  placements: tuple[Placement, ...]
  trainable: tuple[str, ...]
  prompt: str | None = None
  fold: Callable[[Mapping[str, Any], Rows], Mapping[str, Any]] | None = None
  merge: Callable[[str, Any, Mapping[str, Any]], Any] | None = None
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  check: Callable[[np.ndarray], None] | None = None
  initial: Mapping[str, Callable[..., Any]] = dataclasses.field(
    default_factory=dict
  )
  packed: Packed | None = None

  def trains(self, path: str) -> bool:
    """Whether a parameter, such as `encoder/prompt/...`, is trained."""
    return any(fnmatch.fnmatchcase(path, p) for p in self.trainable)


def take(path: str, value: Any, trained: Mapping[str, Any]) -> Any:
  """`Method.merge` for methods that train parameters of the base itself."""
  return trained.get(path, value)


def combine(methods: Sequence[Method]) -> Method:
  """Several methods as one, such as a prompt together with LoRA.

  The trained parameters of all methods are written together. They can be merged
  if those of each method can.

  Raises:
    UserError: If two of them have an adapter of the same name at a site.
  """
  places = [(p.site, p.name) for m in methods for p in m.placements]
  twice = sorted({place for place in places if places.count(place) > 1})
  if twice or not methods:
    raise UserError(
      f'methods {[m.name for m in methods]} cannot be combined: there must be'
      f' one at least, and these (site, name) are taken twice: {twice}'
    )

  def own(method, trained):
    return {path: x for path, x in trained.items() if method.trains(path)}

  def fold(trained, rows):
    folded = {}
    for method in methods:
      mine = own(method, trained)
      folded |= method.fold(mine, rows) if method.fold else mine
    return folded

  def merge(path, value, trained):
    # The kernel of `wo` reads the output of `hidden`, so an adapter at `hidden`
    # (IA3) scales what others (LoRA) add to the kernel, in any order.
    last = lambda m: any(p.site.endswith('/hidden') for p in m.placements)
    ordered = sorted(methods, key=last) if '/wo/' in path else methods
    for method in ordered:
      assert method.merge is not None
      value = method.merge(path, value, trained)
    return value

  def check(tokens):
    for method in methods:
      if method.check:
        method.check(tokens)

  as_they_are = [m.packed or Packed(m.placements, {}) for m in methods]
  packed = Packed(
    placements=tuple(p for one in as_they_are for p in one.placements),
    insert={stack: x for one in as_they_are for stack, x in one.insert.items()},
  )
  # Two insertions into one stack would read each other's virtual tokens.
  alone = len(packed.insert) == sum(len(one.insert) for one in as_they_are)

  return Method(
    name='+'.join(method.name for method in methods),
    placements=tuple(p for m in methods for p in m.placements),
    trainable=tuple(p for m in methods for p in m.trainable),
    fold=fold if any(m.fold for m in methods) else None,
    merge=merge if all(m.merge for m in methods) else None,
    settings={'methods': [dict(m.settings) for m in methods]},
    check=check,
    initial={path: init for m in methods for path, init in m.initial.items()},
    packed=packed if alone and packed.insert else None,
  )


def matches(pattern: str, path: str) -> bool:
  """Whether a site pattern matches a path, component by component."""
  patterns, parts = pattern.split('/'), path.split('/')
  return len(patterns) == len(parts) and all(
    map(fnmatch.fnmatchcase, parts, patterns)
  )


def placed(
  module: nn.Module, placements: Iterable[Placement], site: str
) -> list[Placement]:
  """The placements whose pattern matches a site of a module."""
  path = '/'.join((*module.path, site))
  return [p for p in placements if matches(p.site, path)]


def adapt(
  module: nn.Module,
  placements: Iterable[Placement],
  site: str,
  x: jax.Array,
  y: jax.Array,
) -> jax.Array:
  """Applies the adapters at a site to its output.

  Call it in a compact method of `module`. The result is also sown into the
  collection `intermediates`, as `<site>_site`: there `structure.sites` finds
  the names of sites, and analyses find the values.

  Args:
    module: The module that owns the site.
    placements: All placements of the network.
    site: Name of the site within the module.
    x: The input of the site.
    y: Its output.

  Returns:
    y, changed by the adapters. Its length may have changed too; masks are made
    afterwards, from its shape.
  """
  for placement in placed(module, placements, site):
    y = placement.adapter(name=placement.name)(x, y)
  module.sow('intermediates', f'{site}_site', y)
  return y
