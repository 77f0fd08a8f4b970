"""Makes files of small vocabularies, of each kind that `tokenizers` reads."""

import json
import pathlib

from ptune import pretrained

ENDS = {'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '<unk>'}


def corpus() -> str:
  """Returns the text that the vocabularies are trained on."""
  return pretrained.VOCABULARY.parent.joinpath('README.md').read_text()


def madlad(path: pathlib.Path) -> pathlib.Path:
  """Trains a SentencePiece model with MADLAD's ids: pad 1, EOS 2, unknown 0."""
  import sentencepiece

  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus().splitlines()),
    model_prefix=str(path / 'spiece'),
    vocab_size=300,
    hard_vocab_limit=False,
    unk_id=0,
    pad_id=1,
    eos_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  (path / 'spiece.vocab').unlink()
  return path


def codet5(path: pathlib.Path) -> pathlib.Path:
  """Writes CodeT5's files: byte-level BPE, with sentinels as added tokens."""
  import tokenizers

  made = tokenizers.ByteLevelBPETokenizer()
  special = ['<pad>', '<s>', '</s>', '<unk>', '<mask>']
  made.train_from_iterator(
    corpus().splitlines(), vocab_size=500, special_tokens=special
  )
  made.save_model(str(path))
  size = made.get_vocab_size()
  extra = [f'<extra_id_{i}>' for i in reversed(range(10))]
  added = {token: size + i for i, token in enumerate(extra)}
  (path / 'added_tokens.json').write_text(json.dumps(added))
  (path / 'special_tokens_map.json').write_text(
    json.dumps({'additional_special_tokens': extra})
  )
  (path / 'tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'RobertaTokenizer', 'eos_token': '</s>'})
  )
  return path


def _with_bytes(made):
  """Adds a piece for every byte after the tokenizer's other pieces."""
  state = json.loads(made.to_str())
  vocab = state['model']['vocab']
  for byte in range(256):
    vocab[f'<0x{byte:02X}>'] = len(vocab)
  return type(made).from_str(json.dumps(state))


def llama(path: pathlib.Path) -> pathlib.Path:
  """Writes a BPE with byte fallback, like Llama's and Gemma's."""
  import tokenizers
  from tokenizers import decoders, models, normalizers, trainers

  made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=['<unk>', '<s>', '</s>'],
    initial_alphabet=[],
  )
  made.train_from_iterator(corpus().splitlines(), trainer)
  made = _with_bytes(made)
  made.add_tokens([tokenizers.AddedToken('{', normalized=False), '}'])
  made.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast'} | ENDS)
  )
  return path


def gemma(path: pathlib.Path) -> pathlib.Path:
  """Writes a tokenizer like Gemma's: byte fallback, and <bos> before a text."""
  import tokenizers
  from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
  )

  special = ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>']
  made = tokenizers.Tokenizer(
    models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>')
  )
  made.normalizer = normalizers.Replace(' ', '▁')
  made.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
  made.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=500, special_tokens=special, initial_alphabet=[]
  )
  made.train_from_iterator(corpus().splitlines(), trainer)
  made = _with_bytes(made)
  made.add_tokens(
    [
      tokenizers.AddedToken(token, normalized=False)
      for token in ('\n\n', '<table>', '▁▁')
    ]
  )
  made.add_special_tokens(['<start_of_turn>'])
  made.post_processor = processors.TemplateProcessing(
    single='<bos> $A', special_tokens=[('<bos>', 2)]
  )
  made.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'tokenizer_class': 'GemmaTokenizer',
        'add_bos_token': False,  # The template overrides this.
        **{f'{name}_token': f'<{name}>' for name in ('bos', 'eos', 'pad')},
        'unk_token': '<unk>',
      }
    )
  )
  return path
