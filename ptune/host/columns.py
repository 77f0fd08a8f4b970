"""Tables in plain text, for logs, files and messages."""

from collections.abc import Collection, Sequence


def aligned(
  rows: Sequence[Sequence[str]], right: Collection[int] = ()
) -> list[str]:
  """The lines of a table with aligned columns, two spaces apart.

  Args:
    rows: The cells; all rows have the same number.
    right: The columns to align on the right.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join(
      cell.rjust(width) if i in right else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
