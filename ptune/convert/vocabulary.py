"""Finds the vocabulary in a model's directory.

It reads the first of these that exists:

    spiece.model               SentencePiece; if tokens were added to it, or if
                               <bos> comes before texts, by the library
                               `tokenizers`
    tokenizer.json             by `tokenizers`
    vocab.json and merges.txt  byte-level BPE, by `tokenizers`
    none, in a ByT5            bytes
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import logging
from etils import epath

from ptune import pretrained
from ptune.convert import tokenizer_json
from ptune.convert.hub import locate
from ptune.convert.pieces import (
  Bytes,
  Pieces,
  Vocabulary,
  load_sentencepiece,
  sentinels,
)
from ptune.convert.storage import read_json
from ptune.convert.t5_config import BYT5, CONFIG
from ptune.convert.tokenizer_json import SENTENCEPIECE, Tokenizer
from ptune.errors import UserError

if TYPE_CHECKING:
  import seqio

TOKENIZER = 'tokenizer_config.json'
# Two vocabularies count as equal if they encode this text equally.
PROBE = (
  'The quick brown fox jumps over 13 lazy dogs, and is "very" good: positive or'
  ' negative? Größe, naïve 日本語 русский def main(self): return x_1 + y[2]'
)


class Found(NamedTuple):
  """The source of a vocabulary.

  Attributes:
    file: The SentencePiece file, if it is read.
    directory: The directory, if `tokenizers` reads it; neither for bytes.
    rows: Rows of the model's embedding, if its directory gives them.
  """

  file: epath.Path | None
  directory: epath.Path | None
  rows: int | None


def vocabulary_of(path: epath.PathLike) -> 'seqio.Vocabulary':
  """Returns the vocabulary of a model, for the features of a SeqIO task.

  Args:
    path: A Hugging Face directory (or hf://org/name), see the module. Or a
      SentencePiece file, local or gs://.

  Returns:
    The vocabulary. A SentencePiece model gets the 100 sentinels at its end if
    the file lacks them (and the embedding has rows for them).

  Raises:
    FileNotFoundError: `path` does not exist.
    ValueError: There is no vocabulary, or it is damaged.
  """
  import seqio

  found = look(path)
  if found.directory is not None:
    from ptune.convert.seqio_tokenizer import TokenizerVocabulary

    return TokenizerVocabulary(found.directory)
  if found.file is None:
    return seqio.ByteVocabulary(_byte_sentinels(found.rows))
  extra = sentinels(load_sentencepiece(found.file), found.rows)
  return seqio.SentencePieceVocabulary(str(found.file), extra)


def open_vocabulary(
  path: epath.PathLike, extra_ids: int | None = None
) -> Pieces | Bytes | Tokenizer:
  """Returns the same vocabulary without TensorFlow.

  Args:
    path: As for `vocabulary_of`.
    extra_ids: Sentinels to add; the default is as many as are missing.

  Raises:
    FileNotFoundError, UserError: As `vocabulary_of`. Errors in a SentencePiece
      file are raised on first use.
  """
  if os.fspath(path).endswith('.model'):
    return Pieces(path, extra_ids)
  found = look(path)
  if found.directory is not None:
    return Tokenizer(found.directory)
  if found.file is not None:
    return Pieces(found.file, extra_ids, found.rows)
  return Bytes(_byte_sentinels(found.rows) if extra_ids is None else extra_ids)


def _byte_sentinels(rows: int | None) -> int:
  # The remaining rows, after three special tokens and the bytes.
  return max(0, int(rows or BYT5) - 256 - 3)


def look(path: epath.PathLike) -> Found:
  """Returns the source of a vocabulary; loads neither it nor SeqIO.

  Args:
    path: As for `vocabulary_of`.

  Raises:
    FileNotFoundError, ValueError: As `vocabulary_of`.
  """
  path = locate(path)
  if not path.exists():
    raise FileNotFoundError(
      f'Nothing is at {path}, which VOCABULARY or the base model names'
    )
  if not path.is_dir():
    return Found(path, None, None)
  names = sorted(child.name for child in path.iterdir())
  config = read_json(path / CONFIG) if CONFIG in names else {}
  files = [path / name for name in SENTENCEPIECE if name in names]
  if path.parent == epath.Path(pretrained.DIRECTORY):
    files.append(epath.Path(pretrained.VOCABULARY))
  rows = config.get('vocab_size')
  if files:
    if tokenizer_json.begins(path) or _added(path, files[0], rows):
      return Found(None, path, rows)
    return Found(files[0], None, rows)
  if tokenizer_json.TOKENIZER in names or set(tokenizer_json.BPE) <= set(names):
    return Found(None, path, rows)
  tokenizer = read_json(path / TOKENIZER) if TOKENIZER in names else {}
  if _of_bytes(config, tokenizer):
    return Found(None, None, rows)
  raise UserError(
    f'{path} holds no vocabulary. Found: {", ".join(names)}. Copy the'
    f' {SENTENCEPIECE[0]} or {tokenizer_json.TOKENIZER} of the model there, or'
    ' give the path of another directory or SentencePiece file'
  )


def _added(directory: epath.Path, file: epath.Path, rows: Any) -> list[str]:
  """Returns tokens that were added to a SentencePiece model, no sentinels."""
  tokens = tokenizer_json.added_tokens(directory)
  if not tokens:
    return []
  pieces = load_sentencepiece(file)
  size = pieces.vocab_size()
  known = {pieces.IdToPiece(i) for i in tokens if i < size}
  return [
    token['content']
    for token in tokens.values()
    if token['content'] not in known
    and not token['content'].startswith('<extra_id_')
  ]


def _of_bytes(config: dict[str, Any], tokenizer: dict[str, Any]) -> bool:
  classes = {config.get('tokenizer_class'), tokenizer.get('tokenizer_class')}
  if classes & {'ByT5Tokenizer', 'ByT5TokenizerFast'}:
    return True
  return classes == {None} and config.get('vocab_size') == BYT5


def check_same(vocabulary: Vocabulary, base: epath.PathLike) -> None:
  """Compares a vocabulary with the one in a base model's directory.

  If there is none, as in T5X's checkpoints, nothing is compared.

  Args:
    vocabulary: The vocabulary of a task or a user.
    base: The base model, as for `open_checkpoint`.

  Raises:
    UserError: The base was trained with another vocabulary.
  """
  try:
    if not locate(base).is_dir():
      return
    found = look(base)
  except (FileNotFoundError, UserError):
    return
  own, tokens = open_vocabulary(base), {}
  if found.directory is not None:
    tokens = tokenizer_json.added_tokens(found.directory)
  added = [token['content'] for token in tokens.values()]
  probe = ' '.join(
    word for word in PROBE.split() if not any(token in word for token in added)
  )
  given = vocabulary.encode(probe)
  if not isinstance(given, list) or not all(isinstance(i, int) for i in given):
    return  # The vocabulary is not one of texts.
  wanted = list(own.encode(probe))
  if given != wanted:
    words = probe.split()
    word = next(
      (w for w in words if list(vocabulary.encode(w)) != list(own.encode(w))),
      probe,
    )
    place = found.file or found.directory or 'bytes'
    raise UserError(
      f'the vocabulary is not that of the base model {os.fspath(base)}:'
      f' {word!r} is {vocabulary.encode(word)} in it, and'
      f' {list(own.encode(word))} in {place}.'
      f' Set VOCABULARY to {os.fspath(base)!r}, or choose tasks that were made'
      ' with it'
    )
  lacking = _lacking(vocabulary, tokens)
  if lacking:
    logging.warning(
      'the vocabulary lacks tokens that were added to that of %s, and writes'
      ' them differently: %s. Set VOCABULARY to %r',
      os.fspath(base),
      ', '.join(map(repr, lacking[:20])),
      os.fspath(base),
    )


def _lacking(
  vocabulary: Vocabulary, tokens: Mapping[int, Mapping[str, Any]]
) -> list[str]:
  return [
    token['content']
    for i, token in tokens.items()
    if not token.get('special') and i not in vocabulary.encode(token['content'])
  ]
