"""Rows of TSV, CSV and JSON lines, each with its location, or its error."""

import collections
import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ptune.convert import storage
from ptune.errors import UserError, counted

SUFFIXES = ('.tsv', '.csv', '.jsonl')
SHOWN_COLUMNS = 20  # Columns that a message lists.
LARGEST_FIELD = 2**31 - 1  # In a CSV file; Python's own limit is 131,072.

Row = Mapping[str, Any]


class BadRow(UserError):
  """The error of one row; the caller adds the row's location."""


def read_rows(
  file: str, name: str, may_be_empty: bool = False
) -> Iterator[tuple[str, Row | BadRow]]:
  """Yields the location of each row of a file, 'dev.tsv:7', and the row.

  Blank lines are left out. For a row that cannot be read, it yields the error.

  Args:
    file: The file.
    name: The setting that names the file, for messages.
    may_be_empty: Whether the file may have no rows.

  Raises:
    UserError: The file does not exist, has no rows or an unknown suffix.
  """
  suffix = suffix_of(file)
  if suffix not in SUFFIXES:
    raise UserError(
      f'{name} has {file!r}, expected a name that ends in one of '
      f'{", ".join(SUFFIXES)}, or one of them and .gz'
    )
  lines = read_lines(file, name)
  if not any(line.strip() for line in lines):
    if may_be_empty:
      return
    raise UserError(f'{name} has {file!r}, which is empty')
  read = {'.tsv': _read_tsv, '.csv': _read_csv, '.jsonl': _read_jsonl}[suffix]
  for number, row in read(file, lines):
    yield f'{file}:{number}', row


def suffix_of(file: str) -> str:
  """'rows.TSV.gz' -> '.tsv'."""
  return os.path.splitext(file.lower().removesuffix('.gz'))[1]


def read_lines(file: str, name: str) -> list[bytes]:
  """Returns the lines of a text file, which may end in .gz.

  Lines end with LF or CR LF, or with CR in a file that has no LF.

  Raises:
    UserError: The file cannot be read, or is UTF-16.
  """
  data = storage.read_bytes(file, name)
  if file.lower().endswith('.gz'):
    try:
      data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
      raise UserError(
        f'{name} has {file!r}, not a gzip file: {error}'
      ) from error
  if not_text := _kind(data):
    raise UserError(f'{name} has {file!r}, which is {not_text}')
  return split_lines(data)


# How files begin that are no UTF-8 text.
_KINDS = {
  b'\xff\xfe': 'UTF-16 or UTF-32; save it as UTF-8',
  b'\xfe\xff': 'UTF-16; save it as UTF-8',
  b'\x1f\x8b': 'compressed with gzip; let its name end in .gz, once',
  b'BZh': 'compressed with bzip2; decompress it',
  b'\xfd7zXZ': 'compressed with xz; decompress it',
  b'PK\x03\x04': 'a zip archive, or .xlsx; save it as .csv, or unpack it',
  b'PAR1': 'a Parquet file; save it as .jsonl',
  b'<!DOCTYPE': 'a web page; download the file itself',
  b'version https://git-lfs': 'a pointer of Git LFS; run git lfs pull',
}


def _kind(data: bytes) -> str:
  """Returns what a file is instead of a text, and the fix; '' for a text."""
  for start, kind in _KINDS.items():
    if data.startswith(start):
      return kind
  return 'UTF-16 or UTF-32; save it as UTF-8' if data[:4].count(0) > 1 else ''


def split_lines(data: bytes) -> list[bytes]:
  """Returns the lines of a text without line ends and byte order mark."""
  data = data.removeprefix(b'\xef\xbb\xbf')
  if b'\n' not in data:
    return data.split(b'\r')
  return [line.removesuffix(b'\r') for line in data.split(b'\n')]


def decoded(line: bytes) -> str:
  """Returns the text of a line; raises BadRow if it is not UTF-8."""
  try:
    text = line.decode('utf-8')
  except UnicodeDecodeError as error:
    raise BadRow(
      f'byte {error.object[error.start]:#04x}, number {error.start + 1} of the '
      'line, is not UTF-8'
    ) from None
  if '\0' in text:
    raise BadRow(nul(text))
  return text


def nul(text: str) -> str:
  """Returns the error of a text that contains NUL."""
  return f'character {text.index(chr(0)) + 1} is NUL; this is not text'


