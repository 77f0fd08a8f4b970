"""Trains a SentencePiece vocabulary like T5's on text files.

    python -m ptune.tasks.vocabulary --input='/data/corpus/*.txt.gz' \\
      --vocab_size=8000 --output=/data/vocab.model

Use it as seqio.SentencePieceVocabulary('/data/vocab.model', extra_ids=100). The
100 sentinels come on top of --vocab_size, so this model has 8,100 tokens.
"""

import argparse
import glob
import gzip
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import sentencepiece

from ptune.errors import UserError

SAMPLE = 'The 42 naïve cats said “hello” 😀.'


def read_lines(files: Sequence[str]) -> Iterator[str]:
  """Yields the lines of text files, some of which may end in .gz.

  Raises:
    ValueError: A file is not UTF-8 text.
  """
  for file in files:
    open_file = gzip.open if file.endswith('.gz') else open
    try:
      with open_file(file, 'rt', encoding='utf-8') as lines:
        yield from (line.rstrip('\n') for line in lines)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
      raise UserError(f'{file} is not UTF-8 text: {error}.') from error


def train_vocabulary(
  patterns: Sequence[str],
  vocab_size: int,
  output: str,
  byte_fallback: bool = True,
) -> sentencepiece.SentencePieceProcessor:
  """Trains a unigram model and writes it; the same text gives the same file.

  Ids are T5's: 0 padding, 1 end of sequence, 2 unknown, and no begin of
  sequence.

  Args:
    patterns: Globs of local files, `.txt` or `.txt.gz`, one paragraph a line.
    vocab_size: Number of pieces, including special pieces and byte pieces.
    output: The file to write. It appears only when it is complete.
    byte_fallback: Whether to write a character without a piece as its UTF-8
      bytes, which have the ids 3 to 258. If False, it is unknown.

  Raises:
    ValueError: No file matches a pattern, the output cannot be written, a
      file is not text, or the text does not suit `vocab_size`.
  """
  empty = [pattern for pattern in patterns if not glob.glob(pattern)]
  if empty:
    raise UserError(
      f'No file matches --input {", ".join(empty)}; expected at least one for '
      f'each. A relative path starts at {os.getcwd()}.'
    )
  files = sorted({file for pattern in patterns for file in glob.glob(pattern)})
  folder = os.path.dirname(os.path.abspath(output))
  try:
    if os.path.isdir(output):
      raise IsADirectoryError(f'{output} is a directory')
    os.makedirs(folder, exist_ok=True)
    # Create it before training, which takes minutes, to see if that works.
    scratch = tempfile.TemporaryDirectory(dir=folder)
  except OSError as error:
    raise UserError(
      f'Cannot write --output {output}: {error}. Give a file in a directory '
      'that you may write to.'
    ) from error
  with scratch:
    complete = os.path.join(scratch.name, 'vocab.model')
    with open(complete, 'wb') as model:
      _train(files, vocab_size, byte_fallback, model)
    os.replace(complete, output)
  return sentencepiece.SentencePieceProcessor(model_file=output)


def _train(
  files: Sequence[str],
  vocab_size: int,
  byte_fallback: bool,
  model: BinaryIO,
) -> None:
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=read_lines(files),
      model_writer=model,
      model_type='unigram',
      vocab_size=vocab_size,
      byte_fallback=byte_fallback,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      # By default, lines of more than 4,192 bytes are silently left out.
      max_sentence_length=2**30,
      num_threads=16,  # The default; fixed, because sums depend on its order.
      minloglevel=2,
    )
  except RuntimeError as error:
    raise UserError(
      f'Cannot train a vocabulary of --vocab_size {vocab_size} on the text of '
      f'{len(files)} files, first {files[0]}: {error}'
    ) from error


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line; an error goes to stderr, with status 2."""
  parser = argparse.ArgumentParser(
    prog='python -m ptune.tasks.vocabulary',
    description='Trains a SentencePiece vocabulary of the kind that T5 has.',
  )
  parser.add_argument(
    '--input',
    nargs='+',
    required=True,
    metavar='GLOB',
    help='text files, .txt or .txt.gz, one paragraph a line',
  )
  parser.add_argument(
    '--vocab_size',
    type=int,
    default=32000,
    help='pieces without sentinels (default: 32000, as T5)',
  )
  parser.add_argument('--output', required=True, help='the model file to write')
  parser.add_argument(
    '--byte_fallback',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='write unknown characters in bytes (default: yes)',
  )
  flags = parser.parse_args(arguments)
  try:
    pieces = train_vocabulary(
      flags.input, flags.vocab_size, flags.output, flags.byte_fallback
    )
  except ValueError as error:
    parser.error(str(error))
  print(f'{flags.output}: {pieces.get_piece_size()} pieces')
  encoded = pieces.encode(SAMPLE)
  print(f'{SAMPLE} -> {" ".join(pieces.id_to_piece(encoded))}')
  print(f'ids: {encoded}')


if __name__ == '__main__':
  main()
