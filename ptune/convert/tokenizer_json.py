"""Vocabularies of Hugging Face's `tokenizers`: tokenizer.json, or BPE files.

    tokenizer.json               any kind: byte-level BPE, Llama's, ...
    vocab.json and merges.txt    byte-level BPE, as in CodeT5
    *.model and added tokens     SentencePiece, with tokens that it lacks

Texts get the same ids as in transformers: added tokens are found in the text,
and the template's prefix (CodeT5's <s>, Gemma's <bos>) is there too. A task's
features append EOS, as with every vocabulary.
"""

import functools
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from ptune.convert import sentencepiece_tokenizer
from ptune.convert.pieces import load_sentencepiece, sentinels
from ptune.convert.storage import read_json
from ptune.errors import UserError

if TYPE_CHECKING:
  import tokenizers

TOKENIZER = 'tokenizer.json'
SENTENCEPIECE = ('spiece.model', 'sentencepiece.model', 'tokenizer.model')
CONFIG = 'tokenizer_config.json'
SPECIAL = 'special_tokens_map.json'
ADDED = 'added_tokens.json'
BPE = ('vocab.json', 'merges.txt')
# Names of special tokens if no file gives them.
USUAL = {
  'eos_token': ('</s>', '<eos>', '<|endoftext|>'),
  'pad_token': ('<pad>', '<|padding|>'),
  'unk_token': ('<unk>',),
}
# BOS if no file names it; in other classes it is <s>.
BOS = {'GemmaTokenizer': '<bos>'}


class Tokenizer:
  """A vocabulary of `tokenizers`, in the form of `pieces.Vocabulary`."""

  def __init__(self, directory: epath.PathLike):
    """Sets the directory, which is read on first use."""
    self.directory = os.fspath(directory)

  @functools.cached_property
  def tokenizer(self) -> 'tokenizers.Tokenizer':
    """The tokenizer with all its added tokens."""
    return load(epath.Path(self.directory))

  @functools.cached_property
  def _special(self) -> dict[str, int]:
    return special_ids(epath.Path(self.directory), self.tokenizer)

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the highest id."""
    return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

  @property
  def eos_id(self) -> int:
    """The id that ends inputs and targets."""
    return self._special['eos_token']

  @property
  def pad_id(self) -> int:
    """The id of padding; 0 if there is none."""
    return self._special.get('pad_token', 0)

  @property
  def unk_id(self) -> int | None:
    """The id of text that the vocabulary cannot write, or None."""
    return self._special.get('unk_token')

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    ids = self.tokenizer.encode(text).ids
    return ids[:-1] if ids and ids[-1] == self.eos_id else ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids up to the first EOS, without special tokens."""
    known = [int(i) for i in ids]
    if self.eos_id in known:
      known = known[: known.index(self.eos_id)]
    known = [i for i in known if i < self.vocab_size]
    return self.tokenizer.decode(known, skip_special_tokens=True)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Tokenizer) and self.directory == other.directory

  def __hash__(self) -> int:
    return hash(self.directory)

  def __str__(self) -> str:
    return self.directory


def load(directory: epath.Path) -> 'tokenizers.Tokenizer':
  """Reads the tokenizer of a directory.

  Raises:
    UserError: `tokenizers` is not installed, a file is damaged, or there is no
      tokenizer.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise UserError(
      f'{directory} has a vocabulary that needs the library tokenizers:'
      ' pip install "ptune[tokenizers]"'
    ) from error
  names = {child.name for child in directory.iterdir()}
  try:
    if TOKENIZER in names:
      text = (directory / TOKENIZER).read_text()
      made = tokenizers.Tokenizer.from_str(text)
    elif set(BPE) <= names:
      made = _byte_level(directory)
    else:
      made = _sentencepiece(directory)
  except UserError:
    raise
  # The library raises bare exceptions.
  except Exception as error:
    raise UserError(
      f'the vocabulary in {directory} is damaged: {error}'
    ) from error
  _add(made, added_tokens(directory))
  return made


def begins(directory: epath.Path) -> bool:
  """Whether a special token, such as BOS, comes before every text.

  transformers asks the template of tokenizer.json, and tokenizer_config.json if
  there is no such file.
  """
  if not (directory / TOKENIZER).exists():
    return bool(_config(directory).get('add_bos_token'))
  template = read_json(directory / TOKENIZER).get('post_processor') or {}
  return 'SpecialToken' in (template.get('single') or [{}])[0]


def _byte_level(directory: epath.Path) -> 'tokenizers.Tokenizer':
  """Returns GPT-2's byte-level BPE with RoBERTa's template, as in CodeT5."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, processors

  vocab = read_json(directory / BPE[0])
  config = _config(directory)
  prefix = bool(config.get('add_prefix_space', False))
  merges = []
  for line in (directory / BPE[1]).read_text().splitlines():
    if line and not line.startswith('#version'):
      merges.append(tuple(line.split(' ')))
  made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
  made.decoder = decoders.ByteLevel()
  start = _content(config.get('cls_token')) or '<s>'
  end = _content(config.get('sep_token')) or '</s>'
  if start in vocab and end in vocab:
    made.post_processor = processors.TemplateProcessing(
      single=f'{start} $A {end}',
      pair=f'{start} $A {end} {end} $B {end}',
      special_tokens=[(start, vocab[start]), (end, vocab[end])],
    )
  _add(
    made,
    {
      vocab[name]: {'content': name, 'special': True}
      for name in ('<s>', '</s>', '<pad>', '<unk>', '<mask>')
      if name in vocab
    },
  )
  return made


