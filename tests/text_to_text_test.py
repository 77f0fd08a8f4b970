"""Written models, vocabularies and prompts give the same answers to texts.

The tests go from text to answer in ptune, and in transformers with PEFT. These
need `pip install -e '.[test,interop]'`.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptune import pretrained
from ptune.convert import open_checkpoint
from ptune.convert.conversion import convert
from ptune.convert.export import export
from ptune.convert.prompts import read_prompt
from ptune.convert.source import EMBEDDING
from ptune.convert.tokenizer_files import write_vocabulary
from ptune.convert.vocabulary import open_vocabulary
from ptune.methods import prompt
from tests import layouts
from tests.interop import WHY, peft, torch, transformers

tokenizers = pytest.importorskip('tokenizers', reason=f'tokenizers is {WHY}')

# These libraries warn about each other's deprecations.
pytestmark = pytest.mark.filterwarnings('ignore')

BASE = 'ptune://tiny'
LENGTH, DECODED = 64, 8


@pytest.fixture(scope='module')
def texts():
  """Returns 75 lines of many words; some characters have no piece."""
  readme = pretrained.VOCABULARY.parent.joinpath('README.md').read_text()
  lines = [' '.join(line.split()[:12]) for line in readme.splitlines() if line]
  lines = [line for line in lines if line][:70]
  found = [*lines, 'Größe {1}', '  two  blanks ', '日本語', 'a\tb', 'ﬁ ½ 😀']
  return (found * 3)[:75]


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """Returns transformers' base and PEFT's prompt, as written by ptune."""
  path = tmp_path_factory.mktemp('written')
  table = open_checkpoint(BASE).leaves[EMBEDDING].read().astype(np.float32)
  rows = table[np.random.default_rng(5).integers(3, 2000, 10)]
  np.save(path / 'p.npy', rows)
  convert(BASE, 'huggingface', path / 'hf')
  lines = export(
    read_prompt(path / 'p.npy'), 'peft', path / 'peft', base=str(path / 'hf')
  )
  assert any(line.startswith('vocabulary: ') for line in lines)
  return path, rows


def test_texts_are_answered_alike(written, texts):
  path, rows = written
  config, arrays = layouts.restored(BASE)
  vocabulary = open_vocabulary(BASE)
  ids = [[*vocabulary.encode(t), vocabulary.eos_id] for t in texts]
  assert max(map(len, ids)) <= LENGTH
  inputs = np.array([row + [0] * (LENGTH - len(row)) for row in ids], np.int32)
  model = layouts.model(config, len(rows))
  params = layouts.nested({**arrays, prompt.PATH: jnp.asarray(rows)})
  tokens, _ = jax.jit(lambda p, x: model.predict(p, x, DECODED))(params, inputs)
  ours = [vocabulary.decode(row.tolist()) for row in np.asarray(tokens)]
  assert len(set(ours)) > 10

  tokenizer = transformers.AutoTokenizer.from_pretrained(path / 'hf')
  base = transformers.AutoModelForSeq2SeqLM.from_pretrained(
    path / 'hf', dtype=torch.float32
  )
  tuned = peft.PeftModel.from_pretrained(base, path / 'peft').eval()
  read = tokenizer(texts, padding=True, return_tensors='pt')
  with torch.no_grad():
    answers = tuned.generate(
      input_ids=read.input_ids,
      attention_mask=read.attention_mask,
      max_new_tokens=DECODED,
      do_sample=False,
      num_beams=1,
      # Its cache assumes that the decoder is as deep as the encoder.
      use_cache=False,
    )
  theirs = tokenizer.batch_decode(answers, skip_special_tokens=True)
  assert [a.strip() for a in theirs] == [a.strip() for a in ours]


def test_the_adapter_s_directory_has_the_vocabulary_too(written, texts):
  path, _ = written
  one, other = (
    transformers.AutoTokenizer.from_pretrained(path / name)
    for name in ('hf', 'peft')
  )
  assert one(texts).input_ids == other(texts).input_ids
  assert (path / 'hf' / 'spiece.model').read_bytes() == (
    pretrained.VOCABULARY.read_bytes()
  )
  said = json.loads((path / 'hf' / 'generation_config.json').read_text())
  assert said == {
    'decoder_start_token_id': 0,
    'eos_token_id': 1,
    'pad_token_id': 0,
  }


def test_bytes_are_byt5_s(tmp_path, texts):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'config.json').write_text('{"vocab_size": 384}')
  write_vocabulary(tmp_path, tmp_path / 'in', 384)
  (tmp_path / 'config.json').write_text('{"model_type": "t5"}')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = open_vocabulary(tmp_path)
  for text in texts[-5:]:
    assert theirs(text).input_ids == [*ours.encode(text), ours.eos_id]


def test_added_tokens_are_written(tmp_path, texts):
  path = tmp_path / 'in'
  path.mkdir()
  shutil.copy(pretrained.VOCABULARY, path / 'spiece.model')
  size = open_vocabulary(path).vocab_size
  (path / 'added_tokens.json').write_text(json.dumps({'{': size}))
  write_vocabulary(tmp_path, path, size + 1)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours, before = open_vocabulary(tmp_path), open_vocabulary(path)
  assert size in ours.encode('a {1}')
  for text in texts:
    ids = before.encode(text)
    assert ours.encode(text) == ids
    assert theirs(text).input_ids == [*ids, ours.eos_id]


def test_files_of_transformers_are_copied(tmp_path):
  path = tmp_path / 'in'
  path.mkdir()
  files = {
    'tokenizer.json': '{"model": 1}',
    'tokenizer_config.json': '{"x": 1}',
    'special_tokens_map.json': '{}',
  }
  for name, text in files.items():
    (path / name).write_text(text)
  (path / 'other.txt').write_text('')
  write_vocabulary(tmp_path, path, 100)
  for name, text in files.items():
    assert (tmp_path / name).read_text() == text
  assert not (tmp_path / 'other.txt').exists()


def test_without_a_vocabulary_a_line_says_so(tmp_path):
  convert(BASE, 't5x', tmp_path / 't5x')
  lines = convert(tmp_path / 't5x', 'huggingface', tmp_path / 'hf')
  assert any('name one with --vocabulary=PATH' in line for line in lines)
  convert(tmp_path / 't5x', 'huggingface', tmp_path / 'with', vocabulary=BASE)
  assert (tmp_path / 'with' / 'tokenizer.json').exists()
