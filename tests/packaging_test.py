"""An installed ptune is complete, however and wherever it is used."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import ptune

ROOT = pathlib.Path(__file__).parents[1]

# Finds a module of tasks and a gin file. It does not import SeqIO, which is
# slow.
PROGRAM = """
import importlib.util
import gin
import ptune, ptune.config.gin_files
print(ptune.__file__)
print(importlib.util.find_spec('ptune.tasks.pretraining').origin)
print(ptune.config.gin_files.find('runs/train.gin'))
print(gin.__file__)
"""


def found(cwd, *path):
  """Runs the program with `path` before other packages; returns its output."""
  code = f'import sys; sys.path[1:1] = {[str(p) for p in path]!r}\n' + PROGRAM
  done = subprocess.run(
    # Hides the interpreter's own editable ptune, but not the dependencies.
    [sys.executable, '-c', HIDE + code],
    cwd=cwd,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  package, tasks, gin_file, gin = done.stdout.split('\n')[:4]
  assert 'site-packages' in gin, 'the configuration library is hidden'
  return package, tasks, gin_file


HIDE = """
import sys
sys.meta_path[:] = [
  f for f in sys.meta_path
  if not str(getattr(f, '__module__', '')).startswith('__editable__')
]
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Returns what `pip install .` puts into site-packages."""
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  shutil.copytree(
    ROOT, source, ignore=shutil.ignore_patterns('.git', 'build', '*.egg-info')
  )
  subprocess.run(
    [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps']
    + ['--no-build-isolation', '--wheel-dir', folder, source],
    check=True,
    capture_output=True,
  )
  (file,) = folder.glob('*.whl')
  with zipfile.ZipFile(file) as archive:
    archive.extractall(folder / 'site')
    names = archive.namelist()
  return folder / 'site', names


def test_an_editable_install_finds_all_from_anywhere(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  )
  lines = done.stdout.splitlines()
  assert lines[2] == str(ROOT / 'gin' / 'runs' / 'train.gin')
  assert lines[0] == str(ROOT / 'ptune' / '__init__.py')


def test_a_wheel_is_whole_elsewhere(wheel, tmp_path):
  site, _ = wheel
  package, tasks, gin_file = found(tmp_path, site)
  assert package == str(site / 'ptune' / '__init__.py')
  assert tasks == str(site / 'ptune' / 'tasks' / 'pretraining.py')
  assert gin_file == str(site / 'ptune' / 'gin' / 'runs' / 'train.gin')


def test_a_wheel_does_not_disturb_a_checkout_that_python_starts_in(wheel):
  site, _ = wheel
  package, tasks, gin_file = found(ROOT, site)
  assert package == str(ROOT / 'ptune' / '__init__.py')
  assert tasks == str(ROOT / 'tasks' / 'pretraining.py')
  assert gin_file == str(ROOT / 'gin' / 'runs' / 'train.gin')


def test_every_source_file_is_in_the_wheel_and_nothing_else(wheel):
  _, names = wheel
  expected = {
    *(p.relative_to(ROOT) for p in (ROOT / 'ptune').rglob('*.py')),
    *(
      pathlib.Path('ptune', p.relative_to(ROOT))
      for folder, kind in (('tasks', '*.py'), ('gin', '*.gin'))
      for p in (ROOT / folder).rglob(kind)
    ),
    pathlib.Path('ptune/py.typed'),
    pathlib.Path('ptune/serving/page.html'),
    pathlib.Path('ptune/pretrained/vocab.model'),
    pathlib.Path('ptune/pretrained/README.md'),
    *(
      p.relative_to(ROOT)
      for p in (ROOT / 'ptune' / 'pretrained').glob('*/*')
      if p.suffix in ('.json', '.safetensors')
    ),
  }
  inside = {pathlib.Path(n) for n in names if '.dist-info/' not in n}
  assert inside == expected


def test_the_metadata_says_who_may_use_it_and_is_accepted_by_an_index(wheel):
  site, _ = wheel
  (info,) = site.glob('ptune-*.dist-info')
  metadata = (info / 'METADATA').read_text()
  assert '\nLicense-Expression: Apache-2.0\n' in metadata
  assert '\nProject-URL: Repository, ' in metadata
  text = (ROOT / 'LICENSE').read_text()
  assert (info / 'licenses' / 'LICENSE').read_text() == text
  (file,) = site.parent.glob('*.whl')
  subprocess.run(
    [sys.executable, '-m', 'twine', 'check', '--strict', file], check=True
  )


def test_the_version_is_said_once_and_cited_alike():
  version = f'version: {ptune.__version__}\n'
  assert version in (ROOT / 'CITATION.cff').read_text()
  lines = (ROOT / 'pyproject.toml').read_text().splitlines()
  assert f'version = "{ptune.__version__}"' in lines


@pytest.mark.parametrize(
  'tests',
  [
    # In a wheel, tasks are in another place, so they are tested by default; the
    # others are slow.
    'tasks or skipped',
    pytest.param('not tasks and not skipped', marks=pytest.mark.slow),
  ],
)
def test_a_wheel_answers_users_mistakes_as_a_checkout_does(
  wheel, tmp_path, tests
):
  """Runs `mistakes_test` with the package that a wheel installs."""
  site = str(wheel[0])
  arguments = [
    *('-q', '-n', '0', '-k', tests, '-p', 'no:cacheprovider'),
    # Otherwise pytest puts the checkout before the wheel.
    *('--import-mode=append', '-c', str(ROOT / 'pyproject.toml')),
    *('--rootdir', str(ROOT), str(ROOT / 'tests' / 'mistakes_test.py')),
  ]
  code = f"""{HIDE}
sys.path.insert(1, {site!r})
import ptune, pytest
assert ptune.__file__.startswith({site!r})
status = pytest.main({arguments!r})
import ptune.tasks
assert ptune.tasks.__file__.startswith({site!r})
sys.exit(status)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
