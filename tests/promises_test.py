"""All tests that docs/promises.md names exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROWS = [
  line
  for line in (ROOT / 'docs' / 'promises.md').read_text().splitlines()
  if line.startswith('|') and '_test`' in line
]


def unknown(row):
  """Returns the modules and tests that a row names and that do not exist.

  `a_test`: `test_this`, `test_that_...`; `b_test`
  """
  module, missing = None, []
  for name in re.findall(r'`(\w+(?:\.\.\.)?)`', row.split('|')[3]):
    if name.startswith('test_'):
      source = (ROOT / 'tests' / f'{module}.py').read_text()
      end = '' if name.endswith('...') else r'\('
      if not re.search(f'^def {name.removesuffix("...")}{end}', source, re.M):
        missing.append(f'{module}: {name}')
    else:
      module = name
      if not (ROOT / 'tests' / f'{module}.py').is_file():
        missing.append(module)
  return missing


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row.split('|')[1].strip())
def test_what_shows_a_promise_exists(row):
  assert not unknown(row)


def test_a_test_that_is_not_there_is_noticed():
  row = '| a | b | `lock_test`: `test_a_second_run_...`, `test_a_third` |'
  assert unknown(row) == ['lock_test: test_a_third']
  assert unknown('| a | b | `no_test` |') == ['no_test']
  assert len(ROWS) > 15
