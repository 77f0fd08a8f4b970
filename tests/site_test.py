"""docs/build.py builds the site, without dead links or missing pages."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
pytest.importorskip('zensical')
_spec = importlib.util.spec_from_file_location(
  'docs_build', ROOT / 'docs' / 'build.py'
)
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


@pytest.fixture
def config(tmp_path, monkeypatch):
  """Returns the site's settings with temporary source and output folders."""
  monkeypatch.setattr(build, 'SOURCE', tmp_path / 'source')
  text = (ROOT / 'mkdocs.yml').read_text()
  text = text.replace('docs_dir: build/site_source', 'docs_dir: source')
  text = text.replace('paths: [.]', f'paths: [{ROOT}]')
  (tmp_path / 'mkdocs.yml').write_text(text)
  build.stage()
  return tmp_path / 'mkdocs.yml'


def built(config):
  return subprocess.run(
    [sys.executable, '-m', 'zensical', 'build', '--strict', '--config-file']
    + [str(config)],
    cwd=config.parent,
    capture_output=True,
    text=True,
  )


def test_the_site_is_built_without_a_warning(config):
  done = built(config)
  assert done.returncode == 0, done.stdout + done.stderr
  html = (config.parent / 'site' / 'reference/macros/index.html').read_text()
  assert 'TASK_FEATURE_LENGTHS' in html and 'methods/prompt.gin' in html


def test_a_dead_link_is_an_error(config):
  page = config.parent / 'source' / 'design.md'
  page.write_text(page.read_text() + '\n[no](nowhere.md) [no](data.md#no)\n')
  done = built(config)
  assert done.returncode != 0
  assert '2 issues found' in done.stdout + done.stderr


def test_every_page_can_be_reached():
  listed = re.findall(
    r': ([\w/]+\.md)$', (ROOT / 'mkdocs.yml').read_text(), re.M
  )
  pages = {page for page in build.pages() if page.endswith('.md')}
  assert {*listed} == pages | {'reference/macros.md'}


def test_a_link_to_a_file_that_the_site_lacks_leads_to_the_repository():
  file = ROOT / 'docs' / 'index.md'
  text = build.linked('[a](../ptune/cli.py) [b](data.md#x)', 'index.md', file)
  assert text == f'[a]({build.REPOSITORY}/ptune/cli.py) [b](data.md#x)'
  with pytest.raises(ValueError, match=r'/no.py, which does not exist'):
    build.linked('[a](../no.py)', 'index.md', file)
