"""A restore needs little more memory than the arrays on the devices.

T5 1.1 base has 247,577,856 parameters, 0.99 GB in float32, split over 8
devices.
"""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorstore as ts
from flax import serialization, traverse_util

from ptune.convert.layout import layout, shapes
from ptune.model import sizes

pytestmark = pytest.mark.skipif(
  not sys.platform.startswith('linux'), reason='reads /proc/self/status'
)

CONFIG = sizes.SIZES['t5_1_1_base']
CHUNK_BYTES = 1 << 26  # T5X's chunks are at most this large.

# ru_maxrss would include the peak of the process that started the program.
MEMORY = """
def memory(name):
  with open('/proc/self/status') as f:
    return next(1024 * int(x.split()[1]) for x in f if x.startswith(name))
"""

RESTORE = """
import sys
from ptune.model import sizes, parameters, partitioning
from ptune.convert import open_checkpoint, restore
from ptune.methods import full

mesh = partitioning.make_mesh(8)
plan = parameters.plan(sizes.t5('t5_1_1_base'), full.full(), mesh)
source = open_checkpoint(sys.argv[1])
before = memory('VmRSS')
arrays = restore(source, plan.params)
peak = memory('VmHWM')
held = sum(s.data.nbytes for a in arrays.values() for s in a.addressable_shards)
print(peak - before, held)
"""

CONVERT = """
import sys
from ptune.convert.conversion import convert
from ptune.convert import huggingface, t5x
before = memory('VmRSS')
convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(memory('VmHWM') - before)
"""


def _run(code, *argv) -> list[int]:
  flags = '--xla_force_host_platform_device_count=8'
  done = subprocess.run(
    [sys.executable, '-c', MEMORY + code, *map(str, argv)],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
    check=True,
    capture_output=True,
    text=True,
  )
  return [int(word) for word in done.stdout.split()[-2:] if word.isdigit()]


@pytest.fixture(scope='module')
def t5x(tmp_path_factory):
  """Writes T5X's layout: chunks of at most 64 MiB, not compressed."""
  path = tmp_path_factory.mktemp('base') / 'checkpoint_5'
  path.mkdir()
  rng = np.random.default_rng(0)
  target, first = {}, {}
  for name, shape in shapes(CONFIG).items():
    chunks = list(shape)
    while math.prod(chunks) * 4 > CHUNK_BYTES:
      longest = int(np.argmax(chunks))
      chunks[longest] = -(-chunks[longest] // 2)
    # Level 0 does not compress, so files have the size of real weights and are
    # quick to write.
    metadata = {
      'shape': list(shape),
      'chunks': chunks,
      'compressor': {'id': 'gzip', 'level': 0},
    }
    spec = {'driver': 'zarr', 'dtype': 'float32', 'metadata': metadata}
    directory = f'target.{name.replace("/", ".")}'
    store = {'driver': 'file', 'path': f'{directory}/'}
    target[name] = {**spec, 'kvstore': store}
    if shape in first:  # Link equal arrays to save disk space.
      (path / directory).mkdir()
      for file in (path / first[shape]).iterdir():
        os.link(file, path / directory / file.name)
      continue
    first[shape] = directory
    store = {'driver': 'file', 'path': f'{path / directory}/'}
    array = ts.open({**spec, 'kvstore': store}, create=True).result()
    array.write(rng.standard_normal(shape, np.float32)).result()
  tree = {
    'target': traverse_util.unflatten_dict(target, sep='/'),
    'state': {'step': np.int32(5), 'param_states': {}},
  }
  (path / 'checkpoint').write_bytes(
    serialization.msgpack_serialize({'version': 3, 'optimizer': tree})
  )
  return path


@pytest.fixture(scope='module')
def huggingface(tmp_path_factory):
  """Writes a sparse file of zeros, which is mapped and read like any other."""
  path = tmp_path_factory.mktemp('hf')
  config = {
    'model_type': 't5',
    'feed_forward_proj': 'gated-gelu',
    'tie_word_embeddings': False,
  }
  (path / 'config.json').write_text(json.dumps(config))
  table = layout(
    range(CONFIG.num_encoder_layers), range(CONFIG.num_decoder_layers)
  )
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, shape in shapes(CONFIG).items():
    theirs, transposed = table[name]
    start, end = end, end + math.prod(shape) * 4
    header[theirs] = {
      'dtype': 'F32',
      'shape': list(shape[::-1] if transposed else shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header).encode()
  with open(path / 'model.safetensors', 'wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    f.truncate(8 + len(text) + end)
  return path


LARGEST = 4 * max(math.prod(shape) for shape in shapes(CONFIG).values())
TOTAL = 4 * sum(math.prod(shape) for shape in shapes(CONFIG).values())


@pytest.mark.parametrize('kind', ['t5x', 'huggingface'])
def test_peak_is_below_the_largest_tensor_and_the_devices(kind, request):
  peak, held = _run(RESTORE, request.getfixturevalue(kind))
  assert TOTAL <= held < 1.01 * TOTAL  # Norms are on all devices.
  assert peak < held + LARGEST


@pytest.mark.slow
def test_conversion_holds_few_tensors(huggingface, tmp_path):
  (peak,) = _run(CONVERT, huggingface, 't5x', tmp_path / 'checkpoint_0')
  assert peak < 4 * LARGEST < TOTAL / 2
