"""From a text to an answer: models of all families, through the commands.

A small random model and its vocabulary are converted, a prompt is exported, and
transformers with PEFT answers texts with what was written. They come with
`pip install -e '.[test,interop]'`.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import ptune
from ptune import pretrained
from ptune.api import recorded
from ptune.convert.vocabulary import open_vocabulary
from ptune.model.config import TokenIds
from tests import layouts, vocabularies
from tests.interop import WHY, peft, torch, transformers

pytest.importorskip('tokenizers', reason=f'tokenizers is {WHY}')

from tests import families_test, t5gemma_test

# They warn of one another's deprecations.
pytestmark = pytest.mark.filterwarnings('ignore')

TEXTS = ['This is a review.', 'a {b} or c', '日本語', '', 'one\n\ntwo two two']


def sentencepiece(path):
  """T5's kind of vocabulary."""
  shutil.copy(pretrained.VOCABULARY, path / 'spiece.model')
  return path


def t5(kind, **changes):
  """A kind of `families_test`, for a vocabulary of some size."""

  def make(path, rows):
    made = families_test.KINDS[kind]
    config = (*made.config, ('vocab_size', rows))
    return dataclasses.replace(made, config=config, **changes).make(path)

  return make


def t5gemma(name):
  """A model of `t5gemma_test`, for a vocabulary of some size."""

  def make(path, rows):
    config = dataclasses.replace(t5gemma_test.MODELS[name], vocab_size=rows)
    model = t5gemma_test.reference_of(config)
    model.save_pretrained(path)
    return model

  return make


KINDS = {
  'madlad': (t5('madlad'), vocabularies.madlad),
  'long_t5': (t5('long_t5 global'), sentencepiece),
  'umt5': (t5('umt5'), sentencepiece),
  'pile_t5': (t5('umt5', ids=TokenIds(eos=2)), vocabularies.llama),
  'codet5': (t5('codet5', seed=9), vocabularies.codet5),
  't5gemma': (t5gemma('one_untied'), vocabularies.gemma),
  't5gemma_2': (t5gemma('two_untied'), vocabularies.gemma),
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_commands_write_what_answers_texts_alike(kind, tmp_path, capsys):
  make, write = KINDS[kind]
  base = tmp_path / 'base'
  base.mkdir()
  write(base)
  vocabulary = open_vocabulary(base)
  model = make(base, vocabulary.vocab_size + 3)
  silence(model, vocabulary)
  model.save_pretrained(base)
  width = model.get_input_embeddings().weight.shape[1]
  rows = np.random.default_rng(1).normal(size=(4, width)).astype(np.float32)
  np.save(tmp_path / 'p.npy', rows)

  hf, adapter = tmp_path / 'hf', tmp_path / 'peft'
  layouts.run('convert', base, '--format=huggingface', f'--output={hf}')
  layouts.run(
    'export', f'--prompt={tmp_path / "p.npy"}', f'--base={hf}',
    f'--output={adapter}',
  )  # fmt: skip
  capsys.readouterr()
  found = []
  for path in (base, hf):
    layouts.run('inspect', path, '--json', '--fingerprint')
    found.append(json.loads(capsys.readouterr().out))
  assert found[0]['base'] == found[1]['base']
  assert found[0]['config'] == found[1]['config']
  layouts.run('inspect', adapter, '--json')
  assert json.loads(capsys.readouterr().out)['prompt']['length'] == len(rows)

  ours = ptune.load(adapter, base=str(hf)).predict(TEXTS)
  assert ours == ptune.load(tmp_path / 'p.npy', base=str(base)).predict(TEXTS)
  assert ours == theirs(hf, adapter, type(model))
  assert len(set(ours)) > 2


def silence(model, vocabulary):
  """Keeps a model from answering with tokens that have no text of their own."""
  rows = model.get_output_embeddings().weight
  texts = [vocabulary.decode([i]) for i in range(vocabulary.vocab_size)]
  mute = [
    i
    for i, text in enumerate(texts)
    if not text.strip() or not text.isascii() or '<' in text
  ]
  mute += range(vocabulary.vocab_size, len(rows))
  with torch.no_grad():
    rows[[i for i in mute if i != vocabulary.eos_id]] = 0


def theirs(hf, adapter, kind):
  """What transformers answers, with PEFT's prompt."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
  model = peft.PeftModel.from_pretrained(
    kind.from_pretrained(hf, dtype=torch.float32), adapter
  ).eval()
  answers = []
  for text in TEXTS:
    ids = tokenizer(text).input_ids
    if ids[-1:] != [tokenizer.eos_token_id]:  # Gemma's and Llama's add none.
      ids.append(tokenizer.eos_token_id)
    with torch.no_grad():
      answer = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=recorded.LENGTHS['targets'],
        do_sample=False,
        num_beams=1,
        # Its cache takes the decoder to be as deep as the encoder.
        use_cache=False,
      )
    answers.append(tokenizer.decode(answer[0], skip_special_tokens=True))
  return answers
