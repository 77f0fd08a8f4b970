"""`ptune doctor`: checks whether a run can start here, and says how to fix it.

    ptune doctor --gin.MODEL_DIR="'gs://my-bucket/run'"

It prints one line for each check, `ok` or `FAIL`, and the fix for a failure. It
takes the flags of `ptune train`, so you can replace one word of a command line.
The only macros that matter are MODEL_DIR and INITIAL_CHECKPOINT_PATH. If there
are several processes, each checks its own machine, and the last check is a step
that all take together. Process 0 prints all lines, the others print failures.
"""

import glob
import importlib.metadata
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from packaging.requirements import Requirement

from ptune.convert import open_checkpoint
from ptune.methods import prompt
from ptune.model import model_info, parameters, partitioning, sizes
from ptune.model.models import EncoderDecoderModel
from ptune.training import optim
from ptune.training import state as state_lib

# A run writes megabytes; JAX's cache of compiled programs needs more.
ENOUGH_DISK = 2e9


class Failed(Exception):
  """A check that failed.

  Attributes:
    problem: The problem.
    fix: How to fix it.
  """

  def __init__(self, problem: str, fix: str):
    super().__init__(problem)
    self.problem, self.fix = problem, fix


def preflight() -> int:
  """Runs `doctor` on the two paths of a run, if gin sets them."""
  import gin

  paths = {}
  for name in ('MODEL_DIR', 'INITIAL_CHECKPOINT_PATH'):
    try:
      paths[name.lower()] = gin.query_parameter(f'{name}/macro.value')
    except ValueError:  # The macro is not set.
      continue
  return doctor(**paths)


def doctor(
  model_dir: str | None = None, initial_checkpoint_path: str | None = None
) -> int:
  """Runs every check and prints a line for each.

  Args:
    model_dir: The directory of a future run; not checked if not given.
    initial_checkpoint_path: A base model; not checked if not given.

  Returns:
    The exit status: 0 if every check passes, 1 if one fails.
  """
  checks: dict[str, Callable[[], str]] = {
    'versions': check_versions,
    'devices': check_devices,
    'processes': check_processes,
    'cache': lambda: check_disk(cache_directory()),
  }
  if model_dir is not None:
    checks['MODEL_DIR'] = lambda: check_writable(model_dir)
  if initial_checkpoint_path is not None:
    checks['INITIAL_CHECKPOINT_PATH'] = lambda: check_checkpoint(
      initial_checkpoint_path
    )
  checks['a sharded step'] = check_step
  failures = 0
  for name, check in checks.items():
    try:
      lines = [f'ok    {name}: {check()}']
      quiet = jax.process_index() > 0
    except Exception as error:  # A broken installation may raise anything.
      problem = error.problem if isinstance(error, Failed) else repr(error)
      lines = f'FAIL  {name}: {problem}'.splitlines()
      if isinstance(error, Failed):
        lines.append(f'      fix: {error.fix}')
      failures += 1
      quiet = False
    if not quiet:
      where = f'[{jax.process_index()}] ' if jax.process_count() > 1 else ''
      print('\n'.join(where + line for line in lines), flush=True)
  return 1 if failures else 0


def check_versions(package: str = 'ptune') -> str:
  """Every installed package has a version that ptune and JAX accept."""
  wrong = []
  for owner in (package, 'jax'):
    for requirement in _requirements(owner):
      try:
        found = importlib.metadata.version(requirement.name)
      except importlib.metadata.PackageNotFoundError:
        wrong.append(f'{requirement.name} is missing')
        continue
      if not requirement.specifier.contains(found, prereleases=True):
        wrong.append(
          f'{requirement.name} is {found}, {owner} needs'
          f' {requirement.specifier}'
        )
  if wrong:
    raise Failed(
      '; '.join(wrong),
      f"in a fresh virtual environment, pip install '{package}' (with [tpu] or"
      ' [cuda] for those)',
    )
  names = (package, 'jax', 'jaxlib', 'flax', 'orbax-checkpoint')
  return ', '.join(
    [f'Python {platform.python_version()}']
    + [f'{name} {importlib.metadata.version(name)}' for name in names]
  )


def _requirements(package: str) -> Iterator[Requirement]:
  """Yields the requirements of a package on this machine, without extras."""
  for line in importlib.metadata.requires(package) or []:
    requirement = Requirement(line)
    if not requirement.marker or requirement.marker.evaluate({'extra': ''}):
      yield requirement


def check_devices() -> str:
  """JAX uses the accelerator, if the machine has one."""
  devices = jax.devices()
  kinds = sorted({d.device_kind for d in devices})
  if devices[0].platform == 'cpu':
    asked = os.environ.get('JAX_PLATFORMS', '')
    if glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'):
      there, fix = 'a TPU', "pip install 'ptune[tpu]'"
    elif glob.glob('/dev/nvidia[0-9]*'):
      there, fix = 'a GPU', "pip install 'ptune[cuda]'"
    else:
      there, fix = None, ''
    if there and asked != 'cpu':
      raise Failed(
        f'this machine has {there}, but JAX uses the CPU',
        f'{fix}; if that is done, end other programs that use it'
        ' (launch/tpu_vm.py stop, nvidia-smi)',
      )
  stats = devices[0].memory_stats() if devices[0].platform != 'cpu' else None
  memory = ''
  if stats and 'bytes_limit' in stats:
    memory = f', {model_info.format_bytes(stats["bytes_limit"])} each'
  return f'{len(devices)} x {", ".join(kinds)}{memory}'


