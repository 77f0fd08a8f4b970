"""`ptune infer` writes one line per input, in order, for any batching."""

import copy
import json

import jax
import numpy as np
import pytest

from ptune import infer
from ptune.convert.pieces import Bytes
from ptune.data import seqio_task
from ptune.methods import prompt
from ptune.model import parameters, partitioning
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.serving import trained_model
from ptune.tasks import files
from ptune.training.settings import Trained
from tests import tiny

WORDS = [word for word, _ in tiny.rows('test')]


@pytest.fixture(scope='module')
def trained():
  """Returns the MODEL_DIR of a run."""
  return tiny.trained()


def run(output_dir, **changes):
  """Runs `infer`; returns the records that it wrote."""
  path = tiny.use(infer.infer, output_dir, **changes)
  assert not list(path.parent.glob('.*'))  # No partial file is left.
  return [json.loads(line) for line in path.read_text().split('\n')[:-1]]


def write(path, *lines):
  path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
  return str(path)


def assert_same(got, expected):
  assert len(got) == len(expected)
  for left, right in zip(got, expected, strict=True):
    assert left.pop('score') == pytest.approx(right.pop('score'), rel=1e-5)
    likely, expected_likely = (
      x.pop('probabilities', {}) for x in (left, right)
    )
    assert likely == pytest.approx(expected_likely, rel=1e-4, abs=1e-6)
    assert left == right


def test_a_split_is_predicted_in_order(trained, tmp_path):
  records = run(tmp_path, model_dir=trained)
  assert [r['inputs'] for r in records] == WORDS
  assert [r['targets'] for r in records] == [y for _, y in tiny.rows('test')]
  assert all(
    set(r) == {'inputs', 'targets', 'prediction', 'score'} for r in records
  )
  assert (tmp_path / 'tiny-test-predict.jsonl').exists()


def test_a_text_file_a_json_file_and_a_split_give_the_same(trained, tmp_path):
  expected = [
    {k: v for k, v in record.items() if k != 'targets'}
    for record in run(tmp_path, model_dir=trained)
  ]
  text = write(tmp_path / 'a.txt', WORDS[0], '', *WORDS[1:])
  lines = [json.dumps({'inputs': word, 'id': 3}) for word in WORDS]
  jsonl = write(tmp_path / 'b.jsonl', *lines)
  for file in (text, jsonl):
    got = run(tmp_path / 'out', model_dir=trained, input_file=file)
    assert_same(got, copy.deepcopy(expected))


@pytest.mark.parametrize(
  'how',
  [
    pytest.param(Decoding(num_beams=2), marks=pytest.mark.slow),
    Decoding(temperature=0.7, top_k=5),
  ],
)
def test_no_answer_depends_on_the_batches(trained, tmp_path, monkeypatch, how):
  settings = {'model_dir': trained, 'decoding': how, 'split': 'train'}
  expected = run(tmp_path / 'a', bucket_multiple=None, **settings)
  # With several chunks, each is sorted by length and padded to its own longest.
  monkeypatch.setattr(infer, 'CHUNK', 1)
  got = run(tmp_path / 'b', batch_size=24, bucket_multiple=16, **settings)
  assert_same(got, expected)


@pytest.mark.slow
def test_samples_are_drawn_by_the_seed(trained, tmp_path):
  settings = {'model_dir': trained, 'decoding': Decoding(temperature=1.0)}
  first, again, other = (
    [r['prediction'] for r in run(tmp_path / str(i), seed=seed, **settings)]
    for i, seed in enumerate((0, 0, 1))
  )
  assert first == again != other


def test_scores_are_those_of_the_model(trained, tmp_path):
  rows = [('abba', 'yes'), ('b', 'no'), ('ab', 'yesyes, trimmed'), ('a', '')]
  lines = [json.dumps({'inputs': x, 'targets': y}) for x, y in rows]
  file = write(tmp_path / 'a.jsonl', *lines)
  got = run(tmp_path, model_dir=trained, input_file=file, mode='score')
  assert [(r['inputs'], r['targets']) for r in got] == rows
  assert all('prediction' not in r for r in got)

  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  plan = parameters.plan(tiny.CONFIG, prompt.prompt(3), mesh)
  params, _ = trained_model.load(plan, Trained(trained))
  score = jax.jit(EncoderDecoderModel(plan.network).score)
  task = seqio_task.load('tiny')
  for record, (inputs, targets) in zip(got, rows, strict=True):
    texts = {'inputs': inputs, 'targets': targets}
    _, row = seqio_task.encode(task, tiny.LENGTHS, texts)
    sides = {k: 'inputs' if 'encoder' in k else 'targets' for k in row}
    batch = {
      k: np.pad(v, (0, tiny.LENGTHS[sides[k]] - len(v)))[None]
      for k, v in row.items()
    }
    with plan.scope():
      expected = float(score(params, batch)[0])
    assert record['score'] == pytest.approx(expected, rel=1e-5)


