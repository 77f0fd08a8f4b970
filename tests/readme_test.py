"""README's commands run as they are written, on the model that comes along.

What cannot be had here stands for itself: T5 1.1 base is ptune://tiny, 30,000
steps are 3, and the directories of the examples lie in a temporary one.
"""

import pathlib
import re
import shlex

import numpy as np
import pytest

import gin
from ptune import cli, pretrained
from tests import tiny

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```', README, re.MULTILINE | re.DOTALL)

STANDS_FOR = {
  r'models/t5_1_1_\w+\.gin': 'models/tiny.gin',
  r'gs://[^\'"]*': 'ptune://tiny',
  r'/models/t5_1_1_\w+': 'ptune://tiny',
  r'(TRAIN_STEPS=)\d+': r'\g<1>3',
  r"'/data/vocab.model', 100": "'{vocabulary}', 20",
  r'/(data|runs|tmp|models)/': r'{root}/\1/',
}
# Run elsewhere: by other tests, or with what is not installed here.
NOT_HERE = (
  *('pip ', 'python -m t5x'),
  *('ptune demo', 'ptune serve', 'ptune study'),
)


def commands():
  """The commands, a line each, in README's order."""
  lines = [
    ' '.join(line.split())
    for language, text in BLOCKS
    if language in ('', 'bash', 'sh')
    for line in text.replace('\\\n', ' ').splitlines()
    if re.match(r'(ptune|python|pip) ', line)
  ]
  first = next(i for i, line in enumerate(lines) if 'ptune train' in line)
  # "With methods/lora.gin in place of the file of prompts/".
  lora = re.sub(r'prompts/\w+\.gin', 'methods/lora.gin', lines[first])
  lines.insert(first + 1, lora.replace('/runs/sst2', '/runs/sst2_lora'))
  return lines


def rewritten(text, root):
  for pattern, by in STANDS_FOR.items():
    text = re.sub(pattern, by, text)
  # Last: a checkout may lie in a directory that is rewritten.
  text = text.replace('{vocabulary}', str(pretrained.VOCABULARY))
  return text.replace('{root}', str(root))


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A working directory with the files that README speaks of."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  for name in ('data', 'runs', 'tmp', 'models'):
    (tmp_path / name).mkdir()
  rows = [(f'a {word} film {i}', int(word == 'good')) for i in range(20)
          for word in ('good', 'dull')]  # fmt: skip
  for split in ('train', 'dev'):
    lines = [f'{text}\t{label}\n' for text, label in rows]
    (tmp_path / 'data' / f'{split}.tsv').write_text(''.join(lines))
    lines.insert(0, 'sentence\tlabel\n')
    (tmp_path / f'{split}.tsv').write_text(''.join(lines))
  (tmp_path / 'ptune-demo').mkdir()
  lines = []
  for name in ('sentiment', 'topics'):
    np.save(tmp_path / 'ptune-demo' / f'{name}.npy', np.ones((20, 96)))
    lines.append(f'{{"inputs": "a good film", "prompt": "{name}"}}\n')
  (tmp_path / 'rows.jsonl').write_text(''.join(lines))
  (tmp_path / 'sentences.txt').write_text('sentence: a good film\n')
  (module,) = (text for _, text in BLOCKS if 'seqio.TaskRegistry.add' in text)
  (tmp_path / 'my_tasks.py').write_text(rewritten(module, tmp_path))
  return tmp_path


@pytest.mark.slow
def test_all_commands_run(place, capsys, monkeypatch):
  ran = []
  for line in commands():
    if line.startswith(NOT_HERE):
      continue
    line = rewritten(line, place)
    program, *arguments = shlex.split(line)
    assert program == 'ptune', line
    gin.clear_config()
    with tiny.one_device():
      status = cli.main(arguments)
    assert not status, f'{line}\n{capsys.readouterr().err}'
    ran.append(arguments[0])
  assert {'train', 'eval', 'infer', 'inspect', 'convert', 'export'} <= {*ran}


def test_the_commands_that_need_other_machines_name_what_is_here():
  text = '\n'.join(commands())
  for file in re.findall(r'--gin_file=(\S+)', text):
    assert (pathlib.Path(__file__).parents[1] / 'gin' / file).is_file(), file


def test_the_files_that_are_named_exist():
  (listing,) = (text for _, text in BLOCKS if text.startswith('ptune/\n'))
  named = re.findall(r'^  ([\w/]+\.py|\w+/)', listing, re.MULTILINE)
  root = pathlib.Path(__file__).parents[1] / 'ptune'
  missing = [name for name in named if not (root / name).exists()]
  assert not missing
  known = {name.strip('/') for name in re.findall(r'\w+(?:\.py|/)', listing)}
  unnamed = [
    path.name
    for path in root.iterdir()
    if path.name.strip('_') == path.name and path.name not in known
  ]
  assert not unnamed, 'say what these are, under "The code"'
