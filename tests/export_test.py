"""Importing and exporting prompts, and refusing hostile files."""

import json
import pathlib
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from ptune.convert import (
  identity,
  open_checkpoint,
  output,
  safetensors_files,
)
from ptune.convert.export import export
from ptune.convert.prompts import PATH, read_prompt
from tests import layouts

BASE = 'hf/t5_1_1'
ROWS = 'prompt_embeddings'


@pytest.fixture
def run(numerics, tmp_path):
  """Returns a MODEL_DIR of `ptune train`; the prompt of step n is all n."""
  directory = tmp_path / 'run'
  (directory / 'prompts').mkdir(parents=True)
  base = numerics / BASE
  fingerprint = identity.fingerprint(open_checkpoint(base))
  for name, step in (('step_9', 9), ('step_10', 10), ('best', 9)):
    rows = np.full((3, 32), step, np.float32)
    np.save(directory / 'prompts' / f'{name}.npy', rows)
    facts = {
      'step': step,
      'prompt_length': 3,
      'scores': {'task': {'accuracy': 0.5}},
      'task': 'task',
      'base': fingerprint,
      'method': 'prompt',
    }
    (directory / 'prompts' / f'{name}.json').write_text(json.dumps(facts))
  run = {'task': 'task', 'method': 'prompt', 'base': fingerprint}
  run['initial_checkpoint_path'] = str(base)
  (directory / 'run.json').write_text(json.dumps(run))
  return directory


def _edit(file, **changes):
  facts = json.loads(file.read_text()) | changes
  file.write_text(json.dumps(facts))


# ---- Where a prompt is found ------------------------------------------------


@pytest.mark.parametrize(
  'below, step',
  [
    ('', 9),
    ('prompts', 9),
    ('prompts/best.npy', 9),
    ('prompts/step_10.npy', 10),
    ('prompts/step_10', 10),
  ],
)
def test_a_run_gives_its_best_prompt(run, below, step):
  prompt = read_prompt(run / below)
  np.testing.assert_array_equal(prompt.array, np.full((3, 32), step, 'f4'))
  assert (prompt.kind, prompt.facts['step']) == ('npy', step)


def test_a_run_that_was_not_evaluated_gives_its_newest_prompt(run):
  (run / 'prompts' / 'best.npy').unlink()
  assert read_prompt(run).facts['step'] == 10


@pytest.mark.parametrize(
  'below',
  [
    'checkpoints/legacy_prompt',
    'checkpoints/legacy_prompt/numpy_checkpoints',
    'checkpoints/legacy_prompt/numpy_checkpoints/checkpoint_1100010',
    'checkpoints/legacy_prompt/numpy_checkpoints/checkpoint_1100010/'
    'encoder.prompt.prompt.prompt',
    'checkpoints/legacy_prompt/checkpoint_1100010',
    'checkpoints/orbax_prompt/checkpoint_1100010',
  ],
)
def test_the_reference_implementations_prompt_is_exact(
  numerics, tmp_path, below
):
  trajectory = layouts.load(numerics / 'trajectory' / 'trajectory.npz')
  expected = trajectory['start1100000_prompt_each'][-1]
  layouts.run('import', numerics / below, '--output', tmp_path / 'p')
  np.testing.assert_array_equal(np.load(tmp_path / 'p.npy'), expected)
  facts = json.loads((tmp_path / 'p.json').read_text())
  assert facts['t5x_step'] == 1100010
  assert facts['prompt_length'] == 5
  # Unknown facts are left out, because ptune compares the facts that it finds.
  assert not {'base', 'step', 'scores'} & set(facts)


@pytest.mark.parametrize('length', [5, 100])
def test_peft_prompts_are_exact(numerics, tmp_path, length):
  path = numerics / 'hf' / f'peft_p{length}'
  layouts.run('import', path, '--output', tmp_path / 'p.npy')
  expected = layouts.load(numerics / 'prompt_encoder' / 'prompts.npz')
  got = np.load(tmp_path / 'p.npy')
  np.testing.assert_array_equal(got, expected[f'prompt_p{length}'])
  assert json.loads((tmp_path / 'p.json').read_text())['base_model'] == 't5_1_1'


