"""Builds the documentation's site into site/: python docs/build.py

Needs pip install -e '.[docs]'. The pages come from docs/ and from the files in
FROM_ELSEWHERE. The page of macros is generated from `gin_files.MACROS`. Any
warning, such as a dead link, is an error.
"""

import pathlib
import posixpath
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / 'build' / 'site_source'
REPOSITORY = 'https://github.com/ptune-jax/ptune/blob/main'
MACROS = 'macros.md'  # This page is generated; it is not in docs/.
# Page of the site -> file of the repository.
FROM_ELSEWHERE = {
  'benchmarks.md': 'benchmarks/README.md',
  'changelog.md': 'CHANGELOG.md',
  'contributing.md': 'CONTRIBUTING.md',
  'launch.md': 'launch/README.md',
  'pretrained.md': 'ptune/pretrained/README.md',
}
_LINK = re.compile(r'(\]\()([^)\s#]+)(#[^)\s]*)?\)')


def pages() -> dict[str, pathlib.Path]:
  """Returns the site's pages and pictures, with their source files."""
  docs = ROOT / 'docs'
  found = {
    str(file.relative_to(docs)): file
    for kind in ('*.md', '*.png')
    for file in sorted(docs.rglob(kind))
  }
  return found | {page: ROOT / file for page, file in FROM_ELSEWHERE.items()}


def linked(text: str, page: str, file: pathlib.Path) -> str:
  """Rewrites a page's links for the site.

  Before: `[promises](../docs/promises.md)` in launch/README.md
  After: `[promises](promises.md)` in launch.md; a link to a file that is not on
  the site, such as a Python file, leads to the repository.

  Raises:
    ValueError: A link leads nowhere.
  """
  by_file = {file.resolve(): page for page, file in pages().items()}

  def link(match):
    head, target, anchor = match[1], match[2], match[3] or ''
    if re.match(r'[a-z]+:', target):
      return match[0]
    linked_file = (file.parent / target).resolve()
    if linked_file in by_file:
      here = posixpath.dirname(page) or '.'
      target = posixpath.relpath(by_file[linked_file], here)
    elif linked_file.exists():
      target = f'{REPOSITORY}/{linked_file.relative_to(ROOT)}'
    elif not target.endswith(MACROS):
      raise ValueError(
        f'{file.relative_to(ROOT)} links to {target}, which does not exist'
      )
    return f'{head}{target}{anchor})'

  return _LINK.sub(link, text)


def macros() -> str:
  """Returns the page of commands, macros and gin files, in Markdown."""
  from ptune import cli
  from ptune.config import gin_files

  lines = ['# Commands and macros', '', '## Commands', '']
  lines += ['| command | what it does |', '|---|---|']
  for name, (*_, what) in {**cli.PROGRAMS, **cli.TOOLS}.items():
    lines.append(f'| `ptune {name}` | {what} |')
  lines += [
    '',
    '`ptune COMMAND --help` lists the flags of a command. The programs that',
    f'gin configures ({", ".join(cli.PROGRAMS)}) take `--gin_file=FILE` and',
    '`--gin.NAME=VALUE`.',
    '',
    '## Macros',
    '',
    'Set a macro by `--gin.NAME=VALUE`, or by `NAME = VALUE` in a gin file.',
    '',
    '| macro | what it sets | example |',
    '|---|---|---|',
  ]
  for name in sorted(gin_files.MACROS):
    what, example = gin_files.MACROS[name][:2]
    lines.append(f'| `{name}` | {what} | `{example}` |')
  lines += ['', '## Gin files', '']
  lines += ['| file | contents |', '|---|---|']
  for file in gin_files.own_files():
    path = gin_files.own_directory() / file
    lines.append(
      f'| [`{file}`]({REPOSITORY}/gin/{file}) | {first_line(path)} |'
    )
  return '\n'.join([*lines, ''])


def first_line(path: pathlib.Path) -> str:
  """Returns the first sentence of a gin file's head."""
  head = []
  for line in path.read_text().splitlines():
    if not line.removeprefix('#').strip() or not line.startswith('#'):
      break
    head.append(line.removeprefix('#').strip())
  sentences = re.split(r'(?<!\bal\.)(?<=\.) (?=[A-Z`])', ' '.join(head))
  return sentences[0].replace('|', '\\|')


def stage() -> None:
  """Writes the sources of the site into SOURCE."""
  shutil.rmtree(SOURCE, ignore_errors=True)
  for page, file in pages().items():
    copy = SOURCE / page
    copy.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == '.md':
      copy.write_text(linked(file.read_text(), page, file))
    else:
      shutil.copyfile(file, copy)
  shutil.copyfile(ROOT / 'benchmarks' / 'cost.png', SOURCE / 'cost.png')
  (SOURCE / 'reference' / MACROS).write_text(macros())


def main() -> int:
  stage()
  # With -m, because a layered environment has no zensical in its bin/.
  command = [sys.executable, '-m', 'zensical', 'build', '--strict', '--clean']
  return subprocess.run(
    [*command, '--config-file', str(ROOT / 'mkdocs.yml')], cwd=ROOT, check=False
  ).returncode


if __name__ == '__main__':
  sys.exit(main())
