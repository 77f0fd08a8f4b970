"""Vocabularies without TensorFlow: SentencePiece pieces, and bytes.

They give the same ids, sentinels and texts as SeqIO's vocabularies of the same
files, and have the attributes that ptune reads: `vocab_size`, `pad_id`,
`eos_id`, `unk_id`, `encode` and `decode`.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from etils import epath

from ptune.convert.storage import read_bytes
from ptune.errors import UserError

if TYPE_CHECKING:
  import sentencepiece

# Sentinels of T5 and mT5; Hugging Face's tokenizers add them, not the files.
EXTRA_IDS = 100


class Vocabulary(Protocol):
  """The attributes of a vocabulary that ptune reads, SeqIO's or its own."""

  @property
  def vocab_size(self) -> int:
    """The number of ids, including sentinels."""
    ...

  @property
  def pad_id(self) -> int: ...

  @property
  def eos_id(self) -> int: ...

  @property
  def unk_id(self) -> int: ...

  def encode(self, text: str) -> Sequence[int]:
    """Returns the ids of a text, without EOS."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids up to the first EOS."""
    ...


def load_sentencepiece(
  file: epath.PathLike,
) -> 'sentencepiece.SentencePieceProcessor':
  """Reads a SentencePiece model.

  Raises:
    UserError: The file cannot be read, or is not a SentencePiece model.
  """
  return _parse(file, read_bytes(file, 'VOCABULARY'))


def _parse(
  file: epath.PathLike, contents: bytes
) -> 'sentencepiece.SentencePieceProcessor':
  import sentencepiece

  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(contents)
  except (RuntimeError, OSError) as error:
    raise UserError(
      f'{file} is not a SentencePiece model, or is damaged: {error}'
    ) from error
  return processor


def sentinels(
  processor: 'sentencepiece.SentencePieceProcessor', rows: int | None = None
) -> int:
  """Returns how many sentinels to add to a SentencePiece model.

  Args:
    processor: The model. T5X's files have sentinels among their pieces.
    rows: Rows of the embedding, if known; sentinels do not exceed them.
  """
  for piece in ('<extra_id_0>', '▁<extra_id_0>'):
    if processor.PieceToId(piece) not in (processor.unk_id(), -1):
      return 0
  if not isinstance(rows, int):
    return EXTRA_IDS
  return max(0, min(EXTRA_IDS, rows - processor.vocab_size()))


class Pieces:
  """A SentencePiece model with sentinels at its end; read on first use."""

  pad_id = 0  # As in SeqIO, whatever the file says.

  def __init__(
    self,
    file: epath.PathLike,
    extra_ids: int | None = None,
    rows: int | None = None,
  ):
    """Sets the file.

    Args:
      file: The SentencePiece model, local or on gs://.
      extra_ids: Sentinels to add; the default is as many as the file lacks.
      rows: See `sentinels`.
    """
    self.file = os.fspath(file)
    self._extra_ids, self._rows = extra_ids, rows

  @functools.cached_property
  def processor(self) -> 'sentencepiece.SentencePieceProcessor':
    """The model with its sentinels: <extra_id_0> has the highest id."""
    try:
      contents = read_bytes(self.file, 'VOCABULARY')
    except UserError as error:
      raise UserError(
        f'{error} Set VOCABULARY (or PTUNE_VOCABULARY) to the SentencePiece'
        " file or the directory of your model, such as 'ptune://tiny'."
      ) from error
    processor, extra = _parse(self.file, contents), self._extra_ids
    if extra is None:
      extra = sentinels(processor, self._rows)
    return _parse(self.file, _add(contents, extra)) if extra else processor

  @property
  def vocab_size(self) -> int:
    """The number of ids, including sentinels."""
    return self.processor.vocab_size()

  @property
  def eos_id(self) -> int:
    """The id that ends inputs and targets."""
    return self.processor.eos_id()

  @property
  def unk_id(self) -> int:
    """The id of text that the vocabulary cannot write."""
    return self.processor.unk_id()

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    return self.processor.EncodeAsIds(text)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids up to the first EOS."""
    size = self.vocab_size
    known = [int(i) if i < size else self.unk_id for i in ids]
    return self.processor.DecodeIds(_up_to(known, self.eos_id))

  def __str__(self) -> str:
    return self.file


class Bytes:
  """ByT5's vocabulary: three special ids, the UTF-8 bytes, then sentinels."""

  pad_id, eos_id, unk_id = 0, 1, 2

  def __init__(self, extra_ids: int = 0):
    self.vocab_size = 3 + 256 + extra_ids

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    return [byte + 3 for byte in text.encode()]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids up to the first EOS; skips broken characters."""
    known = _up_to([int(i) for i in ids], self.eos_id)
    text = bytes(i - 3 for i in known if 3 <= i < 3 + 256)
    return text.decode(errors='ignore')

  def __str__(self) -> str:
    return 'bytes'


def _add(contents: bytes, extra: int) -> bytes:
  from sentencepiece import sentencepiece_model_pb2 as proto

  model = proto.ModelProto.FromString(contents)
  for i in reversed(range(extra)):
    kind = proto.ModelProto.SentencePiece.USER_DEFINED
    model.pieces.add(piece=f'▁<extra_id_{i}>', score=0.0, type=kind)
  return model.SerializeToString()


def _up_to(ids: list[int], end: int) -> list[int]:
  return ids[: ids.index(end)] if end in ids else ids
