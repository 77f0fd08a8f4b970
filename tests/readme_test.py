"""The commands of the README and of docs/ run exactly as written.

They run in one directory with the model that comes with ptune. Some values are
replaced: T5 1.1 base by ptune://tiny, 30,000 steps by 3, and the directories of
the examples by temporary ones. The default suite parses all commands; the slow
suite runs them.
"""

import importlib
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest

import gin
from ptune import cli, pretrained
from ptune.config import flags, gin_files
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
README = 'README.md'
DOCS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('docs/**/*.md'))
LINKING = [
  *(README, *DOCS, 'CONTRIBUTING.md', 'launch/README.md'),
  *('benchmarks/README.md', 'ptune/pretrained/README.md'),
  'examples/real_text/README.md',
]

STANDS_FOR = {
  r'models/t5_1_1_base\.gin': 'models/tiny.gin',
  r'gs://[^\'"]*': 'ptune://tiny',
  r'hf://google/[\w-]+': 'ptune://tiny',
  r'/models/t5_1_1_\w+': 'ptune://tiny',
  r'((?:TRAIN_STEPS|train_steps|\bsteps) ?= ?)\d+': r'\g<1>3',
  r'\nTRAIN_STEPS = 3': r'\nTRAIN_STEPS = 3\nEVAL_STEPS = 1',
  r"'/data/vocab.model', 100": "'{vocabulary}', 20",
  r'/(data|runs|tmp|models)/': r'{root}/\1/',
}
# Commands that other tests run, or that need packages which may be missing.
NOT_HERE = re.compile(
  r'pip |python -m t5x|ptune (demo|serve|study|plan|doctor|push)\b'
  r'|.*(from_hugging_face.gin|--multiprocess)'
)


