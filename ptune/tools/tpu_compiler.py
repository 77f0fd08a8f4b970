"""What the TPU's own compiler says about a program, without a TPU.

libtpu (`pip install 'jax[tpu]'`) compiles for a slice that is not there. The
program that it returns carries the compiler's estimate of the cycles of each
fusion; `estimate` adds them up, loops as often as they run.

It is an estimate, not a measurement:

- A fusion's cycles are what the compiler expects with all data in place. It
  overlaps copies from HBM with other work; that they do not have to be waited
  for is assumed.
- Collectives have no estimate. They are counted, with their bytes, and are not
  in the time.
- A Pallas kernel has none either. Where the bundles of its schedule are known
  (`dump_bundles`), they are counted as cycles: a lower bound, because waits for
  copies and for the matrix unit are not in them. No kernel counts less than its
  products take at the peak, or its arrays at the bandwidth. Elsewhere a kernel
  is taken to compute at a part of the peak, about what its schedules say:
  `Chip.kernel_rate` for attention with heads of 64, and `RATES`.
"""

import collections
import dataclasses
import functools
import glob
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ptune.errors import UserError
from ptune.model import tpu_cross_attention, tpu_sublayer


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the vendor says of a chip, and the slices it is sold in.

  All numbers are those of one device as JAX counts them: of a chip, or of half
  a v7x.

  Attributes:
    flops: Peak FLOP a second in bfloat16.
    bandwidth: Bytes a second from HBM.
    clock: Cycles a second.
    topologies: By the number of devices.
    per_chip: Devices in a chip.
    cores: Cores of a device, which share the steps of a kernel's grid.
    options: What libtpu is to know besides the topology.
    assumed_clock: Whether the clock is not known but assumed.
    kernel_rate: The part of the peak at which our kernels compute: a head of 64
      fills half of a matrix unit of 128, and a quarter of one of 256.
  """

  flops: float
  bandwidth: float
  clock: float
  topologies: Mapping[int, str]
  per_chip: int = 1
  cores: int = 1
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  assumed_clock: bool = False
  kernel_rate: float = 0.5


_FLAT = {
  1: '1x1',
  2: '1x2',
  4: '2x2',
  8: '2x4',
  16: '4x4',
  32: '4x8',
  64: '8x8',
  128: '8x16',
  256: '16x16',
}
_CUBES = {
  1: '1x1x1',
  4: '2x2x1',
  8: '2x2x2',
  16: '2x2x4',
  32: '2x4x4',
  64: '4x4x4',
  128: '4x4x8',
  256: '4x8x8',
  512: '8x8x8',
}
# Both cores of a v4 are one device to JAX; libtpu takes them for two.
_MEGACORE = {'chip_config_name': 'megacore'}

# The part of the peak at which other kernels compute, by their schedules on a
# v6e. Their products are as wide as the network.
RATES = {
  tpu_cross_attention.FORWARD: 0.7,
  tpu_cross_attention.BACKWARD: 0.7,
  tpu_sublayer.MLP: 0.9,
  tpu_sublayer.MLP_BACKWARD: 0.85,
  tpu_sublayer.PROJECT: 0.8,
  tpu_sublayer.PROJECT_BACKWARD: 0.8,
  tpu_sublayer.OUTPUT: 0.75,
  tpu_sublayer.OUTPUT_BACKWARD: 0.75,
}

# By the names of `plan.ACCELERATORS`; libtpu calls v7x tpu7x. Peak and
# bandwidth are from the documentation of Google Cloud. The clock is the peak
# divided by the products that a device makes in a cycle. Nobody has published
# that of v7x: we assume that half a chip makes as many as a v6e does. At these
# clocks, the compiler expects a product of two 4096 x 4096 matrices at 88, 97,
# 96, 87 and 83 % of the peak.
CHIPS: Mapping[str, Chip] = {
  'v4': Chip(275e12, 1.228e12, 1.05e9, _CUBES, cores=2, options=_MEGACORE),
  'v5e': Chip(197e12, 0.819e12, 1.503e9, _FLAT),
  'v5p': Chip(459e12, 2.765e12, 1.75e9, _CUBES, cores=2),
  'v6e': Chip(918e12, 1.64e12, 1.75e9, _FLAT, kernel_rate=1 / 5),
  'v7x': Chip(
    *(2307e12 / 2, 7.38e12 / 2, 2.2e9),
    {2 * chips: shape for chips, shape in _CUBES.items()},
    per_chip=2,
    assumed_clock=True,
    kernel_rate=1 / 5,
  ),
}


def available() -> bool:
  """Whether libtpu is installed."""
  import importlib.util

  return importlib.util.find_spec('libtpu') is not None


def devices(chip: str, count: int) -> Sequence[Any]:
  """The devices of a slice, which can be compiled for but are not there.

  Args:
    chip: A name in `CHIPS`.
    count: How many devices.

  Raises:
    UserError: If there is no such slice, or no libtpu.
  """
  if chip not in CHIPS:
    raise UserError(
      f"the TPU's compiler compiles for {list(CHIPS)}; got {chip!r}"
    )
  known = CHIPS[chip].topologies
  if count not in known:
    raise UserError(
      f"--devices is {count}; of {chip}, the TPU's compiler knows slices of"
      f' {list(known)} devices'
    )
  if not available():
    raise UserError(
      "libtpu is not installed. It is the TPU's compiler, and needs no TPU:"
      " pip install 'jax[tpu]'"
    )
  from jax.experimental import topologies

  # It would ask the metadata server of Google's cloud which TPU this is.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  jax.config.update('jax_platforms', 'cpu')
  name = 'tpu7x' if chip == 'v7x' else chip
  options = dict(CHIPS[chip].options)
  if count // CHIPS[chip].per_chip < 4:  # By default, a host has four chips.
    options['chips_per_host_bounds'] = (1, 1, 1)
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=f'{name}:{known[count]}', **options
  )
  assert len(topology.devices) == count, topology.devices
  return topology.devices


# ----------------------------------------------------------------- estimating

# Which part of the network an instruction belongs to: the first that matches.
PARTS = (
  ('encoder attention', r'encoder/layers_[\d*]+/attention'),
  ('encoder MLP', r'encoder/layers_[\d*]+/mlp'),
  ('encoder norms and residuals', r'encoder/layers_'),
  ('cross-attention', r'decoder/layers_[\d*]+/encoder_decoder_attention'),
  ('decoder attention', r'decoder/layers_[\d*]+/self_attention'),
  ('decoder MLP', r'decoder/layers_[\d*]+/mlp'),
  ('decoder norms and residuals', r'decoder/layers_'),
  ('embedding, bias and prompt', r'/encoder/|token_embedder'),
  ('output layer', r'/decoder/'),
  ('loss', r'jvp\('),
)
REST = 'optimizer and rest'
# There are more of them in a deeper network. Others are there once, and in the
# rest are copies that no part owns.
_IN_LAYERS = frozenset(name for name, _ in PARTS[:-3])
_ONCE = frozenset(name for name, _ in PARTS[-2:])

_COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_BYTES = {
  'pred': 1,
  's8': 1,
  'u8': 1,
  'bf16': 2,
  'f16': 2,
  's16': 2,
  'u16': 2,
  'f32': 4,
  's32': 4,
  'u32': 4,
  's64': 8,
  'u64': 8,
}
_ARRAY = re.compile(r'\b(\w+)\[([\d,]*)\](\{[^}]*\})?')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.<>-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.<>-]+) = (.*)$')
_CALLED = re.compile(
  r'(?:to_apply|calls|true_computation|false_computation)=%?([\w.<>-]+)'
)
# What a kernel says of itself. The first is printed on a line of its own.
_STEPS = re.compile(r'\{\s*"steps":"(\d+)"\s*\}')
_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_BUNDLE = re.compile(r'\s*0x[0-9a-f]+ ')
# They name what is there already, or are counted where they are called.
_FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'after-all',
  'partition-id',
}


@dataclasses.dataclass
class Cost:
  """What a program, or a part of it, costs on one device.

  Attributes:
    cycles: The compiler's estimate, Pallas kernels aside.
    kernel_cycles: Of Pallas kernels, see at the top.
    bytes: Moved from and to HBM.
    flops: Of matrix products, two for each multiplication. Other operations are
      not counted: they run beside the matrix unit.
  """

  cycles: float = 0.0
  kernel_cycles: float = 0.0
  bytes: float = 0.0
  flops: float = 0.0

  def add(self, other: 'Cost', times: float = 1.0) -> None:
    self.cycles += times * other.cycles
    self.kernel_cycles += times * other.kernel_cycles
    self.bytes += times * other.bytes
    self.flops += times * other.flops

  def seconds(self, chip: str) -> float:
    """Estimated seconds, without collectives."""
    return (self.cycles + self.kernel_cycles) / CHIPS[chip].clock


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a compiled program costs on one device, by the compiler.

  Attributes:
    parts: By part of the network.
    collectives: Number and bytes of those that one run executes, by kind.
    kernels: Calls of Pallas kernels that one run executes, by name.
    scheduled: Whether the cycles of all of them are those of their schedules.
  """

  parts: Mapping[str, Cost]
  collectives: Mapping[str, tuple[float, float]]
  kernels: Mapping[str, float]
  scheduled: bool

  @property
  def total(self) -> Cost:
    whole = Cost()
    for cost in self.parts.values():
      whole.add(cost)
    return whole

  def seconds(self, chip: str) -> float:
    """Estimated seconds of one run, without collectives."""
    return self.total.seconds(chip)

  def deepened(self, times: float) -> 'Estimate':
    """The same of a network with `times` as many layers."""
    parts = {}
    for name, cost in self.parts.items():
      parts[name] = Cost()
      parts[name].add(cost, times if name in _IN_LAYERS else 1)
    return Estimate(
      parts,
      {k: (n * times, b * times) for k, (n, b) in self.collectives.items()},
      {k: n * times for k, n in self.kernels.items()},
      self.scheduled,
    )

  def continued(self, further: 'Estimate', layers: float) -> 'Estimate':
    """The same of a network with more layers.

    Unlike `deepened`, it counts once what only the first or last layer does.
    The output layer and the loss are those of `further`: they do not grow with
    the depth, but with one layer their arrays may stay on the chip.

    Args:
      further: Of a network with one layer more.
      layers: How many more there are in all.
    """

    def line(a, b):
      return a + layers * (b - a)

    parts = collections.defaultdict(Cost)
    for estimate, times in ((self, 1 - layers), (further, layers)):
      for name, cost in estimate.parts.items():
        if name not in _ONCE:
          parts[name].add(cost, times)
    parts |= {name: further.parts[name] for name in _ONCE & {*further.parts}}
    collectives = {}
    for kind in {*self.collectives, *further.collectives}:
      a, b = (x.collectives.get(kind, (0.0, 0.0)) for x in (self, further))
      collectives[kind] = line(a[0], b[0]), line(a[1], b[1])
    return Estimate(
      dict(parts),
      collectives,
      {
        k: line(self.kernels.get(k, 0.0), n) for k, n in further.kernels.items()
      },
      self.scheduled and further.scheduled,
    )