def check_processes() -> str:
  """Every process has as many devices as the others."""
  counts: dict[int, int] = {}
  for device in jax.devices():
    counts[device.process_index] = counts.get(device.process_index, 0) + 1
  if len(set(counts.values())) > 1 or len(counts) != jax.process_count():
    raise Failed(
      f'devices by process: {counts}, of {jax.process_count()} processes',
      'give each process the same number of devices; under SLURM, set'
      ' JAX_LOCAL_DEVICE_IDS as launch/slurm.sbatch does',
    )
  if jax.process_count() == 1 and os.environ.get('SLURM_NTASKS', '1') != '1':
    raise Failed(
      f'SLURM started {os.environ["SLURM_NTASKS"]} tasks, but each runs alone',
      'pass --multiprocess',
    )
  return f'{jax.process_index()} of {jax.process_count()}'


def cache_directory() -> str:
  """Returns the cache directory of compiled programs."""
  return jax.config.jax_compilation_cache_dir or os.path.expanduser('~/.cache')


def check_disk(directory: str) -> str:
  """The disk of a directory, which need not exist yet, has enough space."""
  path = os.path.abspath(directory)
  while not os.path.exists(path):
    path = os.path.dirname(path)
  free = shutil.disk_usage(path).free
  text = f'{model_info.format_bytes(free)} free at {path}'
  if free < ENOUGH_DISK:
    raise Failed(
      f'{text}, {model_info.format_bytes(ENOUGH_DISK)} are needed',
      'free space, or choose another directory (JAX_COMPILATION_CACHE_DIR,'
      ' MODEL_DIR)',
    )
  return text


def check_writable(directory: str) -> str:
  """A file can be written, read and removed in a directory."""
  remote = '://' in directory
  try:
    path = epath.Path(directory)
    probe = path / f'.doctor-{jax.process_index()}-{os.getpid()}'
    existed = path.exists()
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text('ptune')
    assert probe.read_text() == 'ptune'
    probe.unlink()
    if not existed and not remote and jax.process_count() == 1:
      path.rmdir()
  except Exception as error:  # From the disk, or from any bucket's client.
    raise Failed(
      f'{directory} cannot be written: {error}',
      'gcloud auth application-default login, and the role Storage Object'
      " Admin on the bucket for you or the machine's service account"
      if remote
      else 'choose another MODEL_DIR, or change its permissions',
    ) from error
  if remote:
    return f'{directory} can be written'
  if jax.process_count() > 1:
    return f'{directory} can be written; it must be shared by all machines'
  return f'{directory} can be written, {check_disk(directory)}'


def check_checkpoint(path: str) -> str:
  """A base model can be opened; its weights are not read."""
  try:
    return open_checkpoint(path).describe()
  except Exception as error:  # Formats and buckets' clients raise any error.
    raise Failed(
      f'{path} cannot be opened: {error}',
      'check the path; for a bucket, check that you or the service account may'
      ' read it (gcloud storage ls)',
    ) from error


def check_step() -> str:
  """All devices together take a step of prompt tuning on a tiny T5."""
  count = jax.device_count()
  mesh = partitioning.make_mesh(2 if count % 2 == 0 else 1)
  config = sizes.t5(
    vocab_size=32,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
  )
  plan = parameters.plan(config, prompt.prompt(4), mesh)
  params = parameters.initialize(plan, plan.params, seed=0)
  tx = optim.adafactor(learning_rate=0.1)
  abstract = state_lib.abstract_state(tx, plan)
  trainable = {p: params[p] for p in plan.trainable}
  frozen = parameters.unflatten({p: params[p] for p in plan.frozen})
  state = state_lib.first_state(tx, parameters.unflatten(trainable), abstract)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  tokens = np.random.default_rng(0).integers(2, 32, (count, 8), np.int32)
  tokens = jax.make_array_from_callback(
    tokens.shape, rows, lambda index: tokens[index]
  )
  batch = {
    'encoder_input_tokens': tokens,
    'decoder_input_tokens': tokens,
    'decoder_target_tokens': tokens,
    'decoder_loss_weights': tokens,
  }
  model = EncoderDecoderModel(plan.network)
  update = state_lib.compile_step(model, tx, plan, abstract)
  seconds = []
  losses = []
  with plan.scope():
    for _ in range(3):
      begin = time.perf_counter()
      state, sums = update(state, frozen, batch)
      losses.append(float(sums['loss']))
      seconds.append(time.perf_counter() - begin)
  if not all(map(math.isfinite, losses)):
    raise Failed(
      f'the losses are {losses}',
      'the devices compute wrong values: restart the machine, and compare with'
      ' JAX_PLATFORMS=cpu ptune doctor',
    )
  if losses[0] == losses[-1]:
    raise Failed('the prompt does not learn', 'report it as a bug of ptune')
  shape = ' x '.join(map(str, mesh.shape.values()))
  return (
    f'on a mesh of {shape}, {1000 * min(seconds):.1f} ms, compiled in'
    f' {seconds[0]:.1f} s'
  )
