"""`ptune neighbours`: lists the vocabulary pieces nearest to a prompt's rows.

For each row of the prompt, it finds the pieces of the frozen vocabulary with
the smallest cosine distance, as section 7 of Lester et al. 2021 (arXiv
2104.08691). They found that the nearest five have similar meanings. If a prompt
started from class labels, these are still among the neighbours. Rows of a long
prompt often have the same neighbours, which suggests that the prompt has more
rows than it needs.

    ptune neighbours runs/sst2 --base=ptune://tiny --labels=negative,positive

It reads only the token embedding of the base model, block by block.
"""

import argparse
import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text
from etils import epath

from ptune.convert import open_checkpoint, vocabulary
from ptune.convert.export import check_width, recorded_base
from ptune.convert.pieces import load_sentencepiece
from ptune.convert.prompts import Prompt, read_prompt
from ptune.convert.source import EMBEDDING, Leaf
from ptune.convert.tokenizer_json import Tokenizer
from ptune.errors import UserError

# The number of embedding values in memory at once: 64 MB as float32.
BLOCK = 1 << 24
SPACE = '\u2581'  # SentencePiece's mark of a word's beginning.


def nearest(
  vectors: np.ndarray,
  blocks: Iterable[np.ndarray],
  texts: Sequence[str | None],
  top: int,
) -> tuple[np.ndarray, np.ndarray]:
  """The pieces with the largest cosine to each vector.

  Args:
    vectors: [prompt, embed].
    blocks: The embedding's rows in order, in blocks of [rows, embed].
    texts: The text of each id. Ids without a text, or with None, are left out.
    top: The number of pieces; at least this many ids must have a text.

  Returns:
    Their ids and cosines, [prompt, top], the nearest first; if cosines are
    equal, the lower id comes first.
  """
  unit = normalised(vectors)
  ids = np.zeros((len(vectors), 0), np.int64)
  cosines = np.zeros((len(vectors), 0), np.float32)
  start = 0
  for block in blocks:
    named = [
      i for i, text in enumerate(texts[start : start + len(block)]) if text
    ]
    found = np.broadcast_to(
      start + np.array(named, np.int64), (len(vectors), len(named))
    )
    ids = np.concatenate([ids, found], axis=1)
    cosines = np.concatenate(
      [cosines, unit @ normalised(block[named]).T], axis=1
    )
    best = np.argsort(-cosines, axis=1, kind='stable')[:, :top]
    ids = np.take_along_axis(ids, best, axis=1)
    cosines = np.take_along_axis(cosines, best, axis=1)
    start += len(block)
  return ids, cosines


def normalised(rows: np.ndarray) -> np.ndarray:
  """Scales rows [n, embed] to length 1, in float32; rows of zeros stay zero."""
  rows = np.asarray(rows, np.float32)
  lengths = np.linalg.norm(rows, axis=1, keepdims=True)
  return rows / np.where(lengths > 0, lengths, 1)


