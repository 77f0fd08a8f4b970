"""Writes text in SST-2's form: lower case, with spaces around all signs.

    python examples/real_text/corpus_text.py --input='/data/corpus/*.txt.gz' \\
      --output=/data/lower

A small model has no pieces to spare for capitals. Files keep their names.
"""

import argparse
import glob
import gzip
import pathlib
import re
import sys
from collections.abc import Iterator

from ptune.tasks import vocabulary


def normalised(text: str) -> str:
  """Returns a text in the form of the downstream data.

  before  It's NOT bad, really.
  after   it 's not bad , really .
  """
  text = re.sub(r'<unk>|&[#\w]*;|[_*"`#=@]', ' ', text.lower())
  text = re.sub(r"(n't|'(?:s|ve|re|ll|d|m))\b", r' \1', text)
  text = re.sub(r"([^\w\s'-])", r' \1 ', text)
  return ' '.join(text.split())


def read(pattern: str) -> dict[str, list[str]]:
  """Returns the lines of text files that are not blank, by file name.

  Raises:
    ValueError: No file matches the glob, or one is not UTF-8 text.
  """
  files = sorted(glob.glob(pattern))
  if not files:
    raise ValueError(f'No file matches {pattern!r}, expected .txt or .txt.gz.')
  return {
    pathlib.Path(file).name.split('.')[0]: [
      line for line in vocabulary.read_lines([file]) if line.strip()
    ]
    for file in files
  }


def chunks(line: str, least: int = 3, most: int = 32) -> Iterator[str]:
  """Cuts a normalised line into sentences, and joins short neighbours.

  Args:
    line: A paragraph.
    least: Minimum number of words; shorter chunks are left out.
    most: Maximum number of words; longer sentences are cut.
  """
  kept: list[str] = []
  for sentence in re.findall(r'.+?(?: [.!?;])+(?= |$)|.+$', line):
    words = sentence.split()
    if len(kept) + len(words) > most or len(kept) > most // 3:
      yield from _sized(kept, least, most)
      kept = []
    kept += words
  yield from _sized(kept, least, most)


def _sized(words: list[str], least: int, most: int) -> Iterator[str]:
  parts = [words[i : i + most] for i in range(0, len(words), most)]
  yield from (' '.join(part) for part in parts if len(part) >= least)


def main() -> None:
  """Runs the command line; errors go to stderr, with status 2."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--input', required=True, help='glob of text files')
  parser.add_argument('--output', required=True, help='directory to write')
  flags = parser.parse_args()
  try:
    found = read(flags.input)
  except ValueError as error:
    parser.error(str(error))
  directory = pathlib.Path(flags.output)
  directory.mkdir(parents=True, exist_ok=True)
  for name, lines in found.items():
    with gzip.open(directory / f'{name}.txt.gz', 'wt', encoding='utf-8') as out:
      out.writelines(
        f'{text}\n' for line in lines if (text := normalised(line))
      )


if __name__ == '__main__':
  sys.exit(main())
