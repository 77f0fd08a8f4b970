"""SentencePiece models as tokenizers of the library `tokenizers`.

It repeats each step of SentencePiece: map characters with its table (NFKC),
remove outer and double blanks, write ▁ for a blank and before the text, take
the most probable pieces (unigram) or merge the best ones (BPE), and use bytes
for characters without a piece.
"""

from typing import TYPE_CHECKING, Any

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
    UserError: The model is neither a unigram model nor a BPE.
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
  if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
    raise UserError(
      f'{file} is neither a unigram model nor a BPE of SentencePiece; ptune can'
      " write no other kind for transformers. Put the model's tokenizer.json"
      ' beside it'
    )
  kind = proto.ModelProto.SentencePiece
  defined = [p.piece for p in model.pieces if p.type == kind.USER_DEFINED]
  if defined and spec.add_dummy_prefix and not spec.remove_extra_whitespaces:
    raise UserError(
      f'{file} puts a blank before texts, keeps their blanks and has pieces'
      f' that its user defined: {defined[:9]}. The library tokenizers has no'
      ' such tokenizer. Put the tokenizer.json of the model beside it'
    )
  eos = next(
    i
    for i, piece in enumerate(model.pieces)
    if piece.piece == trainer.eos_piece
  )
  sentinels = [f'<extra_id_{i}>' for i in reversed(range(extra_ids))]
  names = [*(piece.piece for piece in model.pieces), *sentinels]
  if trainer.model_type == trainer.BPE:
    pieces = models.BPE(
      vocab={name: i for i, name in enumerate(names)},
      merges=_merges(model),
      unk_token=names[trainer.unk_id],
      fuse_unk=True,
      byte_fallback=trainer.byte_fallback,
    )
  else:
    scores = [
      *(piece.score for piece in model.pieces),
      *(0.0 for _ in sentinels),
    ]
    pieces = models.Unigram(
      list(zip(names, scores, strict=True)),
      unk_id=trainer.unk_id,
      byte_fallback=trainer.byte_fallback,
    )
  made = tokenizers.Tokenizer(pieces)
  steps = []
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    steps += [
      normalizers.Replace(Regex(r'\A +| +\z'), ''),
      normalizers.Replace(Regex(' {2,}'), ' '),
    ]
  elif spec.add_dummy_prefix:
    # The blank before a text comes on top of its own.
    steps.append(normalizers.Replace(Regex(r'\A '), '  '))
  if not spec.add_dummy_prefix:
    # Here, so that pieces with blanks that the user defined are found.
    steps.append(normalizers.Replace(' ', SPACE))
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
    [
      tokenizers.AddedToken(piece, normalized=not spec.add_dummy_prefix)
      for piece in defined
    ]
  )
  return made


def _merges(model: Any) -> list[tuple[str, str]]:
  """The merges of a BPE: all ways to make a piece of two, the best piece first.

  SentencePiece merges the neighbours that make the piece of the highest score.
  """
  normal = [p for p in model.pieces if p.type == p.NORMAL]
  number = {piece.piece: i for i, piece in enumerate(normal)}
  merges = []
  for piece in sorted(normal, key=lambda piece: -piece.score):
    text = piece.piece
    ways = [(text[:i], text[i:]) for i in range(1, len(text))]
    known = [(a, b) for a, b in ways if a in number and b in number]
    merges += sorted(known, key=lambda way: (number[way[0]], number[way[1]]))
  return merges
