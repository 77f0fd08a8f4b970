"""Exports load in torch, transformers and PEFT, with the same answers.

They need `pip install -e '.[test,interop]'`.
"""

import json
import warnings

import numpy as np
import pytest

from ptune.convert import open_checkpoint
from ptune.convert.conversion import convert
from ptune.convert.export import export
from ptune.convert.prompts import read_prompt
from ptune.methods import superpos, ulpt
from ptune.model.models import EncoderDecoderModel
from ptune.model.network import Transformer
from tests import layouts, tiny
from tests.interop import peft, torch, transformers

# These libraries warn about each other's deprecations.
pytestmark = pytest.mark.filterwarnings('ignore')

PEFT_KINDS = ('PROMPT_TUNING', 'P_TUNING', 'MULTITASK_PROMPT_TUNING')
DECODED = 10


@pytest.fixture(autouse=True, scope='module')
def _one_thread():
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


def _load(path):
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path)
  return model.eval()


def _inputs(case):
  tokens = torch.tensor(case['encoder_input_tokens'], dtype=torch.long)
  return {'input_ids': tokens, 'attention_mask': (tokens > 0).long()}


def _logits(model, case, **extra):
  shifted = torch.tensor(case['decoder_input_tokens'], dtype=torch.long)
  with torch.no_grad():
    out = model(**_inputs(case), decoder_input_ids=shifted, **extra)
  return out.logits.numpy()


def _greedy(model, case, **extra):
  """Returns greedy tokens [batch, length] without the start token."""
  with torch.no_grad():
    tokens = model.generate(
      **_inputs(case),
      max_new_tokens=DECODED,
      do_sample=False,
      num_beams=1,
      # Its cache assumes that the decoder is as deep as the encoder.
      use_cache=False,
      **extra,
    )
  tokens = tokens[:, 1:].numpy()
  return np.pad(tokens, ((0, 0), (0, DECODED - tokens.shape[1])))


# ---- Whole models -----------------------------------------------------------


def test_a_converted_t5x_checkpoint_answers_the_same(numerics, tmp_path):
  path = numerics / layouts.T5_1_1['t5x']
  convert(path, 'huggingface', tmp_path / 'hf')
  model = _load(tmp_path / 'hf')
  case = layouts.load(numerics / 'prompt_encoder' / 'case_noprompt.npz')
  layouts.assert_logits(_logits(model, case), case['logits'], case, atol=1e-4)
  np.testing.assert_array_equal(
    _greedy(model, case), layouts.greedy(path, case, DECODED)
  )


@pytest.mark.parametrize('family', layouts.FAMILIES)
def test_every_family_answers_the_same_after_a_round_trip(
  numerics, tmp_path, family
):
  path = numerics / 'hf' / family
  convert(path, 't5x', tmp_path / 't5x')
  convert(tmp_path / 't5x', 'huggingface', tmp_path / 'hf')
  case = layouts.load(path / 'case.npz')
  model = _load(tmp_path / 'hf')
  layouts.assert_logits(_logits(model, case), case['logits'], case, atol=1e-4)


# ---- The tied/untied trap ---------------------------------------------------
#
# transformers 5 ties the output layer of every fresh T5, whatever the
# configuration says, and writes tie_word_embeddings true in any case.


def _fresh(kind, **changes):
  config = dict(
    vocab_size=96,
    d_model=16,
    d_kv=6,
    num_heads=3,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=1,
    feed_forward_proj='gated-gelu',
    decoder_start_token_id=0,
  )
  torch.manual_seed(0)
  config = getattr(transformers, f'{kind}Config')(**config | changes)
  return getattr(transformers, f'{kind}ForConditionalGeneration')(config).eval()


def _untie(model):
  head = torch.nn.Linear(model.config.d_model, model.config.vocab_size, False)
  model.lm_head = head
  model.config.scale_decoder_outputs = False
  return model


def _case():
  rng = np.random.default_rng(0)
  inputs, targets = (rng.integers(2, 96, (2, n)) for n in (9, 7))
  shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': shifted,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones_like(targets),
  }


def _save(model, path):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    model.save_pretrained(path)
  return json.loads((path / 'config.json').read_text())