# ---- PEFT's other forms -----------------------------------------------------


def _adapter(path, tensors, **config):
  path.mkdir()
  (path / 'adapter_config.json').write_text(
    json.dumps(
      {
        'peft_type': 'PROMPT_TUNING',
        'task_type': 'SEQ_2_SEQ_LM',
        'num_virtual_tokens': 2,
        'token_dim': 4,
      }
      | config
    )
  )
  safetensors.numpy.save_file(tensors, path / 'adapter_model.safetensors')
  return path


def _rows(n, seed=0):
  return np.random.default_rng(seed).standard_normal((n, 4)).astype('f4')


def test_rows_that_peft_never_reads_are_left_out(tmp_path, capsys):
  path = _adapter(tmp_path / 'a', {ROWS: _rows(4)})
  layouts.run('import', path, '--output', tmp_path / 'p')
  np.testing.assert_array_equal(np.load(tmp_path / 'p.npy'), _rows(4)[:2])
  assert '4 rows for 2 virtual tokens' in capsys.readouterr().out


def test_p_tuning_rows_are_a_prompt(tmp_path):
  path = _adapter(tmp_path / 'a', {ROWS: _rows(2)}, peft_type='P_TUNING')
  prompt = read_prompt(path)
  np.testing.assert_array_equal(prompt.array, _rows(2))
  assert prompt.facts['peft_type'] == 'P_TUNING'


def test_each_task_of_a_multitask_adapter_has_its_prompt(tmp_path):
  rng = np.random.default_rng(1)
  tensors = {
    ROWS: _rows(4),
    'prefix_task_cols': rng.standard_normal((3, 4, 1)).astype('f4'),
    'prefix_task_rows': rng.standard_normal((3, 1, 4)).astype('f4'),
  }
  kind = 'MULTITASK_PROMPT_TUNING'
  path = _adapter(tmp_path / 'a', tensors, peft_type=kind)
  for task in range(3):
    argv = ('--task', task, '--output', tmp_path / f'p{task}')
    layouts.run('import', path, *argv)
    factor = (
      tensors['prefix_task_cols'][task] @ tensors['prefix_task_rows'][task]
    )
    np.testing.assert_allclose(
      np.load(tmp_path / f'p{task}.npy'), (_rows(4) * factor)[:2], rtol=1e-6
    )
  for task in (None, 3, -1):
    with pytest.raises(ValueError, match=r'prompts of 3 tasks.*one of 0 ... 2'):
      read_prompt(path, task)
  tensors['prefix_task_rows'] = tensors['prefix_task_rows'][:2]
  path = _adapter(tmp_path / 'b', tensors, peft_type=kind)
  with pytest.raises(ValueError, match='do not fit a prompt'):
    read_prompt(path, 0)


@pytest.mark.parametrize(
  'tensors, config, message',
  [
    ({ROWS: _rows(2)}, {'peft_type': 'LORA'}, 'of type LORA, not a prompt'),
    ({ROWS: _rows(2)}, {'peft_type': ['LORA']}, 'not a prompt'),
    ({ROWS: _rows(2)}, {'task_type': 'CAUSAL_LM'}, "task_type 'CAUSAL_LM'"),
    ({ROWS: _rows(3)}, {}, 'has 3 rows, but.*num_virtual_tokens 2'),
    ({ROWS: _rows(2)}, {'num_virtual_tokens': '2'}, 'num_virtual_tokens 2'),
    ({ROWS: _rows(2)}, {'token_dim': 5}, r'\[2, 4\]; expected \[prompt, 5\]'),
    ({ROWS: _rows(2)[0]}, {}, r'is \[4\]; expected'),
    ({'x': _rows(2)}, {}, r"holds \['x'\]; expected"),
    ({ROWS: _rows(2), 'lm_head': _rows(2)}, {}, "holds .*'lm_head'"),
    ({ROWS: _rows(2) * np.nan}, {}, 'NaN or infinity'),
    ({ROWS: _rows(2).astype('i4')}, {}, 'unsupported dtype'),
  ],
)
def test_adapters_that_are_no_prompt_are_refused(
  tmp_path, tensors, config, message
):
  path = _adapter(tmp_path / 'a', tensors, **config)
  with pytest.raises(ValueError, match=message):
    layouts.run('import', path, '--output', tmp_path / 'p')
  assert [child.name for child in tmp_path.iterdir()] == ['a']