def _bytes(text: str) -> float:
  """Bytes in HBM of all arrays in the type of an instruction."""
  total = 0.0
  for kind, shape, layout in _ARRAY.findall(text):
    if kind in _BYTES and 'S(' not in layout:
      total += _BYTES[kind] * math.prod(int(n) for n in shape.split(',') if n)
  return total


def _split(rest: str) -> tuple[str, str, str]:
  """'f32[2]{0} add(%a, %b), x=y' -> type, opcode, what follows."""
  if rest.startswith('('):  # A tuple, whose layouts have parentheses too.
    depth = 0
    i = 0
    for i, letter in enumerate(rest):  # noqa: B007
      depth += (letter == '(') - (letter == ')')
      if not depth:
        break
    kind, rest = rest[: i + 1], rest[i + 1 :].strip()
  else:
    kind, rest = rest.split(' ', 1)
  opcode, _, after = rest.partition('(')
  return kind, opcode, after


def _shape(text: str) -> list[int]:
  """The shape of the first array in a type: 'f32[2,3]{1,0}' -> [2, 3]."""
  found = _ARRAY.search(text)
  return [int(n) for n in found[2].split(',') if n] if found else []


def _product_flops(kind: str, after: str, kinds: Mapping[str, str]) -> float:
  """FLOP of a convolution, which the TPU's compiler makes of every product.

  A batched product is one too: each batch is a position of a window that has
  zeros between the values of the others. Only what meets a value is counted.

  Args:
    kind: Type of the output.
    after: What follows the opcode.
    kinds: Types of the instructions before, by name.
  """
  names = re.findall(r'%([\w.<>-]+)', after.split(')')[0])
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', after)
  if labels is None or len(names) != 2 or not all(n in kinds for n in names):
    return 0.0
  shapes = (*(_shape(kinds[n]) for n in names), _shape(kind))
  left, right, out = (
    dict(zip(term, shape, strict=True))
    for term, shape in zip(labels.groups(), shapes, strict=True)
  )
  window = dict(
    entry.split('=')
    for entry in re.findall(r'\w+=[\dx_-]+', after.partition('window={')[2])
  )

  def of(name: str, dimension: int, default: int) -> int:
    values = window.get(name, '').split('x')
    text = values[dimension] if values[0] else ''
    return int(text.split('_')[0]) if text else default

  flops = 2.0 * out['b'] * out['f'] * right['i']
  for d in range(len(labels[3]) - 2):
    size, stride, low = of('size', d, 1), of('stride', d, 1), of('pad', d, 0)
    apart, wide = of('lhs_dilate', d, 1), of('rhs_dilate', d, 1)
    last = (left[str(d)] - 1) * apart
    flops *= sum(
      0 <= at <= last and at % apart == 0
      for position in range(out[str(d)])
      for at in range(
        position * stride - low, position * stride - low + size * wide, wide
      )
    )
  return flops