def test_a_label_is_as_likely_as_its_score_says(trained, tmp_path):
  words = WORDS[:5]
  file = write(
    tmp_path / 'a.jsonl', *(json.dumps({'inputs': word}) for word in words)
  )
  got = run(tmp_path, model_dir=trained, input_file=file, mode='classify')
  assert [r['inputs'] for r in got] == words
  labels = sorted({label for _, label in tiny.rows('train')})
  assert len(labels) > 1
  asked = [{'inputs': w, 'targets': y} for w in words for y in labels]
  each = write(tmp_path / 'b.jsonl', *map(json.dumps, asked))
  scored = run(tmp_path, model_dir=trained, input_file=each, mode='score')
  scores = np.reshape([r['score'] for r in scored], (len(words), len(labels)))
  for record, own in zip(got, scores, strict=True):
    likely = np.exp(own) / np.exp(own).sum()
    assert list(record['probabilities']) == labels
    np.testing.assert_allclose(
      [*record['probabilities'].values()], likely, rtol=1e-4, atol=1e-6
    )
    assert record['prediction'] == labels[np.argmax(own)]
    assert record['score'] == pytest.approx(max(own), rel=1e-5)


def test_rows_that_are_ranked_are_classified_once(trained, tmp_path):
  rows = {'test': [(word, 'yes') for word in WORDS[:3]]}
  settings = {'model_dir': trained, 'mode': 'classify', 'split': 'test'}
  ranked, written = (
    run(
      tmp_path / str(rank),
      mixture_or_task_name=files.from_rows(
        rows,
        label_names=['yes', 'no'],
        rank=rank,
        vocabulary=Bytes(),
      ),
      **settings,
    )
    for rank in (True, False)
  )
  assert [r['inputs'] for r in ranked] == WORDS[:3]
  assert [r['targets'] for r in ranked] == ['yes'] * 3
  assert ranked == written


def test_a_prompt_file_on_its_base_is_the_run(trained, tmp_path):
  got = run(
    tmp_path / 'a',
    checkpoint_path=tiny.base(),
    prompt_file=str(trained / 'prompts' / 'best.npy'),
  )
  assert got == run(tmp_path / 'b', model_dir=trained)


@pytest.fixture(scope='module')
def prompts(trained, tmp_path_factory):
  """Returns a directory of prompts of several lengths."""
  path = tmp_path_factory.mktemp('prompts')
  best = np.load(trained / 'prompts' / 'best.npy')
  np.save(path / 'a.npy', best)
  np.save(path / 'b.npy', 3 * best[::-1])
  np.save(path / 'long.npy', np.concatenate([best, -best, best])[:5])
  return path


@pytest.mark.parametrize('mode', ['predict', 'score', 'classify'])
def test_rows_of_several_prompts_are_those_of_single_runs(
  prompts, tmp_path, mode
):
  names = ['a', 'b', 'long', 'b', 'long', 'a', 'a', 'b', 'long', 'long', 'a']
  rows = [
    {'inputs': word, 'targets': label, 'prompt': name}
    for (word, label), name in zip(tiny.rows('test'), names, strict=False)
  ]
  file = write(tmp_path / 'rows.jsonl', *map(json.dumps, rows))
  base = {'model_dir': None, 'checkpoint_path': tiny.base(), 'mode': mode}
  got = run(tmp_path / 'all', prompts=str(prompts), input_file=file, **base)
  assert [r['prompt'] for r in got] == names
  assert [r['inputs'] for r in got] == [row['inputs'] for row in rows]
  for name, length in {'a': 3, 'b': 3, 'long': 5}.items():
    single = run(
      tmp_path / name,
      method=prompt.prompt(length),
      prompt_file=str(prompts / f'{name}.npy'),
      input_file=file,
      **base,
    )
    own = [i for i, n in enumerate(names) if n == name]
    expected = [{**single[i], 'prompt': name} for i in own]
    assert_same([dict(got[i]) for i in own], expected)
  if mode == 'predict':
    assert len({r['score'] for r in got}) == len(got)


def test_rows_that_name_no_prompt_have_the_default(prompts, trained, tmp_path):
  base = {'model_dir': None, 'checkpoint_path': tiny.base()}
  text = write(tmp_path / 'a.txt', *WORDS)
  several = {'prompts': f'x={trained},{prompts}', 'default_prompt': 'x', **base}
  from_text = run(tmp_path / 'text', input_file=text, **several)
  assert [r['prompt'] for r in from_text] == ['x'] * len(WORDS)
  split = run(tmp_path / 'split', **several)
  alone = run(tmp_path / 'one', prompts=f'x={trained}', input_file=text, **base)
  expected = run(tmp_path / 'run', model_dir=trained)
  for got in (from_text, split, alone):
    assert [r['prediction'] for r in got] == [r['prediction'] for r in expected]
    for left, right in zip(got, expected, strict=True):
      assert left['score'] == pytest.approx(right['score'], rel=1e-5)