def test_pickled_and_damaged_adapters_are_refused(tmp_path):
  path = _adapter(tmp_path / 'a', {ROWS: _rows(2)})
  file = path / 'adapter_model.safetensors'
  whole = file.read_bytes()
  for cut in (0, 5, len(whole) - 1):
    file.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match='damaged or cut short'):
      read_prompt(path)
  file.rename(path / 'adapter_model.bin')
  with pytest.raises(ValueError, match='never loads a pickle'):
    read_prompt(path)
  (path / 'adapter_config.json').write_text('[' * 100_000)
  with pytest.raises(ValueError, match=r'adapter_config.json is not JSON'):
    read_prompt(path)


def test_one_prompt_has_no_tasks(numerics, run):
  for path in (run, numerics / 'hf' / 'peft_p5'):
    with pytest.raises(ValueError, match=r'not one for each task|no tasks'):
      read_prompt(path, 0)


# ---- Hostile files of NumPy's -----------------------------------------------


class _Bomb:
  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path('/tmp/ptune-was-here'),)


def _npy(path, data):
  path.write_bytes(data)
  return path


def _header(text):
  text = text.encode() + b' ' * 20 + b'\n'
  return b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text


@pytest.mark.parametrize(
  'data, message',
  [
    (b'', 'not a NumPy array file, or is damaged'),
    (b'\x93NUMPY', 'not a NumPy array file, or is damaged'),
    (b'\x93NUMPY\x09\x00abc', 'not a NumPy array file, or is damaged'),
    (pickle.dumps(_Bomb()), 'not a NumPy array file'),
    (
      _header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}"),
      'pic',
    ),
    (
      # No machine has this much memory, so ptune must not allocate it.
      _header(
        "{'descr': '<f4', 'fortran_order': False, "
        "'shape': (1000000000, 1000000000)}"
      ),
      '0 bytes follow a header that says',
    ),
    (
      _header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 0)}"),
      'prompt is|damaged',
    ),
    (_header("{'descr': '<f4', 'fortran_order': False}"), 'damaged'),
    (_header("{'descr': '<f4', 'shape': (2, 2)"), 'damaged'),
    (_header("__import__('os').system('true')"), 'damaged'),
  ],
)
def test_hostile_arrays_are_refused(tmp_path, data, message):
  path = _npy(tmp_path / 'p.npy', data)
  with pytest.raises(ValueError, match=message) as error:
    layouts.run('export', '--prompt', path, '--format=npy', '--output', 'q')
  assert str(path) in str(error.value)
  assert not pathlib.Path('/tmp/ptune-was-here').exists()


def test_a_bfloat16_array_is_read(tmp_path):
  array = np.arange(8).reshape(2, 4).astype(jnp.bfloat16)
  np.save(tmp_path / 'p.npy', array)
  read = read_prompt(tmp_path / 'p.npy').array
  assert read.dtype == np.float32 and (read == array.astype(np.float32)).all()