def _trips(
  loop: str, computations: Mapping[str, Sequence[tuple[str, str]]]
) -> int:
  """How often a loop runs at most.

  The TPU's compiler seldom writes it down; then it is the largest number that
  the condition compares with. A loop of decoding may end earlier.
  """
  if known := re.search(r'known_trip_count[^0-9]*(\d+)', loop):
    return int(known[1])
  numbers = [1]
  todo = re.findall(r'condition=%?([\w.<>-]+)', loop)
  while todo:
    for _, rest in computations[todo.pop()]:
      numbers += map(int, re.findall(r'^s32\[\]\S* constant\((\d+)\)', rest))
      todo += re.findall(_CALLED, rest)
  return max(numbers)


def _part(line: str) -> str:
  found = re.search(r'op_name="([^"]*)"', line)
  # A copy may have the name of a parameter, such as frozen['decoder'].
  path = '/' + re.sub(r"[\[\]\\']+", '/', found[1] if found else '')
  return next((name for name, like in PARTS if re.search(like, path)), REST)


def estimate(text: str, chip: str, schedules: str | None = None) -> Estimate:
  """Adds up a compiled program.

  Args:
    text: `compiled.as_text()`.
    chip: A name in `CHIPS`.
    schedules: The directory of `dump_bundles`, if it was called.

  Returns:
    The costs of one run on one device.
  """
  computations: dict[str, list[tuple[str, str]]] = {}
  entry, lines = '', []
  for line in _STEPS.sub(r'{"steps":"\1"}', text).splitlines():
    if head := _COMPUTATION.match(line):
      lines = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif found := _INSTRUCTION.match(line):
      lines.append((found[1], found[2]))

  parts: dict[str, Cost] = collections.defaultdict(Cost)
  collectives: dict[str, tuple[float, float]] = {}
  kernels: dict[str, float] = collections.Counter()
  scheduled = True

  @functools.cache
  def products(computation: str) -> float:
    """FLOP of the products that are fused in a computation."""
    total, kinds = 0.0, {}
    for name, rest in computations[computation]:
      kinds[name], opcode, after = _split(rest)
      if opcode == 'fusion':
        total += sum(map(products, re.findall(_CALLED, rest)))
      elif opcode == 'convolution':
        total += _product_flops(kinds[name], after, kinds)
    return total

  def walk(computation: str, times: float) -> None:
    nonlocal scheduled
    kinds: dict[str, str] = {}
    for name, rest in computations[computation]:
      kinds[name], opcode, after = _split(rest)
      if opcode == 'while':
        for body in re.findall(r'body=%?([\w.<>-]+)', rest):
          walk(body, times * _trips(rest, computations))
      elif opcode in ('call', 'conditional', 'async-start'):
        for called in re.findall(_CALLED, rest):
          walk(called, times)
      if opcode in _FREE or opcode.endswith('-done'):
        continue
      kernel = 'custom_call_target="tpu_custom_call"' in rest
      cost = Cost()
      if cycles := re.search(r'"estimated_cycles":"(\d+)"', rest):
        cost.cycles = float(cycles[1])
      if opcode == 'fusion':
        cost.flops = sum(map(products, re.findall(_CALLED, rest)))
      elif opcode == 'convolution':
        cost.flops = _product_flops(kinds[name], after, kinds)
      if kernel or not (opcode.endswith('-start') or opcode == 'custom-call'):
        operands = re.findall(r'%([\w.<>-]+)', after.split('), ')[0])
        cost.bytes = _bytes(kinds[name])
        cost.bytes += sum(_bytes(kinds.get(o, '')) for o in operands)
      if kernel:
        kernels[_label(name)] += times
        told = _STEPS.search(rest), _FLOPS.search(rest)
        steps, cost.flops = (int(x[1]) if x else 0 for x in told)
        found = bundles(schedules, name) if schedules and steps else 0
        scheduled &= found > 0
        about = CHIPS[chip]
        rate = about.flops / about.clock
        if not found:
          rate *= RATES.get(_label(name), about.kernel_rate)
        cost.kernel_cycles = max(
          steps * found / about.cores,
          cost.flops / rate,
          cost.bytes / about.bandwidth * about.clock,
        )
      base = opcode.removesuffix('-start')
      if base in _COLLECTIVES:
        number, size = collectives.get(base, (0.0, 0.0))
        size += times * _bytes(kinds[name])
        collectives[base] = number + times, size
      parts[_part(rest)].add(cost, times)

  walk(entry, 1.0)
  return Estimate(dict(parts), collectives, dict(kernels), scheduled)