def test_a_prompt_that_is_not_there_is_named_by_file_and_line(
  prompts, trained, tmp_path
):
  settings = {
    'checkpoint_path': tiny.base(),
    'prompts': str(prompts),
    'input_file': write(
      tmp_path / 'a.jsonl', '{"inputs": "a", "prompt": "lang"}'
    ),
  }
  unnamed = write(tmp_path / 'b.txt', 'ab')
  for changes, message in (
    ({}, r"a.jsonl:1: there is no prompt 'lang'; did you mean long\?"),
    (
      {'input_file': unnamed},
      'b.txt:1: this row names no prompt; set DEFAULT_',
    ),
    ({'input_file': None}, 'tiny-test: this row names no prompt'),
    (
      {'default_prompt': 'c', 'input_file': unnamed},
      "no prompt 'c'; there are",
    ),
    ({'prompts': None, 'default_prompt': 'a'}, 'but PROMPTS is not set'),
    ({'model_dir': trained}, 'set PROMPTS, or MODEL_DIR'),
    ({'method': prompt.prompt(3, causal=True)}, "METHOD is 'prompt/causal'"),
    ({'prompts': ''}, 'it names no prompts'),
    ({'prompts': 'a=nowhere'}, 'nowhere, which does not exist'),
  ):
    with pytest.raises(ValueError, match=message):
      run(**{'output_dir': tmp_path / 'out', **settings, **changes})
    assert not tiny.files(tmp_path / 'out')


def test_lines_end_where_lines_end(trained, tmp_path):
  # A BOM, Windows line ends, and characters at which str.splitlines would
  # split.
  text = tmp_path / 'a.txt'
  text.write_bytes('\ufeffab\r\na\u2028b\x0cb\r\nä'.encode())
  got = run(tmp_path, model_dir=trained, input_file=str(text))
  assert [r['inputs'] for r in got] == ['ab', 'a\u2028b\x0cb', 'ä']
  jsonl = write(tmp_path / 'b.jsonl', '{"inputs": "a\u2028b"}')
  got = run(tmp_path, model_dir=trained, input_file=jsonl)
  assert [r['inputs'] for r in got] == ['a\u2028b']


def test_what_is_wrong_is_named_by_file_and_line(trained, tmp_path):
  good = '{"inputs": "a", "targets": "yes"}'
  latin = tmp_path / 'latin.txt'
  latin.write_bytes(b'ab\n\xe4\n')
  (tmp_path / 'file').write_text('')
  for changes, message in (
    (
      {'input_file': write(tmp_path / 'a.jsonl', good, '{"inp')},
      'a.jsonl:2: is',
    ),
    (
      {'input_file': write(tmp_path / 'b.jsonl', '', '3')},
      'b.jsonl:2: .*expected',
    ),
    (
      {'input_file': write(tmp_path / 'c.jsonl', '{"inputs": 3}')},
      'c.jsonl:1:',
    ),
    (
      {
        'input_file': write(
          tmp_path / 'd.jsonl', '{"inputs": "a", "targets": 1}'
        )
      },
      'd.jsonl:1: targets must be a string',
    ),
    (
      {'input_file': write(tmp_path / 'g.jsonl', r'{"inputs": "\ud800"}')},
      "g.jsonl:1: column 'inputs' is not Unicode",
    ),
    (
      {
        'model_dir': None,
        'checkpoint_path': tiny.base(),
        'prompts': f'p={trained}',
        'input_file': write(
          tmp_path / 'h.jsonl', '{"inputs": "a", "prompt": ["p"]}'
        ),
      },
      'h.jsonl:1: there is no prompt',
    ),
    (
      {
        'mode': 'score',
        'input_file': write(tmp_path / 'e.jsonl', good, '{"inputs": "a"}'),
      },
      'e.jsonl:2: to score, each line must be',
    ),
    ({'mode': 'score', 'input_file': str(latin)}, 'must be a .jsonl file'),
    ({'input_file': str(latin)}, 'latin.txt:2: byte 0xe4.*is not UTF-8'),
    ({'input_file': write(tmp_path / 'f.txt', '', ' ')}, 'has no examples to'),
    ({'mode': 'guess'}, "INFER_MODE is 'guess'; it must be one of"),
    ({'split': 'dev'}, "no split 'dev'"),
    ({'task_feature_lengths': {'inputs': 8}}, "no length for 'targets'"),
    (
      {'output_dir': tmp_path / 'file'},
      'INFER_OUTPUT_DIR .* cannot be written',
    ),
    (
      {
        **{'output_dir': None, 'model_dir': None},
        'prompt_file': str(trained / 'prompts' / 'best'),
        'checkpoint_path': tiny.base(),
      },
      'INFER_OUTPUT_DIR is needed',
    ),
    ({'model_dir': None}, 'set MODEL_DIR'),
  ):
    with pytest.raises(ValueError, match=message):
      run(**{'output_dir': tmp_path / 'out', 'model_dir': trained, **changes})
    assert not tiny.files(tmp_path / 'out')
  with pytest.raises(FileNotFoundError, match='no INFER_FILE'):
    run(tmp_path / 'out', model_dir=trained, input_file=str(tmp_path / 'none'))
