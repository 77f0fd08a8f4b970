"""SentencePiece's unigram models as tokenizers of the library `tokenizers`.

It repeats each step of SentencePiece: map characters with its table (NFKC),
remove outer and double blanks, write ▁ for a blank and before the text, take
the most probable pieces, and use bytes for characters without a piece.
"""

from typing import TYPE_CHECKING

from etils import epath

from ptune.convert.storage import read_bytes
from ptune.errors import UserError

if TYPE_CHECKING:
  import tokenizers

SPACE = '▁'


def tokenizer_of(
  file: epath.PathLike, extra_ids: int
) -> 'tokenizers.Tokenizer':
  """Makes a tokenizer that gives the ids of a SentencePiece model, and EOS.

  Args:
    file: The SentencePiece model.
    extra_ids: Sentinels at its end: <extra_id_0> has the highest id.

  Raises:
    UserError: The model is not a unigram model.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise UserError(
      'the library tokenizers writes tokenizer.json, which transformers reads:'
      ' pip install "ptune[tokenizers]"'
    ) from error
  from sentencepiece import sentencepiece_model_pb2 as proto
  from tokenizers import (
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
  )

  model = proto.ModelProto.FromString(read_bytes(file, 'VOCABULARY'))
  trainer, spec = model.trainer_spec, model.normalizer_spec
  if trainer.model_type != trainer.UNIGRAM:
    raise UserError(
      f'{file} is not a unigram model of SentencePiece; ptune can write no'
      " other kind for transformers. Put the model's tokenizer.json beside it"
    )
  pieces = [(piece.piece, piece.score) for piece in model.pieces]
  kind = proto.ModelProto.SentencePiece
  eos = next(
    i
    for i, piece in enumerate(model.pieces)
    if piece.piece == trainer.eos_piece
  )
  sentinels = [f'<extra_id_{i}>' for i in reversed(range(extra_ids))]
  made = tokenizers.Tokenizer(
    models.Unigram(
      [*pieces, *((name, 0.0) for name in sentinels)],
      unk_id=trainer.unk_id,
      byte_fallback=trainer.byte_fallback,
    )
  )
  steps = []
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    steps += [
      normalizers.Replace(Regex(r'\A +| +\z'), ''),
      normalizers.Replace(Regex(' {2,}'), ' '),
    ]
  if steps:
    made.normalizer = normalizers.Sequence(steps)
  scheme = 'always' if spec.add_dummy_prefix else 'never'
  # Pieces do not cross blanks, unless SentencePiece was trained to do so.
  split = trainer.split_by_whitespace
  space = {'replacement': SPACE, 'prepend_scheme': scheme, 'split': split}
  made.pre_tokenizer = pre_tokenizers.Metaspace(**space)
  made.decoder = decoders.Sequence(
    [decoders.ByteFallback(), decoders.Metaspace(**space)]
  )
  made.post_processor = processors.TemplateProcessing(
    single=f'$A {trainer.eos_piece}',
    pair=f'$A {trainer.eos_piece} $B {trainer.eos_piece}',
    special_tokens=[(trainer.eos_piece, eos)],
  )
  special = [
    piece.piece
    for piece in model.pieces
    if piece.type in (kind.CONTROL, kind.UNKNOWN)
  ]
  made.add_special_tokens([*special, *sentinels])
  made.add_tokens(
    [p.piece for p in model.pieces if p.type == kind.USER_DEFINED]
  )
  return made
