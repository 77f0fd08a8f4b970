"""From text to answer with models of all families, through the commands.

Each test converts a small random model with its vocabulary, and exports a
prompt. Then transformers and PEFT answer texts with the written files. They
need `pip install -e '.[test,interop]'`.
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

# These libraries warn about each other's deprecations.
pytestmark = pytest.mark.filterwarnings('ignore')

TEXTS = ['This is a review.', 'a {b} or c', '日本語', '', 'one\n\ntwo two two']


def sentencepiece(path):
  """Writes a vocabulary of T5's kind."""
  shutil.copy(pretrained.VOCABULARY, path / 'spiece.model')
  return path


def t5(kind, **changes):
  """Returns a maker of a `families_test` model for a given vocabulary size."""

  def make(path, rows):
    made = families_test.KINDS[kind]
    config = (*made.config, ('vocab_size', rows))
    return dataclasses.replace(made, config=config, **changes).make(path)

  return make


def t5gemma(name):
  """Returns a maker of a `t5gemma_test` model for a given vocabulary size."""

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
  """Prevents answers with tokens that have no text."""
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
  """Returns the answers of transformers with PEFT's prompt."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
  model = peft.PeftModel.from_pretrained(
    kind.from_pretrained(hf, dtype=torch.float32), adapter
  ).eval()
  answers = []
  for text in TEXTS:
    ids = tokenizer(text).input_ids
    if ids[-1:] != [tokenizer.eos_token_id]:  # Gemma and Llama add none.
      ids.append(tokenizer.eos_token_id)
    with torch.no_grad():
      answer = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=recorded.LENGTHS['targets'],
        do_sample=False,
        num_beams=1,
        # Its cache assumes that the decoder is as deep as the encoder.
        use_cache=False,
      )
    answers.append(tokenizer.decode(answer[0], skip_special_tokens=True))
  return answers