@pytest.mark.parametrize('kind', ['T5', 'MT5'])
def test_untied_by_hand_is_read_as_untied(tmp_path, kind):
  model = _untie(_fresh(kind))
  config = _save(model, tmp_path / 'hf')
  assert config['tie_word_embeddings']  # This is wrong.
  source = open_checkpoint(tmp_path / 'hf')
  assert not source.tied
  case = _case()
  expected = _logits(model, case)
  layouts.assert_logits(layouts.logits(tmp_path / 'hf', case), expected, case)
  # transformers reads the written checkpoint with the same result.
  convert(tmp_path / 'hf', 'huggingface', tmp_path / 'again')
  again = _load(tmp_path / 'again')
  layouts.assert_logits(_logits(again, case), expected, case)


@pytest.mark.parametrize('projection', ['relu', 'gated-gelu'])
def test_tied_and_scaled_is_read_as_that(tmp_path, projection):
  model = _fresh('T5', feed_forward_proj=projection, tie_word_embeddings=True)
  _save(model, tmp_path / 'hf')
  assert open_checkpoint(tmp_path / 'hf').tied
  case = _case()
  expected = _logits(model, case)
  layouts.assert_logits(layouts.logits(tmp_path / 'hf', case), expected, case)
  convert(tmp_path / 'hf', 'huggingface', tmp_path / 'again')
  again = _load(tmp_path / 'again')
  layouts.assert_logits(_logits(again, case), expected, case)


@pytest.mark.parametrize(
  'kind, tie', [('T5', False), ('MT5', False), ('MT5', True)]
)
def test_tied_but_not_scaled_is_read_as_that(tmp_path, kind, tie):
  """transformers 5 makes such models of "T5 1.1"."""
  model = _fresh(kind, tie_word_embeddings=tie)
  assert model.lm_head.weight is model.shared.weight
  config = _save(model, tmp_path / 'hf')
  assert config['tie_word_embeddings']
  source = open_checkpoint(tmp_path / 'hf')
  assert (source.tied, source.scaled) == (True, False)
  case = _case()
  expected = _logits(model, case)
  layouts.assert_logits(layouts.logits(tmp_path / 'hf', case), expected, case)


# ---- Prompts, out -----------------------------------------------------------


@pytest.mark.parametrize('length', [5, 100])
def test_exported_prompts_answer_the_same_in_peft(numerics, tmp_path, length):
  prompts = layouts.load(numerics / 'prompt_encoder' / 'prompts.npz')
  rows = prompts[f'prompt_p{length}']
  np.save(tmp_path / 'p.npy', rows)
  base = numerics / 'hf' / 't5_1_1'
  prompt = read_prompt(tmp_path / 'p.npy')
  export(prompt, 'peft', tmp_path / 'peft', base=str(base))
  model = peft.PeftModel.from_pretrained(_load(base), tmp_path / 'peft').eval()
  case = layouts.load(numerics / 'prompt_encoder' / f'case_p{length}.npz')
  layouts.assert_logits(_logits(model, case), case['logits'], case, atol=1e-4)
  np.testing.assert_array_equal(
    _greedy(model, case), layouts.greedy(base, case, DECODED, rows)
  )
  # The configuration names the base, so PEFT finds it.
  config = peft.PeftConfig.from_pretrained(tmp_path / 'peft')
  assert config.base_model_name_or_path == str(base)
  assert config.num_transformer_submodules == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  'method',
  [superpos.superpos(5, tokens=8, population=200), ulpt.ulpt(5, rank=4)],
  ids=lambda method: method.name,
)
def test_a_run_of_a_folded_method_answers_the_same_in_peft(
  numerics, tmp_path, method
):
  convert(tiny.base(), 'huggingface', tmp_path / 'hf')
  run = tmp_path / 'run'
  state = tiny.run(run, method=method, train_steps=3, eval_split=None)
  export(read_prompt(run), 'peft', tmp_path / 'peft', base=str(tmp_path / 'hf'))
  model = peft.PeftModel.from_pretrained(
    _load(tmp_path / 'hf'), tmp_path / 'peft'
  ).eval()
  case = layouts.load(numerics / 'prompt_encoder' / 'case_p5.npz')
  # In ptune, the unfolded method with the trained parameters.
  _, arrays = layouts.restored(tmp_path / 'hf')
  params = layouts.nested(arrays)
  params['encoder'] |= state.trainable['encoder']
  ours = EncoderDecoderModel(Transformer(tiny.CONFIG, method.placements))
  layouts.assert_logits(
    _logits(model, case), np.asarray(ours.logits(params, case)), case, atol=1e-4
  )
  np.testing.assert_array_equal(
    _greedy(model, case),
    ours.predict(params, case['encoder_input_tokens'], DECODED)[0],
  )


