"""Writes a model's vocabulary so that transformers tokenises in the same way.

    tokenizer.json         read by transformers
    tokenizer_config.json  its special tokens
    spiece.model           the SentencePiece model, if there is one

Files of transformers are copied unchanged; missing files are made from the
SentencePiece model.
"""

import json
from typing import Any

from etils import epath

from ptune.convert import sentencepiece_tokenizer, tokenizer_json
from ptune.convert.pieces import load_sentencepiece, sentinels
from ptune.convert.storage import read_bytes
from ptune.convert.vocabulary import Found, look
from ptune.errors import UserError

SPIECE = 'spiece.model'
COPIED = (
  tokenizer_json.TOKENIZER,
  tokenizer_json.CONFIG,
  tokenizer_json.SPECIAL,
  tokenizer_json.ADDED,
  *tokenizer_json.BPE,
)


def write_vocabulary(
  directory: epath.Path, vocabulary: epath.PathLike, rows: int, pad: int = 0
) -> list[str]:
  """Writes the files of a vocabulary beside a model or an adapter.

  Args:
    directory: The directory to write to.
    vocabulary: As for `vocabulary.vocabulary_of`: a model's directory, or a
      SentencePiece file.
    rows: Rows of the model's embedding.
    pad: The id of its padding.

  Returns:
    A line of text that names the written files, or the reason for none.
  """
  try:
    found = look(vocabulary)
  except (FileNotFoundError, UserError):
    return [
      f'no vocabulary was written, because {vocabulary} has none; transformers'
      ' needs one beside the model: name one with --vocabulary=PATH'
    ]
  files = _copied(found, vocabulary)
  if found.file is None and found.directory is None:
    files |= _of_bytes(rows)
  if found.file is not None:
    files = {SPIECE: read_bytes(found.file, 'VOCABULARY')} | files
  pieces = any(name in files for name in tokenizer_json.SENTENCEPIECE)
  if pieces and tokenizer_json.TOKENIZER not in files:
    try:
      files |= _of_sentencepiece(found, rows, pad)
    except UserError as error:
      return [*_write(directory, files), str(error)]
  return _write(directory, files)


def _write(directory: epath.Path, files: dict[str, bytes]) -> list[str]:
  for name, contents in files.items():
    (directory / name).write_bytes(contents)
  return [f'vocabulary: {", ".join(sorted(files))}']


def _copied(found: Found, vocabulary: epath.PathLike) -> dict[str, bytes]:
  """Returns the files that transformers wrote."""
  directory = found.directory
  if directory is None and found.file is not None:
    directory = found.file.parent
  if directory is None or str(vocabulary).endswith('.model'):
    return {}
  names = {child.name for child in directory.iterdir()}
  spieces = [n for n in tokenizer_json.SENTENCEPIECE if n in names]
  return {
    name: (directory / name).read_bytes()
    for name in (*COPIED, *spieces[:1])
    if name in names
  }


def _of_bytes(rows: int) -> dict[str, bytes]:
  """Returns files for ByT5; transformers knows its vocabulary by name."""
  said = {
    'tokenizer_class': 'ByT5Tokenizer',
    'extra_ids': max(0, min(125, rows - 256 - 3)),
    'eos_token': '</s>',
    'pad_token': '<pad>',
    'unk_token': '<unk>',
  }
  return {tokenizer_json.CONFIG: _json(said)}


def _of_sentencepiece(found: Found, rows: int, pad: int) -> dict[str, bytes]:
  """Returns a tokenizer.json of the pieces, sentinels and added tokens."""
  file = found.file
  if file is not None:
    pieces = load_sentencepiece(file)
    made = sentencepiece_tokenizer.tokenizer_of(file, sentinels(pieces, rows))
  else:
    assert found.directory is not None
    file = tokenizer_json.sentencepiece_of(found.directory)
    pieces = load_sentencepiece(file)
    made = tokenizer_json.load(found.directory)
  names = made.get_vocab(with_added_tokens=True)
  said: dict[str, Any] = {
    # Not T5Tokenizer, because it reads the pieces but not the byte fallback.
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'model_input_names': ['input_ids', 'attention_mask'],
    'eos_token': pieces.IdToPiece(pieces.eos_id()),
    'unk_token': pieces.IdToPiece(pieces.unk_id()),
    'pad_token': pieces.IdToPiece(pad),
    'additional_special_tokens': sorted(
      name for name in names if name.startswith('<extra_id_')
    ),
  }
  return {
    tokenizer_json.TOKENIZER: (made.to_str(pretty=True) + '\n').encode(),
    tokenizer_json.CONFIG: _json(said),
  }


def _json(value: dict[str, Any]) -> bytes:
  text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
  return f'{text}\n'.encode()