@pytest.mark.parametrize(
  'array',
  [
    np.ones((2, 4), object),
    np.ones(4),
    np.ones((2, 2, 2)),
    np.ones((0, 4)),
    np.ones((2, 4), 'i4'),
    np.ones((2, 4), complex),
    np.array([['a', 'b']]),
    np.array([[1.0, np.inf]]),
    np.array([[1e300, 0.0]]),
  ],
  ids=str,
)
def test_arrays_that_are_no_prompt_are_refused(tmp_path, array):
  np.save(tmp_path / 'p.npy', array, allow_pickle=True)
  with pytest.raises(ValueError, match=r'p\.npy'):
    read_prompt(tmp_path / 'p.npy')


def test_cut_arrays_are_refused(tmp_path):
  np.save(tmp_path / 'p.npy', _rows(3))
  whole = (tmp_path / 'p.npy').read_bytes()
  for cut in (7, 60, len(whole) - 1):
    (tmp_path / 'p.npy').write_bytes(whole[:cut])
    with pytest.raises(ValueError, match='damaged'):
      read_prompt(tmp_path / 'p.npy')


def test_any_float_and_any_order_is_a_prompt(tmp_path):
  for i, rows in enumerate(
    [
      _rows(3),
      _rows(3).astype('f2'),
      _rows(3).astype('>f8'),
      _rows(3).T.copy().T,
    ]
  ):
    np.save(tmp_path / f'{i}.npy', rows)
    got = read_prompt(tmp_path / f'{i}.npy').array
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, rows.astype(np.float32))


def test_what_is_missing_names_its_neighbours(numerics, tmp_path):
  (tmp_path / 'best.npz').write_text('')
  with pytest.raises(FileNotFoundError, match=r'In .*: best.npz'):
    read_prompt(tmp_path / 'best.npy')
  with pytest.raises(ValueError, match=f'holds no {PATH}'):
    read_prompt(numerics / BASE)


# ---- Formats ----------------------------------------------------------------


def test_npy_is_as_a_run_writes_it(run, tmp_path):
  layouts.run(
    'export', '--prompt', run, '--format=npy', '--output', tmp_path / 'p'
  )
  again = read_prompt(tmp_path / 'p.npy')
  np.testing.assert_array_equal(again.array, read_prompt(run).array)
  assert read_prompt(run).facts.items() <= again.facts.items()
  assert again.facts['read_from'] == str(run / 'prompts' / 'best.npy')


def test_safetensors_keep_what_is_known(run, tmp_path):
  file = tmp_path / 'p.safetensors'
  layouts.run(
    'export', '--prompt', run, '--format=safetensors', '--output', file
  )
  assert list(safetensors.numpy.load_file(file)) == [ROWS]
  again = read_prompt(file)
  np.testing.assert_array_equal(again.array, read_prompt(run).array)
  assert read_prompt(run).facts.items() <= again.facts.items()
  # A whole model is not a prompt.
  with pytest.raises(ValueError, match=r'holds .*decoder'):
    read_prompt(_model_file(tmp_path))


def _model_file(tmp_path):
  file = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file({'decoder.x': _rows(2), ROWS: _rows(2)}, file)
  return file


def test_files_that_are_not_local_say_so(tmp_path):
  # The name is enough for the error; nothing is read.
  with pytest.raises(ValueError, match=r'gcloud storage cp -r gs://bucket/a .'):
    safetensors_files.open_file(epath.Path('gs://bucket/a/p.safetensors'))


@pytest.mark.parametrize('length', [5, 100])
def test_peft_directory_is_as_peft_writes_it(numerics, tmp_path, length):
  prompts = layouts.load(numerics / 'prompt_encoder' / 'prompts.npz')
  np.save(tmp_path / 'p.npy', prompts[f'prompt_p{length}'])
  layouts.run(
    *('export', '--prompt', tmp_path / 'p.npy', '--format=peft'),
    *('--base', numerics / BASE, '--base_name=t5_1_1'),
    *('--output', tmp_path / 'peft'),
  )
  theirs = numerics / 'hf' / f'peft_p{length}'
  config, expected = (
    json.loads((path / 'adapter_config.json').read_text())
    for path in (tmp_path / 'peft', theirs)
  )
  del expected['peft_version']
  assert config == expected
  got, expected = (
    safetensors.numpy.load_file(path / 'adapter_model.safetensors')
    for path in (tmp_path / 'peft', theirs)
  )
  layouts.assert_same(got, expected)


