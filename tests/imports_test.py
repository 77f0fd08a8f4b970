"""Imports follow one order of packages, and light modules stay light."""

import ast
import functools
import graphlib
import pathlib
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# From bottom to top: a package may import from itself and from those before it.
# `programs` are the modules that `python -m ptune.NAME` runs.
ROOMS = (
  'errors',
  'host',
  'config',
  'model',
  'methods',
  'pretrained',
  'convert',
  'tasks',
  'data',
  'training',
  'serving',
  'programs',
  'api',
  'analysis',
  'studies',
  't5x_host',
  'tools',
  'cli',
)
PROGRAMS = ('distill', 'evaluate', 'infer', 'train', 'train_many')


def name_of(file):
  """tasks/glue.py -> ptune.tasks.glue; ptune/cli.py -> ptune.cli."""
  parts = file.relative_to(ROOT).with_suffix('').parts
  if parts[0] == 'tasks':
    parts = ('ptune', *parts)
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


@functools.cache  # Parsing takes two seconds.
def sources():
  """Returns the syntax tree of every module, by its name."""
  return {
    name_of(file): ast.parse(file.read_text())
    for folder in ('ptune', 'tasks')
    for file in sorted((ROOT / folder).rglob('*.py'))
  }


def is_guard(node):
  """Whether an import of the module skips this `if` statement.

  Only type checkers run `if TYPE_CHECKING:`. `if __name__ == '__main__':`
  calls the cli, which is above all programs.
  """
  return isinstance(node, ast.If) and (
    '__name__' in ast.unparse(node.test)
    or 'TYPE_CHECKING' in ast.unparse(node.test)
  )


def imports(tree, lazy=True):
  """Yields the full names that a module imports; `lazy` includes functions."""
  for node in ast.iter_child_nodes(tree):
    if is_guard(node):
      continue
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'a relative import'
      # `from ptune import sizes` and `from ptune.model.sizes import t5`.
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        yield full if full in sources() else node.module
    elif lazy or not isinstance(
      node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    ):
      yield from imports(node, lazy)


def room_of(name):
  """ptune.convert.zarr -> convert; ptune.train -> programs."""
  if name == 'ptune.pretrained.make':  # A training program.
    return 'tools'
  first = f'{name}.'.split('.')[1]
  return 'programs' if first in PROGRAMS else first


def test_every_module_has_a_room():
  found = {room_of(name) for name in sources() if name != 'ptune'}
  assert found == set(ROOMS)
  free = {'importlib', 'os', 'typing'}
  assert set(imports(sources()['ptune'])) == free, '`import ptune` is free'


def test_every_room_says_what_it_is():
  for room in ROOMS:
    if (ROOT / 'ptune' / room).is_dir():
      assert ast.get_docstring(sources()[f'ptune.{room}']), room


@pytest.mark.parametrize('room', ROOMS)
def test_imports_point_one_way(room):
  allowed = ROOMS[: ROOMS.index(room) + 1]
  wrong = [
    f'{name} imports {target}'
    for name, tree in sources().items()
    if name != 'ptune' and room_of(name) == room
    for target in imports(tree)
    if target.startswith('ptune.') and room_of(target) not in allowed
  ]
  assert not wrong


def test_no_module_imports_itself_through_others():
  graph = {
    name: {t for t in imports(tree, lazy=False) if t in sources()} - {name}
    for name, tree in sources().items()
  }
  graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError.


@pytest.mark.parametrize(
  ('below', 'above'),
  [
    # The order above implies these. We list them because the design needs them.
    ('model', 'methods'),
    ('methods', 'model.network'),  # A method knows only sites.
    ('model.decoding', 'model.network'),  # Decodes any step function.
    ('training.state', 'data'),
    ('data.batches', 'model.network'),
    ('training.optim', 'model.parameters'),
  ],
)
def test_what_must_not_know_of_each_other(below, above):
  for name, tree in sources().items():
    if f'{name}.'.startswith(f'ptune.{below}.'):
      for target in imports(tree):
        assert not f'{target}.'.startswith(f'ptune.{above}.'), name


