"""Multitask prompts: one run trains a prompt for each of several tasks.

The first token of a row names its task: token vocab_size - 1 - t means task t,
as in SeqIO tasks named task_index_.... The encoder reads the task's prompt
instead of this token. The prompt combines S, which all tasks share, with T_t,
which belongs to the task; both are [prompt, embed] unless the table says
otherwise:

    add               S + T_t
    concat            [S; T_t], T_t [task_length, embed], S the other rows
    concat_features   [S, T_t], S [prompt, shared_features], T_t the others
    project           S W_t + b_t, S [prompt, shared_features]
    scale             S * (u_t v_t), u_t [prompt, 1], v_t [1, embed]

The first four come from the implementation of Lester et al. 2021 (arXiv
2104.08691). `scale` is the prompt of Wang, Panda, Karlinsky, Feris, Sun and Kim
2023, "Multitask Prompt Tuning" (arXiv 2303.02861), section 3.2; here it is
trained on all tasks at once and without a teacher.

As in that implementation, the rows of a prompt attend only to the rows before
them and to the input. `ptune export --task=t` writes the prompt of one task.
METHOD prompt with causal = True gives the same answers with it, for inputs
without the task's token.

Trained: S and all T_t, as encoder/prompt/prompt/shared_prompt and
.../task_prompts/embedding [tasks, numbers of a task].

    --gin_file=methods/multitask.gin
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.causal_prompts import causal_mask
from ptune.methods.packed_prompts import ReadPrompt
from ptune.methods.prompt import SCOPE, check_length
from ptune.model.adapters import VIRTUAL, Method, Packed, Placement
from ptune.model.layers import kernel_init

COMBINE = ('add', 'concat', 'concat_features', 'project', 'scale')
SHARED = f'{SCOPE}/shared_prompt'
TASKS = f'{SCOPE}/task_prompts/embedding'


def prompts(combine: str, shared: jax.Array, own: jax.Array) -> jax.Array:
  """The prompts of all tasks.

  Args:
    combine: One of COMBINE.
    shared: S, [rows, features].
    own: T_t of each task as one row, [task, numbers].

  Returns:
    [task, prompt, embed].
  """
  rows, features = shared.shape
  shared = jnp.broadcast_to(shared, (own.shape[0], *shared.shape))
  if combine == 'project':
    # [task, embed * features + embed]: W_t transposed, then b_t.
    embed = own.shape[1] // (features + 1)
    maps, biases = own[:, :-embed], own[:, -embed:]
    maps = maps.reshape(own.shape[0], embed, features)
    return jnp.einsum('tpf,tef->tpe', shared, maps) + biases[:, None]
  if combine == 'scale':
    return shared * own[:, :rows, None] * own[:, None, rows:]
  if combine == 'concat_features':
    own = own.reshape(own.shape[0], rows, -1)
    return jnp.concatenate([shared, own], axis=2)
  own = own.reshape(own.shape[0], -1, features)
  if combine == 'add':
    return shared + own
  return jnp.concatenate([shared, own], axis=1)


def task_prompt(
  settings: Mapping[str, Any],
  trained: Mapping[str, np.ndarray],
  task: int | None,
) -> np.ndarray:
  """The prompt of one task, for methods/prompt.gin.

  Args:
    settings: The method's settings, as a run stores them.
    trained: Its parameters, by path.
    task: The number of the task.

  Returns:
    [prompt, embed] float32.

  Raises:
    UserError: If there is no such task.
  """
  own = np.asarray(trained[TASKS], np.float32)
  if task is None or not 0 <= task < len(own):
    raise UserError(
      f'it holds the prompts of {len(own)} tasks, and got task {task}; choose'
      f' one of 0 ... {len(own) - 1}'
    )
  shared = np.asarray(trained[SHARED], np.float32)
  own = own[task : task + 1]
  return np.asarray(prompts(settings['combine'], shared, own)[0])


class MultitaskPrompt(nn.Module):
  """The parameters, combined to the prompts of all tasks.

  The attributes are arguments of `multitask`.
  """

  length: int
  tasks: int
  combine: str
  task_length: int
  shared_features: int | None

  @nn.compact
  def __call__(self, embed: int) -> jax.Array:
    """Returns [task, prompt, embed]."""
    rows, features = self.length, embed
    if self.combine == 'concat':
      rows = self.length - self.task_length
    elif self.combine in ('concat_features', 'project'):
      features = self.shared_features or embed // 2
    if self.combine == 'concat_features' and features >= embed:
      raise UserError(
        f'shared_features is {features}, but d_model is {embed}, so'
        ' that no feature is left for the tasks; lower shared_features'
      )
    shared = partitioning.param_with_axes(
      'shared_prompt',
      nn.initializers.uniform(1.0),
      (rows, features),
      jnp.float32,
      axes=('prompt', 'prompt_embed'),
    )
    numbers, init = {
      # All prompts start as S.
      'add': (rows * embed, nn.initializers.zeros),
      'scale': (rows + embed, nn.initializers.ones),
      'concat': (self.task_length * embed, _uniform),
      'concat_features': (rows * (embed - features), _uniform),
      'project': (
        (features + 1) * embed,
        functools.partial(_projections, features),
      ),
    }[self.combine]
    own = TaskPrompts(self.tasks, numbers, init, name='task_prompts')()
    return prompts(self.combine, shared, own)


class TaskPrompts(nn.Module):
  """T_t of each task as one row, [task, numbers] float32."""

  tasks: int
  numbers: int
  init: nn.initializers.Initializer

  @nn.compact
  def __call__(self) -> jax.Array:
    return partitioning.param_with_axes(
      'embedding',
      self.init,
      (self.tasks, self.numbers),
      jnp.float32,
      axes=('task', 'prompt_embed'),
    )


def _uniform(rng, shape, dtype) -> jax.Array:
  """The start of a prompt: uniform in [-0.5, 0.5)."""
  return jax.random.uniform(rng, shape, dtype, -0.5, 0.5)


def _projections(features, rng, shape, dtype) -> jax.Array:
  """For each task a random map W_t and a bias b_t of 0, as one row."""
  embed = shape[1] // (features + 1)
  keys = jax.random.split(rng, shape[0])
  maps = jax.vmap(lambda key: kernel_init(key, (features, embed), dtype))(keys)
  maps = maps.swapaxes(1, 2).reshape(shape[0], -1)
  return jnp.pad(maps, ((0, 0), (0, embed)))


class InsertTaskPrompt(nn.Module):
  """Replaces the first token of each row by the prompt of its task."""

  source: functools.partial
  vocab_size: int

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """x [batch, length], y [batch, length, embed] -> [batch, p - 1 + l, e]."""
    prompts = self.source(name='prompt')(y.shape[-1])
    task = self.vocab_size - 1 - x[:, 0]
    # An index below 0 would count from the end and pick another task's prompt.
    task = jnp.where(task < 0, prompts.shape[0], task)
    prompt = jnp.take(prompts, task, axis=0, mode='fill', fill_value=jnp.nan)
    return jnp.concatenate([prompt.astype(y.dtype), y[:, 1:]], axis=1)


def check_tokens(vocab_size: int, tasks: int, tokens: np.ndarray) -> None:
  """Raises a UserError unless all rows [batch, length] begin with a task."""
  first = tokens[:, 0]
  known = (first >= vocab_size - tasks) & (first < vocab_size)
  if not known.all():
    raise UserError(
      f'inputs begin with the tokens {sorted(set(first[~known].tolist()))}, but'
      f' the tokens of the {tasks} tasks are {vocab_size - 1} (task 0) to'
      f' {vocab_size - tasks} (task {tasks - 1}): train on tasks named'
      ' task_index_..., set multitask.multitask.tasks to their number and'
      ' vocab_size to the ids of their vocabulary (32100 for T5, 250100 for'
      ' mT5, 259 for ByT5). For other inputs, export the prompt of one task'
    )


def multitask(
  length: int = 100,
  combine: str = 'add',
  tasks: int = 9,
  vocab_size: int = 32100,
  task_length: int | None = None,
  shared_features: int | None = None,
  causal: bool = True,
  init: prompt_init.Initializer | None = None,
) -> Method:
  """A prompt of `length` tokens for each task; the rest of the model is frozen.

  Args:
    length: Rows of a prompt (PROMPT_LENGTH).
    combine: How S and T_t are combined, see above.
    tasks: Number of tasks; GLUE's are numbered 0 to 8, SuperGLUE's 0 to 7.
    vocab_size: Size of the task's vocabulary, whose last id means task 0.
    task_length: With 'concat', rows of T_t; half of the prompt if not given.
    shared_features: With 'concat_features' and 'project', columns of S; half of
      the model's if not given.
    causal: Whether the prompt's rows attend only to the rows before them and to
      the input, as in the paper's implementation; otherwise to all positions,
      as in prompt tuning.
    init: Initialiser of S from `prompt_init`; random uniform if not given.

  Raises:
    UserError: If a number is out of range or `combine` is unknown.
  """
  check_length(length)
  if combine not in COMBINE:
    raise UserError(f'combine is {combine!r}; it must be one of {COMBINE}')
  if not 1 <= tasks < vocab_size:
    raise UserError(
      f'tasks is {tasks}; it must be at least 1 and less than vocab_size, which'
      f' is {vocab_size}'
    )
  task_length = math.ceil(length / 2) if task_length is None else task_length
  if combine == 'concat' and not 1 <= task_length < length:
    raise UserError(
      f'task_length is {task_length}; it must be at least 1 and less than'
      f' PROMPT_LENGTH, which is {length}, so that S has rows too'
    )
  if shared_features is not None and shared_features < 1:
    raise UserError(
      f'shared_features is {shared_features}; it must be at least 1'
    )
  source = functools.partial(
    MultitaskPrompt,
    length=length,
    tasks=tasks,
    combine=combine,
    task_length=task_length,
    shared_features=shared_features,
  )
  insert = functools.partial(
    InsertTaskPrompt, source=source, vocab_size=vocab_size
  )
  check = functools.partial(check_tokens, vocab_size, tasks)

  def insert_packed(tokens: np.ndarray) -> np.ndarray:
    """[token of task t, *tokens] -> [the rows of its prompt, *tokens]."""
    check(tokens[None])
    first = VIRTUAL + (vocab_size - 1 - tokens[0]) * length
    return np.concatenate([first + np.arange(length), tokens[1:]])

  read = functools.partial(ReadPrompt, source=source)
  return Method(
    name='multitask',
    placements=(
      Placement('encoder/embed', 'prompt', insert),
      *(causal_mask(length) if causal else ()),
    ),
    trainable=(SHARED, TASKS),
    settings={'combine': combine, 'causal': causal, 'vocab_size': vocab_size},
    check=check,
    initial={SHARED: init or prompt_init.random_uniform()},
    packed=Packed(
      placements=(
        Placement('encoder/embed', 'prompt', read),
        *(causal_mask(None) if causal else ()),
      ),
      insert={'encoder': (length - 1, insert_packed)},
    ),
  )
