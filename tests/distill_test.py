"""A distilled prompt answers like the model with the long text."""

import json

import pytest

from ptune import cli
from ptune.training import report
from tests import tiny

TEXT = (
  'anna cooked three green noodles at the market in the morning and that was'
  ' not really stale . tom watched a boring film at the cinema in the evening .'
  ' the soup was tasty and the waiter brought two blue plates . zzz'
)

STEPS = {'untrained': 1, 'trained': 150}


def arguments(model_dir, *more, **macros):
  macros = {
    'MIXTURE_OR_TASK_NAME': 'generated_sentiment',
    'MIXTURE_OR_TASK_MODULE': 'ptune.tasks.generated',
    'TASK_FEATURE_LENGTHS': {'inputs': 32, 'targets': 4},
    'INITIAL_CHECKPOINT_PATH': 'ptune://tiny',
    'BATCH_SIZE': 32,
    'PROMPT_LENGTH': 10,
    'EVAL_STEPS': 3,
    'CONTEXT': TEXT,
    'MODEL_DIR': str(model_dir),
    **macros,
  }
  return [
    'distill',
    '--gin_file=models/tiny.gin',
    '--gin_file=runs/distill.gin',
    *more,
    *(f'--gin.{name}={value!r}' for name, value in macros.items()),
  ]


def compared(directory, file, rate):
  """Runs a gin file untrained and trained; returns both distilled.json."""
  found = []
  for name, steps in STEPS.items():
    command = arguments(
      directory / name,
      f'--gin_file={file}.gin',
      TRAIN_STEPS=steps,
      LEARNING_RATE=rate if name == 'trained' else 1e-9,
      EVAL_PERIOD=steps,
    )
    with tiny.one_device():
      assert cli.main(command) == 0
    found.append(json.loads((directory / name / 'distilled.json').read_text()))
  return found


@pytest.mark.slow
def test_a_distilled_prompt_answers_as_the_model_with_the_text(
  tmp_path, capsys
):
  untrained, trained = compared(tmp_path, 'prompts/from_context', 0.3)
  scores = [
    report.scores_at(report.read_records(tmp_path / name), steps)[
      'generated_sentiment'
    ]
    for name, steps in STEPS.items()
  ]
  # `loss` is the divergence per token; `token_accuracy` the share of equal
  # tokens.
  assert scores[1]['loss'] < 0.25 < 0.6 < scores[0]['loss']
  assert scores[1]['token_accuracy'] > 0.8 > 0.6 > scores[0]['token_accuracy']
  assert trained['inputs'] == 96
  assert trained['tokens'] == {'text': 53 + 32, 'trained': 10 + 32}
  assert trained['same_answer']['trained'] > 0.8
  assert untrained['same_answer']['trained'] < 0.3
  assert trained['same_answer']['base'] < 0.3
  assert trained['answers'] > 1
  assert all(x > 0 for x in trained['milliseconds'].values())
  said = capsys.readouterr().out
  assert 'the encoder reads 85 -> 42 tokens' in said


@pytest.mark.slow
def test_a_prefix_replaces_the_text_whose_keys_and_values_it_started_as(
  tmp_path, capsys
):
  found = compared(tmp_path, 'methods/prefix_from_context', 0.03)
  untrained, trained = (x['same_answer']['trained'] for x in found)
  assert trained > 0.8 > untrained
  assert (tmp_path / 'trained' / 'prompts' / 'best.safetensors').exists()
  # The output reports a prefix separately, because it is no part of the input.
  assert found[1]['tokens'] == {'text': 53 + 32, 'trained': 32}
  assert found[1]['prefix'] == 10
  said = capsys.readouterr().out
  assert '85 -> 32 tokens of an input, and each attention 10 keys' in said


@pytest.mark.slow
def test_a_prompt_is_distilled_on_inputs_that_the_model_made_up(tmp_path):
  command = arguments(
    tmp_path / 'run',
    '--gin_file=tasks/made_up.gin',
    '--gin_file=prompts/from_context.gin',
    VOCABULARY='ptune://tiny',
    TRAIN_STEPS=60,
    EVAL_PERIOD=60,
    MADE_UP_INPUTS=200,
    BATCH_SIZE=16,
  )
  own = [x for x in command if 'MIXTURE_OR_TASK' not in x]
  with tiny.one_device():
    assert cli.main(own) == 0
  found = json.loads((tmp_path / 'run' / 'distilled.json').read_text())
  assert found['inputs'] == 16
  assert found['same_answer']['trained'] > 0.8 > found['same_answer']['base']
  made = (tmp_path / 'run' / 'made_up' / 'train.jsonl').read_text()
  # A restarted run uses the same inputs and gives the same answers.
  with tiny.one_device():
    assert cli.main(own) == 0
  again = json.loads((tmp_path / 'run' / 'distilled.json').read_text())
  assert again['same_answer'] == found['same_answer']
  assert (tmp_path / 'run' / 'made_up' / 'train.jsonl').read_text() == made
