"""Adapters, and the one hook through which a network is changed.

The network names its *sites*, the places where something may be changed, and
calls `adapt` at each. A site is addressed by its path, for example
`encoder/embed` or `encoder/layers_0/attention/key`; a `Placement` puts an
adapter at every site that its pattern matches. An adapter is a Flax module
`__call__(x, y) -> y`: x went into the site, y came out of it, and what is
returned takes y's place.

    soft prompt   encoder/embed                    concat(prompt, y)
    IA3           */layers_*/attention/key         y * scale
    LoRA          */layers_*/attention/query       y + x A B

A parameter-efficient method is a `Method`: its placements, and which
parameters it trains.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from ptune.errors import UserError

# Ids from here on are no token's: see `Packed`.
VIRTUAL = 2**30
# Stands for padding in the tokens that the encoder's sites read, whatever the
# model's own id for it is.
PADDING = -1
# Reads rows of a base's token embedding: ids [n] -> [n, embed] float32.
Rows = Callable[[Sequence[int]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Placement:
  """An adapter at every site that a pattern matches.

  Attributes:
    site: Path pattern; `*` stands for any text within one path component.
    name: Name of the adapter's parameters below the module that owns the site.
    adapter: Makes the adapter; called with `name=`. A fresh module is made at
      each site, so that two sites never share parameters.
  """

  site: str
  name: str
  adapter: Callable[..., nn.Module]


@dataclasses.dataclass(frozen=True)
class Packed:
  """How a method reads rows that hold several examples, see `packing`.

  Where an adapter would insert something before each example, the data keeps
  the places instead: it puts *virtual tokens* among those of the example, ids
  from VIRTUAL on, and an adapter reads row i of a prompt at VIRTUAL + i. So
  every example has a copy of its own, where it would have it alone; masks,
  segments and distances follow from the tokens.

  Attributes:
    placements: In place of `Method.placements`; the parameters are the same.
    insert: By stack, 'encoder' or 'decoder': by how many tokens an example
      grows, and what puts them among its own, [length] -> [length + as many].
  """

  placements: tuple[Placement, ...]
  insert: Mapping[str, tuple[int, Callable[[np.ndarray], np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Method:
  """What is added to a network, and what of it is trained.

  Attributes:
    name: Stored with a run, which cannot be resumed with another method.
    placements: The adapters, applied in this order where they share a site.
    trainable: Path patterns of the parameters that are trained; here `*`
      stands for any text, `/` included. All others are frozen.
    prompt: Path of the [prompt, embed] array, among the folded parameters,
      that is written as `prompts/step_N.npy`, for methods that have one.
    fold: Turns the trained parameters, by path, into those of a simpler method
      that answers the same, such as a network that makes a prompt into the
      prompt. Called with these and `Rows` of the base. None where there is
      nothing to fold.
    merge: Called with the path and the value (float32, NumPy) of a base
      parameter, and the folded parameters; returns what the parameter is in a
      model of the base's own shape that answers the same. None where there is
      no such model.
    settings: What the folded parameters mean, where their names and shapes do
      not tell: arguments of the method's function, as JSON has them. Stored
      with a run and beside its parameters.
    check: Looks at the encoder's input tokens [batch, length] of a batch, on
      the host, and raises a ValueError for what the adapters cannot read.
    initial: Initialisers of `prompt_init`, by path pattern, for parameters
      whose first value is made on the host; the others have Flax's.
    packed: How it reads packed rows, where it inserts something; a method that
      inserts nothing reads them as they are.
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
    """Whether the parameter at `path`, such as `encoder/prompt/...`, learns."""
    return any(fnmatch.fnmatchcase(path, p) for p in self.trainable)


def take(path: str, value: Any, trained: Mapping[str, Any]) -> Any:
  """`Method.merge` of methods that train parameters of the base itself."""
  return trained.get(path, value)


def combine(methods: Sequence[Method]) -> Method:
  """Several methods as one: a prompt together with LoRA, say.

  Their adapters are placed, and what each trains is trained. Trained
  parameters are written together; they can be merged if those of each can.

  Raises:
    ValueError: If two of them have an adapter of the same name at a site.
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
    # The kernel of `wo` reads what leaves `hidden`: what is done there comes
    # after all that is added to the kernel, whichever method stands first.
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
  # Two insertions into one stack would take each other's virtual tokens.
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
  """Those of the placements that stand at a site of a module."""
  path = '/'.join((*module.path, site))
  return [p for p in placements if matches(p.site, path)]


def adapt(
  module: nn.Module,
  placements: Iterable[Placement],
  site: str,
  x: jax.Array,
  y: jax.Array,
) -> jax.Array:
  """Lets the adapters placed at a site change what comes out of it.

  To be called in a compact method of `module`. What leaves the site is also
  sown into the `intermediates` collection, under `<site>_site`, where
  `structure.sites` finds the names and an analysis finds the values.

  Args:
    module: The module that owns the site.
    placements: All placements of the network; those that match are used.
    site: Name of the site within the module.
    x: What went into the site.
    y: What came out of it.

  Returns:
    y, changed by the adapters. Its length may differ from the given one: masks
    are made from array shapes afterwards.
  """
  for placement in placed(module, placements, site):
    y = placement.adapter(name=placement.name)(x, y)
  module.sow('intermediates', f'{site}_site', y)
  return y
