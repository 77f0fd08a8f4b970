"""The vocabulary that lies in a model's directory."""

from typing import TYPE_CHECKING, Any

from etils import epath

from ptune import pretrained
from ptune.convert.hub import locate
from ptune.convert.huggingface import BYT5, CONFIG, read_json
from ptune.errors import UserError

if TYPE_CHECKING:
  import sentencepiece
  import seqio

SENTENCEPIECE = ('spiece.model', 'sentencepiece.model', 'tokenizer.model')
TOKENIZER = 'tokenizer_config.json'

# Sentinels of T5 and mT5, which Hugging Face's files leave to its tokenizers.
EXTRA_IDS = 100


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
  file, rows = find(path)
  if file is not None:
    return _sentencepiece(file, rows)
  import seqio

  # Three special tokens, the bytes, and sentinels in the rows that are left.
  return seqio.ByteVocabulary(extra_ids=max(0, int(rows or BYT5) - 256 - 3))


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


def load_sentencepiece(
  file: epath.Path,
) -> 'sentencepiece.SentencePieceProcessor':
  """Reads a SentencePiece model; raises ValueError if it is none."""
  import sentencepiece

  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(file.read_bytes())
  except (RuntimeError, OSError) as error:
    raise UserError(
      f'{file} is no SentencePiece model, or is damaged: {error}'
    ) from error
  return processor


def _sentencepiece(
  file: epath.Path, rows: int | None = None
) -> 'seqio.Vocabulary':
  """A SentencePiece model with its sentinels.

  Args:
    file: The model.
    rows: Of the embedding, where they are known: sentinels go no further.
  """
  processor = load_sentencepiece(file)
  unknown = processor.unk_id()
  extra = EXTRA_IDS
  if isinstance(rows, int):
    extra = max(0, min(extra, rows - processor.vocab_size()))
  # T5X's vocabularies have them as pieces of their own.
  for piece in ('<extra_id_0>', '▁<extra_id_0>'):
    if processor.PieceToId(piece) not in (unknown, -1):
      extra = 0
  import seqio

  return seqio.SentencePieceVocabulary(str(file), extra_ids=extra)