def sentencepiece_of(directory: epath.Path) -> epath.Path:
  """Returns the SentencePiece file of a directory, which must have one."""
  return next(f for n in SENTENCEPIECE if (f := directory / n).exists())


def _sentencepiece(directory: epath.Path) -> 'tokenizers.Tokenizer':
  """Returns a SentencePiece model with added tokens after its sentinels.

  If BOS comes before texts, the tokenizer leaves EOS to the task.
  """
  from tokenizers import processors

  file = sentencepiece_of(directory)
  pieces = load_sentencepiece(file)
  size = pieces.vocab_size()
  room = [
    i - size
    for i, token in added_tokens(directory).items()
    if i >= size and not token['content'].startswith('<extra_id_')
  ]
  extra = max(0, min([sentinels(pieces), *room]))
  made = sentencepiece_tokenizer.tokenizer_of(file, extra)
  if begins(directory):
    config = _config(directory)
    kind = str(config.get('tokenizer_class')).removesuffix('Fast')
    bos = _content(config.get('bos_token')) or BOS.get(kind, '<s>')
    made.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A', special_tokens=[(bos, made.token_to_id(bos))]
    )
  return made


def _config(directory: epath.Path) -> dict[str, Any]:
  """Merges tokenizer_config.json and special_tokens_map.json."""
  said: dict[str, Any] = {}
  for name in (SPECIAL, CONFIG):
    if (directory / name).exists():
      said |= read_json(directory / name)
  return said


def _content(token: Any) -> str | None:
  """Returns a token's text; files have the text, or {"content": text, ...}."""
  if isinstance(token, Mapping):
    token = token.get('content')
  return token if isinstance(token, str) else None


def added_tokens(directory: epath.Path) -> dict[int, dict[str, Any]]:
  """Returns the tokens that the files add to a vocabulary, by id.

  {32100: {'content': '{', 'special': False, ...}}
  """
  found: dict[int, dict[str, Any]] = {}
  config = _config(directory)
  more = config.get('additional_special_tokens')
  if more is None:  # transformers 5 has another name for it.
    more = config.get('extra_special_tokens')
  special = {_content(token) for token in more or () if _content(token)}
  special |= {_content(v) for k, v in config.items() if k.endswith('_token')}
  if (directory / ADDED).exists():
    for content, i in read_json(directory / ADDED).items():
      found[int(i)] = {'content': content, 'special': content in special}
  if (directory / TOKENIZER).exists():
    for token in read_json(directory / TOKENIZER).get('added_tokens', ()):
      token = dict(token)
      found[int(token.pop('id'))] = token
  for i, token in dict(config.get('added_tokens_decoder') or {}).items():
    found[int(i)] = {k: v for k, v in token.items() if not k.startswith('__')}
  return found


def _add(
  made: 'tokenizers.Tokenizer', tokens: Mapping[int, Mapping[str, Any]]
) -> None:
  """Adds tokens in the order of their ids, with their properties."""
  import tokenizers

  for i, said in sorted(tokens.items()):
    content = said['content']
    before = made.token_to_id(content)
    how = {
      key: bool(said[key])
      for key in ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')
      if key in said
    }
    # Match literally unless a file says otherwise. SentencePiece's normalizer
    # makes a line end a blank, and a lone blank nothing, which is everywhere.
    token = tokenizers.AddedToken(content, **{'normalized': False, **how})
    (made.add_special_tokens if token.special else made.add_tokens)([token])
    if made.token_to_id(content) != i:
      raise UserError(
        f'the added token {content!r} has the id {i} in the files of the'
        f' vocabulary, but {before or made.token_to_id(content)} is there;'
        ' the files do not belong together'
      )


def special_ids(
  directory: epath.Path, made: 'tokenizers.Tokenizer'
) -> dict[str, int]:
  """Returns the ids of eos_token, pad_token and unk_token, if they exist.

  Raises:
    UserError: There is no EOS.
  """
  config = _config(directory)
  found = {}
  for role, usual in USUAL.items():
    names = [_content(config.get(role))] if config.get(role) else usual
    for name in names:
      i = None if name is None else made.token_to_id(name)
      if i is not None:
        found[role] = i
        break
  if 'eos_token' not in found:
    raise UserError(
      f'the vocabulary in {directory} does not say which token ends a text;'
      f' name it as eos_token in {CONFIG}'
    )
  return found