def _checked(read: Callable[..., Row], *args: Any) -> Row | BadRow:
  try:
    return read(*args)
  except BadRow as error:
    return error


def _columns(file: str, fields: Sequence[str]) -> Sequence[str]:
  counts = collections.Counter(fields)
  twice = sorted(name for name, count in counts.items() if count > 1)
  if twice:
    raise UserError(
      f'{file}:1 names the columns {twice[:SHOWN_COLUMNS]} more than once'
    )
  return fields


def listed(columns: Iterable[Any]) -> str:
  """Returns the names of columns, only the first few if there are many."""
  names = [_shown(str(name)) for name in columns]
  more = ['...'] if len(names) > SHOWN_COLUMNS else []
  return ', '.join([*names[:SHOWN_COLUMNS], *more])


def _shown(name: str) -> str:
  plain = name == name.strip() and name.isprintable() and name
  return f'{name if plain else repr(name):.80}'


def _with_columns(columns: Sequence[str], fields: Sequence[str]) -> Row:
  if len(fields) != len(columns):
    raise BadRow(
      f'{counted(len(fields), "field")}, expected {len(columns)}:'
      f' {listed(columns)}'
    )
  return dict(zip(columns, fields, strict=True))


def _read_tsv(file, lines):
  columns = None
  for number, line in enumerate(lines, start=1):
    if not line.strip(b' '):
      continue
    if columns is None:
      columns = _columns(file, _header(file, line).split('\t'))
      continue

    def row(line, columns=columns):
      return _with_columns(columns, decoded(line).split('\t'))

    yield number, _checked(row, line)


def _header(file: str, line: bytes) -> str:
  try:
    return decoded(line)
  except BadRow as error:
    raise UserError(f'{file}:1, which names the columns: {error}') from None


def _separator(header: str) -> str:
  """Returns the field separator of a CSV file, found in its header."""
  if ',' in header:
    return ','
  return ';' if ';' in header else '\t' if '\t' in header else ','


def _read_csv(file, lines):
  csv.field_size_limit(LARGEST_FIELD)
  # Bytes that are not UTF-8 become special characters, which we detect later.
  texts = [line.decode('utf-8', errors='surrogateescape') for line in lines]
  separator = _separator(next(text for text in texts if text.strip()))
  columns = None
  for first, fields in _records(texts, separator):
    if isinstance(fields, BadRow):
      yield first, fields
      continue
    if columns is None:
      header = separator.join(fields).encode('utf-8', 'surrogateescape')
      _header(file, header)
      columns = _columns(file, fields)
      continue

    def row(columns=columns, fields=fields):
      for field in fields:
        decoded(field.encode('utf-8', errors='surrogateescape'))
      return _with_columns(columns, fields)

    yield first, _checked(row)


def _records(texts: Sequence[str], separator: str):
  """Yields the first line number of each record, and its fields.

  A record that is not CSV, such as one with an unclosed quote, is an error;
  reading continues after its first line.
  """
  start = 0
  while start < len(texts):
    rest = (texts[i] + '\n' for i in range(start, len(texts)))
    reader = csv.reader(rest, delimiter=separator, strict=True)
    begin = start
    try:
      for fields in reader:
        if fields:
          yield begin + 1, fields
        begin = start + reader.line_num
      return
    except csv.Error as error:
      message = f'is not CSV: {error}'
      if 'unexpected end' in str(error):
        message += '; a quote that opens on this line is never closed'
      yield begin + 1, BadRow(message)
      start = begin + 1


def _once(pairs):
  """Makes a dict of a JSON object; raises BadRow if a name is repeated."""
  found = dict(pairs)
  if len(found) < len(pairs):
    counts = collections.Counter(name for name, _ in pairs)
    twice = [name for name, count in counts.items() if count > 1]
    raise BadRow(f'names {listed(twice)} more than once')
  return found


def _read_jsonl(file, lines):
  del file

  def row(line):
    try:
      record = json.loads(decoded(line), object_pairs_hook=_once)
    except BadRow:
      raise
    except RecursionError:
      raise BadRow('is nested too deeply') from None
    except ValueError as error:  # Also for a number of thousands of digits.
      raise BadRow(f'is not JSON: {error}') from None
    if not isinstance(record, dict):
      raise BadRow('is not a JSON object, expected {"column": value, ...}')
    return record

  for number, line in enumerate(lines, start=1):
    if line.strip():
      yield number, _checked(row, line)
