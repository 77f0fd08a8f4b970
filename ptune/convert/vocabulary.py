"""The vocabulary that lies in a model's directory."""

import os
from typing import TYPE_CHECKING, Any

from etils import epath

from ptune import pretrained
from ptune.convert.hub import locate
from ptune.convert.huggingface import BYT5, CONFIG, read_json
from ptune.convert.pieces import Bytes, Pieces, load_sentencepiece, sentinels
from ptune.errors import UserError

if TYPE_CHECKING:
  import seqio

SENTENCEPIECE = ('spiece.model', 'sentencepiece.model', 'tokenizer.model')
TOKENIZER = 'tokenizer_config.json'


def vocabulary_of(path: epath.PathLike) -> 'seqio.Vocabulary':
  """The vocabulary of a model, for the features of a SeqIO task.

  Args:
    path: A Hugging Face directory (or hf://org/name): its SentencePiece model,
      or bytes for a ByT5. Or the SentencePiece file itself, local or gs://.

  Returns:
    The vocabulary; with the 100 sentinels at its end, where the file is
    without them (and the embedding has rows for them).

  Raises:
    FileNotFoundError: nothing is at `path`.
    ValueError: there is no vocabulary, or it is damaged.
  """
  import seqio

  file, rows = find(path)
  if file is None:
    return seqio.ByteVocabulary(_byte_sentinels(rows))
  extra = sentinels(load_sentencepiece(file), rows)
  return seqio.SentencePieceVocabulary(str(file), extra)


def open_vocabulary(
  path: epath.PathLike, extra_ids: int | None = None
) -> Pieces | Bytes:
  """The same vocabulary without TensorFlow.

  Args:
    path: As of `vocabulary_of`.
    extra_ids: Sentinels to add; as many as are missing if not given.

  Raises:
    FileNotFoundError, UserError: As `vocabulary_of`. What is wrong with a
      SentencePiece file is raised at the first use.
  """
  if os.fspath(path).endswith('.model'):
    return Pieces(path, extra_ids)
  file, rows = find(path)
  if file is not None:
    return Pieces(file, extra_ids, rows)
  return Bytes(_byte_sentinels(rows) if extra_ids is None else extra_ids)


def _byte_sentinels(rows: int | None) -> int:
  # Behind three special tokens and the bytes, in the rows that are left.
  return max(0, int(rows or BYT5) - 256 - 3)


def find(path: epath.PathLike) -> tuple[epath.Path | None, int | None]:
  """Where a vocabulary lies, without loading SeqIO.

  Args:
    path: As of `vocabulary_of`.

  Returns:
    The SentencePiece file, or None for the vocabulary of bytes; and the rows of
    the model's embedding, where its directory says them.

  Raises:
    FileNotFoundError, ValueError: As `vocabulary_of`.
  """
  path = locate(path)
  if not path.exists():
    raise FileNotFoundError(f'Nothing is at {path}, to read a vocabulary from.')
  if not path.is_dir():
    return path, None
  names = sorted(child.name for child in path.iterdir())
  config = read_json(path / CONFIG) if CONFIG in names else {}
  files = [path / name for name in SENTENCEPIECE if name in names]
  if path.parent == epath.Path(pretrained.DIRECTORY):
    files.append(epath.Path(pretrained.VOCABULARY))
  rows = config.get('vocab_size')
  if files:
    return files[0], rows
  tokenizer = read_json(path / TOKENIZER) if TOKENIZER in names else {}
  if _of_bytes(config, tokenizer):
    return None, rows
  message = f'{path} holds no vocabulary. Found: {", ".join(names)}. '
  if 'tokenizer.json' in names:
    message += 'tokenizer.json is not read. '
  raise UserError(
    message + f'Copy the SentencePiece file of the model ({SENTENCEPIECE[0]}) '
    'there, or give the path of that file'
  )


def _of_bytes(config: dict[str, Any], tokenizer: dict[str, Any]) -> bool:
  classes = {config.get('tokenizer_class'), tokenizer.get('tokenizer_class')}
  if classes & {'ByT5Tokenizer', 'ByT5TokenizerFast'}:
    return True
  return classes == {None} and config.get('vocab_size') == BYT5