def test_peft_export_of_a_run_finds_and_checks_its_base(
  numerics, run, tmp_path
):
  lines = export(read_prompt(run), 'peft', tmp_path / 'a')
  assert 'the model that it was trained on' in '\n'.join(lines)
  config = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
  assert config['base_model_name_or_path'] == str(numerics / BASE)
  assert (config['num_layers'], config['num_attention_heads']) == (2, 4)
  again = read_prompt(tmp_path / 'a')
  assert read_prompt(run).facts.items() <= again.facts.items()
  # A prompt remains usable without its base.
  _edit(run / 'run.json', initial_checkpoint_path='/gone')
  lines = export(read_prompt(run), 'peft', tmp_path / 'b')
  assert 'cannot be opened: Nothing is at /gone' in '\n'.join(lines)
  with pytest.raises(FileNotFoundError, match='/gone'):
    export(read_prompt(run), 't5x', tmp_path / 'c')
  # PEFT cannot load T5X's base by a name.
  base = numerics / layouts.T5_1_1['t5x']
  lines = export(read_prompt(run), 'peft', tmp_path / 'd', base=str(base))
  assert 'name one with --base_name=org/name' in '\n'.join(lines)


@pytest.mark.parametrize('layout', ['peft', 't5x'])
def test_another_base_is_refused(numerics, run, tmp_path, layout):
  prompt = read_prompt(run)
  base = str(numerics / 'hf' / 'mt5')
  with pytest.raises(ValueError, match=r'\[3, 32\].*but embed is 24'):
    export(prompt, layout, tmp_path / 'a', base=base)
  _edit(run / 'prompts' / 'best.json', base='0123456789abcdef')
  with pytest.raises(
    ValueError, match=r'0123456789abcdef.*Nothing was written'
  ):
    export(read_prompt(run), layout, tmp_path / 'a')
  assert [child.name for child in tmp_path.iterdir()] == ['run']


@pytest.mark.parametrize('layout', ['peft', 't5x'])
def test_prompts_that_stand_elsewhere_are_refused(run, tmp_path, layout):
  _edit(run / 'prompts' / 'best.json', method='prompt/before_eos')
  with pytest.raises(ValueError, match="method 'prompt/before_eos'"):
    export(read_prompt(run), layout, tmp_path / 'a')
  export(read_prompt(run), 'npy', tmp_path / 'a')


@pytest.mark.parametrize('kind', layouts.T5_1_1)
def test_t5x_export_is_the_base_and_the_prompt(numerics, run, tmp_path, kind):
  base = numerics / layouts.T5_1_1[kind]
  layouts.run(
    *('export', '--prompt', run, '--format=t5x', '--base', base),
    *('--output', tmp_path / 'checkpoint_1'),
  )
  expected = layouts.load(numerics / 'prompt_encoder' / 'params.npz')
  expected[PATH] = read_prompt(run).array
  layouts.assert_same(layouts.read(tmp_path / 'checkpoint_1'), expected)
  source = open_checkpoint(tmp_path / 'checkpoint_1')
  before = open_checkpoint(base).step or 0
  assert (source.kind, source.step) == ('t5x', before + 9)
  # The golden checkpoint, written by T5X, has the same tree.
  assert set(source.ignored) == {
    f'state/param_states/{PATH}/{name}' for name in ('m', 'v', 'v_row', 'v_col')
  }
  theirs = open_checkpoint(numerics / layouts.T5_1_1['t5x, holds a prompt'])
  assert set(source.ignored) == set(theirs.ignored)
  assert set(source.leaves) == set(theirs.leaves)


def test_t5x_export_needs_a_base(numerics, tmp_path):
  prompt = read_prompt(numerics / 'hf' / 'peft_p5')
  with pytest.raises(ValueError, match='name it with --base'):
    export(prompt, 't5x', tmp_path / 'a')