def _label(name: str) -> str:
  """'t5_attention.12' -> 't5_attention'."""
  return re.sub(r'(\.\d+)+$', '', name)


# ----------------------------------------------------------- Pallas' schedules


def dump_bundles(directory: str) -> None:
  """Asks libtpu to write schedules there; before it is loaded, or too late."""
  flags = (
    os.environ.get('LIBTPU_INIT_ARGS', ''),
    f'--xla_jf_dump_to={directory}',
    '--xla_jf_dump_llo_text=true',
    '--xla_jf_dump_llo_pass_label_regex=final_bundles',
  )
  os.environ['LIBTPU_INIT_ARGS'] = ' '.join(flags).strip()


def bundles(directory: str, kernel: str) -> int:
  """Bundles of a kernel's schedule, of one step of its grid; 0 if unknown.

  Every bundle takes a cycle at least. Equal kernels are compiled once, so that
  the schedule of another one of the same name may have to serve.
  """
  for name in (glob.escape(kernel), f'{glob.escape(_label(kernel))}.*'):
    pattern = f'*-{name}-*-final_bundles.txt'
    files = glob.glob(os.path.join(glob.escape(directory), pattern))
    counts = []
    for file in files:
      with open(file) as lines:
        counts.append(sum(bool(_BUNDLE.match(line)) for line in lines))
    if counts:
      return max(counts)
  return 0