def blocks(page):
  """Returns the fenced blocks of a page, [(language, text)]."""
  text = (ROOT / page).read_text()
  return re.findall(r'^```(\w*)\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def commands(page):
  """Returns the commands in the page's order, one per line."""
  return [
    ' '.join(line.split())
    for language, text in blocks(page)
    if language in ('', 'bash', 'sh')
    for line in text.replace('\\\n', ' ').splitlines()
    if re.match(r'(ptune|python|pip) ', line)
  ]


def files(page):
  """Returns the files on a page: the blocks that begin with '# NAME'."""
  heads = [
    (re.match(r'# (\w+\.\w+)\n', text), text) for _, text in blocks(page)
  ]
  return {head[1]: text for head, text in heads if head}


def rewritten(text, root):
  for pattern, by in STANDS_FOR.items():
    text = re.sub(pattern, by, text)
  # These come last, because the checkout's own path may match a pattern.
  text = text.replace('{vocabulary}', str(pretrained.VOCABULARY))
  return text.replace('{root}', str(root))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Returns a working directory with the files that the pages mention."""
  path = tmp_path_factory.mktemp('place')
  for name in ('data', 'runs', 'tmp', 'models'):
    (path / name).mkdir()
  rows = [(f'a {word} film {i}', int(word == 'good')) for i in range(20)
          for word in ('good', 'dull')]  # fmt: skip
  for split in ('train', 'dev'):
    lines = [f'{text}\t{label}\n' for text, label in rows]
    (path / 'data' / f'{split}.tsv').write_text(''.join(lines))
    lines.insert(0, 'sentence\tlabel\n')
    (path / f'{split}.tsv').write_text(''.join(lines))
    (path / f'{split}.csv').write_text(''.join(lines).replace('\t', ','))
  demo = path / 'ptune-demo'
  demo.mkdir()
  for split in ('train', 'dev', 'test'):
    (demo / f'{split}.tsv').write_text((path / 'dev.tsv').read_text())
  (demo / 'sentences.txt').write_text('a good film\n')
  lines = []
  for name, value in {'sentiment': 1, 'topics': -1}.items():
    np.save(demo / f'{name}.npy', np.full((20, 96), value, 'f4'))
    lines.append(f'{{"inputs": "a good film", "prompt": "{name}"}}\n')
  (path / 'rows.jsonl').write_text(''.join(lines))
  (path / 'sentences.txt').write_text('a good film\n')
  for page in (README, *DOCS):
    for name, text in files(page).items():
      (path / name).write_text(rewritten(text, path))
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(path)
    patch.syspath_prepend(path)
    yield path
  gin.clear_config()


def run(line, place):
  """Runs one command; returns its exit status."""
  program, *arguments = shlex.split(rewritten(line, place))
  gin.clear_config()
  with tiny.one_device():
    if program == 'ptune':
      return cli.main(arguments)
    assert program == 'python', line
    runpy.run_path(arguments[0])
    return 0


@pytest.fixture(scope='module')
def trained(place):
  """Returns the directory after the first tutorial, which other pages need."""
  lines = commands('docs/tutorials/first_prompt.md')
  line = next(line for line in lines if 'ptune train' in line)
  assert run(line, place) == 0
  return place


@pytest.mark.slow
@pytest.mark.parametrize('page', [README, *DOCS])
def test_all_commands_run(page, trained, capsys):
  for line in commands(page):
    if not NOT_HERE.match(line):
      status = run(line, trained)
      assert not status, f'{line}\n{capsys.readouterr().err}'


@pytest.mark.slow
def test_the_first_lines_of_python_run(place, capsys):
  (text,) = (t for language, t in blocks(README) if language == 'python')
  with tiny.one_device():
    exec(rewritten(text, place), {})
  assert re.fullmatch(r"\['.*'\]\n", capsys.readouterr().out)


@pytest.mark.parametrize('page', [README, *DOCS])
def test_all_commands_are_understood(page, place):
  """All flags, gin files, macros and parameters exist, and none is missing."""
  made = set()
  for line in commands(page):
    program, *arguments = shlex.split(rewritten(line, place))
    if program != 'ptune' or arguments[0] == 'tasks':
      continue
    args = cli._parse(arguments)
    # A run that the page trains exists only after its commands have run.
    made |= set(
      re.findall(r"(?:--model_dir=|MODEL_DIR=')([^\s']+)", ' '.join(arguments))
    )
    if args.program not in cli.PROGRAMS or made & {*arguments}:
      continue
    flags.resolve(args)
    module, function, _ = cli.PROGRAMS[args.program]
    program = getattr(importlib.import_module(module), function)
    if args.program in ('plan', 'doctor'):  # These read few macros.
      program = None
    gin.clear_config()
    gin_files.parse(args.gin_file, args.gin_bindings, program=program)


def test_the_commands_that_need_other_machines_name_what_is_here():
  text = '\n'.join(line for page in (README, *DOCS) for line in commands(page))
  for file in set(re.findall(r'--gin_file=([\w.]+/\S+)', text)):
    assert (ROOT / 'gin' / file).is_file(), file


def prose(page):
  """Returns a page without its fenced blocks."""
  return re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)


def slugs(page):
  """Returns the anchors of a page's headings, as on GitHub."""
  headings = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
  return {
    re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings
  }


@pytest.mark.parametrize('page', LINKING)
def test_links_lead_somewhere(page):
  for link in re.findall(r'\]\(([^)\s]+)\)', prose(ROOT / page)):
    if re.match(r'https?://', link):
      continue
    path, _, anchor = link.partition('#')
    if path.endswith('macros.md'):  # Building the site makes it.
      continue
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists(), link
    assert not anchor or anchor in slugs(target), link


def test_the_files_that_are_named_exist():
  (listing,) = (t for _, t in blocks(README) if t.startswith('ptune/\n'))
  named = re.findall(r'\s(\w+\.py|\w+/)', listing.split('\ngin/')[0])
  missing = [name for name in named if not (ROOT / 'ptune' / name).exists()]
  assert not missing
  known = {name.strip('/') for name in re.findall(r'\w+(?:\.py|/)', listing)}
  unnamed = [
    path.name
    for path in (ROOT / 'ptune').iterdir()
    if path.name.strip('_') == path.name
    and path.suffix in ('', '.py')
    and path.name not in known
  ]
  assert not unnamed, 'say what these are, under "The code"'


@pytest.mark.slow
def test_the_story_from_nothing_to_a_prompt_runs(tmp_path):
  done = subprocess.run(
    ['bash', ROOT / 'examples' / 'speedrun.sh'],
    cwd=tmp_path,
    env={**os.environ, 'PYTHON': sys.executable, 'STEPS': '3'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'speedrun/for_peft/adapter_config.json').is_file()
  assert 'accuracy' in done.stdout