def test_a_prompt_without_a_known_base_loads_in_peft(numerics, tmp_path):
  prompt = read_prompt(numerics / 'checkpoints' / 'legacy_prompt')
  export(prompt, 'peft', tmp_path / 'peft')
  base = numerics / 'hf' / 't5_1_1'
  model = peft.PeftModel.from_pretrained(_load(base), tmp_path / 'peft').eval()
  case = layouts.load(numerics / 'prompt_encoder' / 'case_p5.npz')
  expected = layouts.logits(base, case, prompt.array)
  layouts.assert_logits(_logits(model, case), expected, case, atol=1e-4)


# ---- Prompts, in ------------------------------------------------------------


@pytest.mark.parametrize('kind', PEFT_KINDS)
def test_prompts_that_peft_saved_answer_the_same(numerics, tmp_path, kind):
  base = numerics / 'hf' / 't5_1_1'
  options = {
    'PROMPT_TUNING': (peft.PromptTuningConfig, {}),
    'P_TUNING': (peft.PromptEncoderConfig, {'encoder_hidden_size': 8}),
    'MULTITASK_PROMPT_TUNING': (
      peft.MultitaskPromptTuningConfig,
      {'num_tasks': 3, 'num_ranks': 2},
    ),
  }
  make, extra = options[kind]
  torch.manual_seed(1)
  config = make(task_type='SEQ_2_SEQ_LM', num_virtual_tokens=4, **extra)
  model = peft.get_peft_model(_load(base), config).eval()
  model.save_pretrained(tmp_path / 'peft')
  case = layouts.load(numerics / 'prompt_encoder' / 'case_noprompt.npz')
  batch = len(case['encoder_input_tokens'])
  if kind != 'MULTITASK_PROMPT_TUNING':
    prompt = read_prompt(tmp_path / 'peft')
    got = layouts.logits(base, case, prompt.array)
    layouts.assert_logits(got, _logits(model, case), case, atol=1e-4)
    prompts = [(prompt, {})]
  else:
    prompts = [
      (read_prompt(tmp_path / 'peft', t), {'task_ids': torch.full((batch,), t)})
      for t in range(3)
    ]
  for prompt, task in prompts:
    assert prompt.array.shape == (4, 32)
    # By default, PEFT makes twice as many rows.
    assert 'has 8 rows for 4 virtual tokens' in ' '.join(prompt.notes)
    theirs = model.get_prompt(batch, **task)[0, :4].detach().numpy()
    np.testing.assert_allclose(prompt.array, theirs, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(
      _greedy(model, case, **task),
      layouts.greedy(base, case, DECODED, prompt.array),
    )


def test_other_adapters_that_peft_saved_are_refused(numerics, tmp_path):
  base = numerics / 'hf' / 't5_1_1'
  config = peft.LoraConfig(task_type='SEQ_2_SEQ_LM', r=2)
  peft.get_peft_model(_load(base), config).save_pretrained(tmp_path / 'peft')
  with pytest.raises(ValueError, match='of type LORA, not a prompt'):
    read_prompt(tmp_path / 'peft')


def test_a_model_saved_by_transformers_in_shards_is_exact(numerics, tmp_path):
  base = numerics / 'hf' / 't5_1_1'
  model = _load(base)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    model.save_pretrained(tmp_path / 'hf', max_shard_size='60KB')
  assert len(list((tmp_path / 'hf').glob('model-*.safetensors'))) > 2
  layouts.assert_same(layouts.read(tmp_path / 'hf'), layouts.read(base))
