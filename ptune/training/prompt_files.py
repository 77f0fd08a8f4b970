"""The files in MODEL_DIR/prompts, which other programs read.

step_N.npy           the prompt, [prompt, embed] float32
step_N.safetensors   the parameters that another method trained, by path
step_N.json          the facts: task, base, method, step, scores, privacy
best.npy, ...        the same files for the best step
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from ptune.convert.prompts import write_prompt
from ptune.convert.trained import dump
from ptune.host.files import write_atomically
from ptune.model import parameters
from ptune.training import privacy

# The facts of a run that a prompt's .json repeats.
_KNOWN = ('task', 'base', 'method', 'settings', 'seed', 'batch_size')


def write(
  model_dir: epath.Path,
  name: str,
  plan: parameters.Plan,
  trained: Mapping[str, np.ndarray],
  step: int,
  scores: Mapping[str, Mapping[str, float]],
  run: Mapping[str, Any],
) -> None:
  """Writes the trained parameters and their facts.

  Args:
    model_dir: The run's directory.
    name: 'step_N' or 'best'.
    plan: The parameters.
    trained: The trained parameters, by path.
    step: The step after which they have these values.
    scores: The scores at that step, by task.
    run: The facts of the run.
  """
  method = plan.method
  if not plan.frozen:
    return  # The method trains the whole model, which the checkpoints hold.
  if method.fold:
    assert plan.rows is not None
    trained = method.fold(trained, plan.rows)
  facts = {
    'step': step,
    'scores': scores,
    **{k: run[k] for k in _KNOWN if k in run},
  }
  if 'privacy' in run:
    facts['privacy'] = privacy.spent(
      privacy.Privacy(**run['privacy']),
      step,
      run['batch_size'],
      run['examples'],
    )
    logging.info('%s', privacy.describe(facts['privacy']))
  folder = model_dir / 'prompts'
  folder.mkdir(parents=True, exist_ok=True)
  if method.prompt is not None:
    prompt = np.asarray(trained[method.prompt], np.float32)
    write_prompt(folder / f'{name}.npy', prompt, facts)
    return
  write_atomically(folder / f'{name}.json', json.dumps(facts, indent=2) + '\n')
  write_atomically(folder / f'{name}.safetensors', dump(trained))


def remove(model_dir: epath.Path, name: str) -> None:
  """Deletes the files of a name, if they exist."""
  for suffix in ('json', 'npy', 'safetensors'):
    (model_dir / 'prompts' / f'{name}.{suffix}').unlink(missing_ok=True)