def test_t5x_counts_the_steps_of_the_base(numerics, tmp_path):
  prompt = read_prompt(numerics / 'checkpoints' / 'legacy_prompt')
  base = str(numerics / layouts.T5_1_1['t5x'])
  export(prompt, 't5x', tmp_path / 'a', base=base)
  assert open_checkpoint(tmp_path / 'a').step == 1100010
  export(prompt, 't5x', tmp_path / 'b', base=base, step=4)
  assert open_checkpoint(tmp_path / 'b').step == 4


@pytest.mark.parametrize('layout', ['npy', 'safetensors', 'peft', 't5x'])
def test_every_export_comes_back_bit_equal(numerics, run, tmp_path, layout):
  rows = np.random.default_rng(5).standard_normal((3, 32)).astype('f4')
  rows[0, :3] = [-0.0, 1e-42, 3e38]
  np.save(run / 'prompts' / 'best.npy', rows)
  layouts.run(
    *('export', '--prompt', run, '--format', layout),
    *('--output', tmp_path / 'p'),
  )
  suffix = f'.{layout}' if layout in ('npy', 'safetensors') else ''
  path = tmp_path / f'p{suffix}'
  layouts.run('import', path, '--output', tmp_path / 'q')
  got = np.load(tmp_path / 'q.npy')
  np.testing.assert_array_equal(got.view('u4'), rows.view('u4'))


# ---- Outputs ----------------------------------------------------------------


@pytest.mark.parametrize('layout', ['npy', 'safetensors', 'peft', 't5x'])
def test_an_output_is_replaced_only_when_asked(run, tmp_path, layout):
  out = tmp_path / 'out' / 'p'
  argv = ('export', '--prompt', run, '--format', layout, '--output', out)
  layouts.run(*argv)
  before = sorted(child.name for child in out.parent.iterdir())
  with pytest.raises(ValueError, match='exists already'):
    layouts.run(*argv)
  layouts.run(*argv, '--overwrite')
  assert sorted(child.name for child in out.parent.iterdir()) == before


def test_a_directory_that_is_no_output_is_never_replaced(run, tmp_path):
  home = tmp_path / 'home'
  home.mkdir()
  (home / 'letter.txt').write_text('dear')
  for layout in ('peft', 't5x'):
    with pytest.raises(ValueError, match=r'letter.txt'):
      export(read_prompt(run), layout, home, overwrite=True)
  (tmp_path / 'p.npy').mkdir()
  (tmp_path / 'p.npy' / 'x').mkdir()
  with pytest.raises(ValueError, match='x, not a file'):
    export(read_prompt(run), 'npy', tmp_path / 'p', overwrite=True)
  # Overwriting does not extend to a directory that contains an input.
  (tmp_path / 'adapter_config.json').write_text('')
  with pytest.raises(ValueError, match='an input'):
    export(read_prompt(run), 'peft', tmp_path, overwrite=True)
  assert (home / 'letter.txt').read_text() == 'dear'
  with pytest.raises(ValueError, match='is not local'):
    export(read_prompt(run), 'peft', 'gs://bucket/a')


def test_an_interrupted_output_is_not_there(tmp_path):
  path = epath.Path(tmp_path / 'a' / 'b')
  with (
    pytest.raises(KeyboardInterrupt),
    output.new_directory(path) as temporary,
  ):
    (temporary / 'half').write_text('')
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt), output.new_file(path) as temporary:
    temporary.write_text('half')
    raise KeyboardInterrupt
  assert not list((tmp_path / 'a').iterdir())


def test_bfloat16_adapters_are_widened(tmp_path):
  rows = _rows(2).astype(jnp.bfloat16)
  path = _adapter(tmp_path / 'a', {ROWS: rows})
  np.testing.assert_array_equal(read_prompt(path).array, rows.astype('f4'))