@pytest.mark.parametrize(
  ('package', 'modules'),
  {
    'tensorflow': 'convert.storage convert.seqio_tokenizer'
    ' data.seqio_registry data.seqio_rows',
    'tensorflow_datasets': 'data.seqio_registry serving.seqio_metrics',
    'orbax': 'training.checkpoints',
    'clu': 'training.events',
    'safetensors': 'convert.safetensors_files',
    'tensorstore': 'convert.zarr',
    't5x': 't5x_host',
    'fastapi': 'serving.guard serving.web',
    'uvicorn': 'serving.serve',
  }.items(),
)
def test_a_heavy_package_is_imported_where_it_is_wrapped(package, modules):
  importers = [
    name
    for name, tree in sources().items()
    if room_of(name) != 'tasks'  # They need SeqIO and TensorFlow.
    for target in imports(tree)
    if target.split('.')[0] == package
  ]
  assert set(importers) == {f'ptune.{m}' for m in modules.split()}


def test_nothing_imports_what_t5x_imports():
  for name, tree in sources().items():
    assert 'ptune.t5x_host' not in imports(tree), name


def test_the_parser_sees_every_kind_of_import():
  # If the parser missed imports, the tests above would pass without checking.
  tree = ast.parse(
    'import ptune.data\n'
    'from ptune.model import network\n'
    'from ptune import __version__\n'
    'from ptune.methods import prompt\n'
    'from ptune.training.state import TrainState\n'
    'def f():\n'
    '  with a:\n'
    '    from ptune import cli\n'
    'if __name__ == "__main__":\n'
    '  from ptune import train\n'
  )
  top = ['data', 'model.network', None, 'methods.prompt', 'training.state']
  top = ['ptune' if t is None else f'ptune.{t}' for t in top]
  assert list(imports(tree, lazy=False)) == top
  assert list(imports(tree)) == [*top, 'ptune.cli']


# --------------------------------------------------------------------- weight


def loaded_by(code, environment=None):
  """Returns the heavy packages that `code` imports, and its CPU seconds."""
  program = (
    f'import sys\n{code}\n'
    "heavy = {'seqio', 'tensorflow', 'tensorflow_datasets', 'jax', 'orbax'}\n"
    'print("\\n", *sorted(heavy & set(sys.modules)))'
  )
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=environment,
    check=True,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds = sum(
    getattr(after, field) - getattr(before, field)
    for field in ('ru_utime', 'ru_stime')
  )
  return done.stdout.splitlines()[-1].split(), seconds


def test_the_model_and_its_update_load_no_seqio_and_no_tensorflow():
  loaded, _ = loaded_by(
    'import ptune.training.state, ptune.training.optim\n'
    'import ptune.model.models, ptune.model.network\n'
    'import ptune.methods.prompt, ptune.methods.full, ptune.convert\n'
    'import benchmarks.step'  # It needs only JAX and Flax.
  )
  assert loaded == ['jax']


def test_help_is_quick_and_loads_nothing_heavy():
  for arguments in (['--help'], ['train', '--help']):
    loaded, seconds = loaded_by(
      'from ptune import cli\n'
      f'try: cli.main({arguments})\n'
      'except SystemExit as end: assert not end.code\n'
    )
    assert not loaded
    assert seconds < 4


def test_what_needs_no_seqio_task_starts_without_tensorflow():
  loaded, _ = loaded_by(
    'import ptune.train, ptune.train_many, ptune.evaluate, ptune.infer\n'
    'import ptune.serving.serve, ptune.serving.web, ptune.tools.demo\n'
    'import ptune.training.events, ptune.tools.list_tasks\n'
    'from ptune.data.batches import Batches\n'
    'from ptune.serving.text_metrics import Examples, TextMetrics\n'
    'from ptune.tasks import files\n'
    "rows = {'train': [('a good film', 'yes'), ('a bad one', 'no')]}\n"
    "task = files.from_rows(rows, label_names=['no', 'yes'])\n"
    "lengths = {'inputs': 8, 'targets': 4}\n"
    'assert len(Batches(task, lengths, 2)(5)["encoder_input_tokens"]) == 2\n'
    "metrics = TextMetrics(task, Examples('train', lengths, None, None))\n"
    'assert len(metrics.datasets["from_rows"]) == 2\n'
    'from ptune.convert.vocabulary import open_vocabulary\n'
    "assert open_vocabulary('ptune://tiny').encode('a')\n"
  )
  assert not {'seqio', 'tensorflow', 'tensorflow_datasets'} & set(loaded)
