"""Saves the figures of an analysis, as PNG to look at and SVG for a paper."""

import io
from typing import TYPE_CHECKING

from etils import epath

from ptune.host.files import write_atomically

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def save(figure: 'Figure', directory: epath.Path, name: str) -> list[str]:
  """Writes NAME.png and NAME.svg into a directory; returns their names."""
  files = []
  for kind in ('png', 'svg'):
    # Drawing the same figure again writes the same bytes.
    plain = {'Date': None} if kind == 'svg' else None
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata=plain)
    files.append(f'{name}.{kind}')
    write_atomically(directory / files[-1], buffer.getvalue())
  return files