def blocks_of(leaf: Leaf) -> Iterator[np.ndarray]:
  """Reads a [rows, embed] parameter in blocks of bounded size."""
  rows = max(1, BLOCK // leaf.shape[1])
  for start in range(0, leaf.shape[0], rows):
    yield leaf.read((slice(start, start + rows), slice(None)))


def piece_texts(processor: Any) -> list[str | None]:
  """The text of each piece of a SentencePiece model.

  Control tokens, the unknown token, single bytes and sentinels get None.
  """

  def text(i: int) -> str | None:
    kinds = ('control', 'unknown', 'unused', 'byte')
    piece = processor.id_to_piece(i)
    if any(getattr(processor, f'is_{kind}')(i) for kind in kinds):
      return None
    return None if re.fullmatch(rf'{SPACE}?<extra_id_\d+>', piece) else piece

  return [text(i) for i in range(processor.get_piece_size())]


def read_vocabulary(
  path: epath.PathLike,
) -> tuple[list[str | None], Callable[[str], list[int]]]:
  """A model's vocabulary: the text of each id, and an encoding function.

  Raises:
    FileNotFoundError, ValueError: See `convert.vocabulary.vocabulary_of`.
  """
  found = vocabulary.look(path)
  if found.file is not None:
    processor = load_sentencepiece(found.file)
    return piece_texts(processor), processor.encode
  if found.directory is not None:
    own = Tokenizer(found.directory).tokenizer
    texts = [own.decode([i]) or None for i in range(own.get_vocab_size())]
    return texts, lambda text: own.encode(text, add_special_tokens=False).ids
  # ByT5's ids: padding, EOS, the unknown token, then the bytes.
  shown = [chr(i) if 32 < i < 127 else f'0x{i:02x}' for i in range(256)]
  return [None] * 3 + shown, lambda text: [3 + i for i in text.encode()]


# ------------------------------------------------------------------- findings


def neighbours(
  prompt: Prompt,
  base: epath.PathLike,
  words: epath.PathLike | None = None,
  top: int = 5,
  labels: Sequence[str] = (),
) -> dict[str, Any]:
  """Finds each row's nearest pieces, the labels among them, and similar rows.

  Args:
    prompt: A prompt from `prompts.read_prompt`.
    base: The model that it was trained on, as `open_checkpoint` takes it.
    words: The vocabulary, as `vocabulary.look` takes it; None for the one in
      the base's directory.
    top: The number of pieces for each row.
    labels: The class labels to look for.

  Returns:
    A dict for JSON: `prompt`, `base`; `rows`, each with its `norm` and
    `neighbours` (`id`, `piece`, `cosine`), the nearest first; `labels`, each
    with its `pieces`, the `rows` that have one of them as a neighbour, and the
    `closest_row` to the mean of the pieces (the value that class-label
    initialisation gives a row) with its `cosine`; `clusters` of `rows` with the
    same nearest `piece`, the largest first.

  Raises:
    ValueError: If the prompt is not for this base, a label cannot be encoded,
      or `top` is out of range.
  """
  source = open_checkpoint(base)
  check_width(prompt, source)
  try:
    texts, encode = read_vocabulary(words or base)
  except ValueError as error:
    raise UserError(f'{error}, as --vocabulary') from error
  texts = texts[: source.leaves[EMBEDDING].shape[0]]
  count = sum(text is not None for text in texts)
  if not 1 <= top <= count:
    raise UserError(
      f'--top is {top}; expected 1 to {count}, the number of pieces in the'
      ' vocabulary'
    )
  encoded = {
    label: [i for i in encode(label) if texts[i] not in (None, SPACE)]
    for label in labels
  }
  if unknown := [label for label, own in encoded.items() if not own]:
    raise UserError(f'the vocabulary has no pieces for the labels {unknown}')
  ids, cosines = nearest(
    prompt.array, blocks_of(source.leaves[EMBEDDING]), texts, top
  )
  norms = np.linalg.norm(prompt.array, axis=1)
  rows = [
    {
      'row': i,
      'norm': float(norms[i]),
      'neighbours': [
        {'id': int(j), 'piece': texts[j], 'cosine': float(c)}
        for j, c in zip(ids[i], cosines[i], strict=True)
      ],
    }
    for i in range(len(ids))
  ]
  clusters: dict[int, list[int]] = {}
  for i, j in enumerate(ids[:, 0].tolist()):
    clusters.setdefault(j, []).append(i)
  several = sorted(
    (c for c in clusters.items() if len(c[1]) > 1), key=lambda c: -len(c[1])
  )
  return {
    'prompt': prompt.path,
    'base': source.path,
    'rows': rows,
    'labels': {
      label: {
        'pieces': [texts[i] for i in own],
        'rows': np.flatnonzero(np.isin(ids, own).any(axis=1)).tolist(),
        **_closest(prompt.array, source.leaves[EMBEDDING], own),
      }
      for label, own in encoded.items()
    },
    'clusters': [{'piece': texts[j], 'rows': found} for j, found in several],
  }


def _closest(
  vectors: np.ndarray, embedding: Leaf, ids: Sequence[int]
) -> dict[str, Any]:
  """The row nearest to the mean of a label's pieces, its initial value."""
  rows = [embedding.read((slice(i, i + 1), slice(None))) for i in ids]
  mean = np.mean(np.concatenate(rows).astype(np.float32), axis=0)
  cosines = normalised(vectors) @ normalised(mean[None])[0]
  best = int(np.argmax(cosines))
  return {'closest_row': best, 'cosine': float(cosines[best])}


def recorded_labels(prompt: Prompt) -> list[str]:
  """The class labels of the prompt's run, if run.json has any."""
  config = epath.Path(prompt.path).parent.parent / 'config.gin'
  if not config.is_file():
    return []
  found = re.search(
    r'^(?:CLASS_LABELS|LABEL_NAMES) = \\?\s*(\[[^\]]*\])',
    config.read_text(),
    re.MULTILINE,
  )
  return list(ast.literal_eval(found[1])) if found else []


# ---------------------------------------------------------------- command line


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `ptune neighbours`."""
  del command
  parser.add_argument('prompt', help='a MODEL_DIR or a prompt file')
  parser.add_argument(
    '--base',
    help='the model that it was trained on (default: the base of its run)',
  )
  parser.add_argument(
    '--vocabulary',
    help='a SentencePiece file or its directory (default: that of the base)',
  )
  parser.add_argument(
    '--top',
    type=int,
    default=5,
    help='pieces for each row (default: %(default)s)',
  )
  parser.add_argument(
    '--labels',
    type=lambda text: text.split(','),
    help='class labels, separated by commas (default: CLASS_LABELS of its run)',
  )
  parser.add_argument(
    '--task', type=int, help='the prompt to read from a multitask run'
  )
  parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> None:
  """Runs the command line.

  Raises:
    ValueError, OSError: For errors that users can fix.
  """
  prompt = read_prompt(args.prompt, args.task)
  base = args.base or recorded_base(prompt.path)
  if base is None:
    raise UserError(
      f'{prompt.path} does not say which model it was trained on; name the'
      ' model, for example --base=ptune://tiny'
    )
  labels = recorded_labels(prompt) if args.labels is None else args.labels
  found = neighbours(prompt, base, args.vocabulary, args.top, labels)
  if args.json:
    print(json.dumps(found, ensure_ascii=False))
  else:
    show(found, rich.console.Console(highlight=False))


def show(found: Mapping[str, Any], console: rich.console.Console) -> None:
  """Prints the result of `neighbours`; pieces of labels are green."""
  pieces = {p for label in found['labels'].values() for p in label['pieces']}
  table = rich.table.Table(box=rich.box.SIMPLE)
  table.add_column('row', justify='right')
  table.add_column('norm', justify='right')
  table.add_column('nearest pieces, with their cosines')
  for row in found['rows']:
    line = rich.text.Text()
    for near in row['neighbours']:
      style = 'green' if near['piece'] in pieces else ''
      line.append(near['piece'], style)
      line.append(f' {near["cosine"]:.2f}  ', 'dim')
    table.add_row(str(row['row']), f'{row["norm"]:.3g}', line)
  console.print(table)
  count = len(found['rows'])
  for label, facts in found['labels'].items():
    console.print(
      f'label {label} ({" ".join(facts["pieces"])}): among the neighbours of'
      f' {_rows(facts["rows"])}; row {facts["closest_row"]} is closest, cosine'
      f' {facts["cosine"]:.2f}',
      markup=False,
      soft_wrap=True,
    )
  for cluster in found['clusters']:
    console.print(
      f'{len(cluster["rows"])} of {count} rows are nearest to'
      f' {cluster["piece"]}: {_rows(cluster["rows"])}',
      markup=False,
      soft_wrap=True,
    )
  if not found['clusters']:
    console.print('no two rows have the same nearest piece')


def _rows(rows: Sequence[int]) -> str:
  if not rows:
    return 'no row'
  return ('row ' if len(rows) == 1 else 'rows ') + ', '.join(map(str, rows))
