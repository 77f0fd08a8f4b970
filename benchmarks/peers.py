"""What is measured, beside what, and how.

`ours` is prompt tuning by ptune, `peft` by Hugging Face's PEFT on PyTorch:
the same model shape with random weights, the same batch, one thread each.
Programs that are compared run in turns in one process on one core, so that
what else the machine does hits both; seconds are CPU seconds of the process.
Where JAX has an accelerator, both use it, and seconds are those of the wall.
"""

import argparse
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ptune.host import jax_setup
from ptune.methods import prompt
from ptune.model import frozen_weights, parameters, partitioning, sizes
from ptune.model.models import EncoderDecoderModel
from ptune.training import optim
from ptune.training import state as state_lib

# The published sizes, and smaller ones with their vocabulary.
SIZES = {
  **sizes.SIZES,
  **{
    name: sizes.t5(
      't5_1_1_small',
      emb_dim=embed,
      num_heads=heads,
      mlp_dim=2 * embed,
      num_encoder_layers=layers,
      num_decoder_layers=layers,
      vocab_size=vocab,
    )
    for name, (layers, embed, heads, vocab) in {
      'toy': (1, 16, 1, 3072),
      'small_quarter': (4, 128, 2, 32128),
      'small_half': (6, 256, 4, 32128),
    }.items()
  },
}

SWITCHES = ('fused_attention', 'remat')
LARGE = 8192  # Of an accelerator's best product.

# ------------------------------------------------------------------- measuring


def on_cpu() -> bool:
  """Whether the CPU computes."""
  return jax.default_backend() == 'cpu'


def clock() -> str:
  """Whose seconds they are."""
  return 'CPU' if on_cpu() else 'wall'


def seconds_of(call: Callable[[], Any]) -> float:
  """Seconds of one call, until its result is there; see above."""
  now = time.process_time if on_cpu() else time.perf_counter
  start = now()
  jax.block_until_ready(call())
  return now() - start


def in_turns(
  calls: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
  """Seconds of each call, by its name, in each round."""
  taken: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      taken[name].append(seconds_of(call))
  return taken


def interleaved(
  calls: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, Any]:
  """Calls each in turn, once more than `rounds` times; the first is dropped.

  Returns:
    `seconds` of each, the median; and of each but the first, by the first
    one's: `times_NAME` (median over the rounds) and `times_NAME_min`.
  """
  taken = in_turns(calls, rounds + 1)
  first, *others = calls
  result: dict[str, Any] = {
    'seconds': {
      name: round(float(np.median(t[1:])), 4) for name, t in taken.items()
    }
  }
  for name in others:
    ratios = np.divide(taken[name][1:], taken[first][1:])
    result[f'times_{name}'] = round(float(np.median(ratios)), 3)
    result[f'times_{name}_min'] = round(float(np.min(ratios)), 3)
  return result


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
  """Flags that most scripts share."""
  made = argparse.ArgumentParser(description=description.splitlines()[0])
  shared = {
    'size': 't5_1_1_small',
    'batch': 8,
    'inputs': 128,
    'targets': 16,
    'prompt_length': 100,
    'dtype': 'float32',
    'rounds': 5,
  }
  for name, value in {**shared, **defaults}.items():
    made.add_argument(f'--{name}', type=type(value), default=value)
  made.add_argument('--frozen_dtype', choices=('float32', 'bfloat16', 'int8'))
  for name in SWITCHES:  # Of ours alone.
    made.add_argument(f'--{name}', action='store_true')
  return made


def run(
  parser: argparse.ArgumentParser,
  measure: Callable[[argparse.Namespace], Mapping[str, Any]],
) -> None:
  """Reads the flags, measures on one core, and prints a line of JSON."""
  args = parser.parse_args()
  # Before JAX looks for devices, and starts its threads.
  if not jax_setup.has_cpu_only():  # It leaves memory to PyTorch.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  elif hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  jax_setup.configure_cpu()  # As the `ptune` command does.
  result = measure(args)
  device = jax.devices()[0].device_kind
  about = {'device': device, 'clock': clock(), 'jax': jax.__version__}
  print(json.dumps({**vars(args), **about, **result}))


# ------------------------------------------------------------------------ ours


class Ours(NamedTuple):
  """A network with a prompt, and random values for it.

  Attributes:
    plan: Its parameters.
    trainable: The prompt, a nested dict as in the network.
    frozen: The others, as a run holds them.
  """

  plan: parameters.Plan
  trainable: Any
  frozen: Any

  @property
  def model(self) -> EncoderDecoderModel:
    return EncoderDecoderModel(self.plan.network)


def plan_of(args: argparse.Namespace, **changes: Any) -> parameters.Plan:
  """The parameters of what the flags ask for; nothing is built."""
  config = dataclasses.replace(
    SIZES[args.size],
    **{
      name: getattr(args, name) for name in ('dtype', 'frozen_dtype', *SWITCHES)
    }
    | changes,
  )
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  return parameters.plan(config, prompt.prompt(args.prompt_length), mesh)


def ours(args: argparse.Namespace) -> Ours:
  """What the flags ask for."""
  plan = plan_of(args)
  params = parameters.initialize(plan, plan.params, seed=0)
  frozen = frozen_weights.freeze(plan, {p: params.pop(p) for p in plan.frozen})
  return Ours(plan, parameters.unflatten(params), parameters.unflatten(frozen))


def batch_of(
  plan: parameters.Plan, rows: int, inputs: int, targets: int
) -> dict[str, jax.Array]:
  """Random tokens without padding, as T5's features."""
  rng = np.random.default_rng(0)
  vocab = plan.network.config.vocab_size
  draw = lambda n: rng.integers(2, vocab, (rows, n), np.int32)
  target_tokens = draw(targets)
  features = {
    'encoder_input_tokens': draw(inputs),
    'decoder_target_tokens': target_tokens,
    'decoder_input_tokens': np.pad(target_tokens, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': np.ones_like(target_tokens),
  }
  sharding = NamedSharding(plan.mesh, PartitionSpec('data'))
  return {k: jax.device_put(v, sharding) for k, v in features.items()}


def compile_step(plan: parameters.Plan, batch: Mapping[str, Any]):
  """Compiles the update and the forward pass from shapes alone.

  Returns:
    The two programs, the optimizer, and the abstract state.
  """
  model = EncoderDecoderModel(plan.network)
  tx = optim.adafactor()
  abstract = state_lib.abstract_state(tx, plan)
  frozen = parameters.unflatten(frozen_weights.shapes(plan))
  update = state_lib.compile_step(model, tx, plan, abstract)

  def loss(trainable, frozen, batch):
    return model.loss(parameters.merge(trainable, frozen), batch)[0]

  with plan.scope():
    step = update.lower(abstract, frozen, batch).compile()
    forward = jax.jit(loss).lower(abstract.trainable, frozen, batch).compile()
  return step, forward, tx, abstract


def repeated(step: Callable[..., Any], state: Any, *rest: Any):
  """A call that takes the next step, of what it is given beside the rest."""

  def call(*more):
    nonlocal state
    state, sums = step(state, *rest, *more)
    return state, sums

  return call


def analytic_flops(args: argparse.Namespace) -> int:
  """FLOP of a step, as papers count them.

  Of each matrix two a weight and token forward and two backward, as no
  gradient of a frozen weight is made; of attention, four a pair of positions
  forward and eight backward, where both operands have a gradient.
  """
  config = plan_of(args).network.config
  heads = config.num_heads * config.head_dim
  attention, mlp = config.emb_dim * heads, config.emb_dim * config.mlp_dim
  mlp *= 1 + len(config.mlp_activations)
  read, written = args.prompt_length + args.inputs, args.targets
  encoder, decoder = config.num_encoder_layers, config.num_decoder_layers
  weights = read * encoder * (4 * attention + mlp)
  weights += read * decoder * 2 * attention  # Keys and values of the encoded.
  weights += written * decoder * (6 * attention + mlp)
  weights += written * config.emb_dim * config.vocab_size
  pairs = encoder * read**2 + decoder * (written**2 + read * written)
  return args.batch * (4 * weights + 12 * pairs * heads)


def matmul_rate(args: argparse.Namespace) -> float:
  """FLOP a second of the best of an MLP's products, at its shapes.

  On an accelerator, of a large product of square matrices.
  """
  config = plan_of(args).network.config
  rows = args.batch * (args.prompt_length + args.inputs)
  dtype, best = jnp.dtype(args.dtype), 0.0
  shapes = (config.emb_dim, config.mlp_dim), (config.mlp_dim, config.emb_dim)
  if not on_cpu():
    rows, shapes = LARGE, ((LARGE, LARGE),)
  multiply = jax.jit(
    lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)
  )
  for inner, outer in shapes:
    a = jnp.ones((rows, inner), dtype)
    b = jnp.ones((inner, outer), dtype)
    flops = 2 * rows * inner * outer
    call = functools.partial(multiply, a, b)
    seconds = min(seconds_of(call) for _ in range(20))
    best = max(best, flops / seconds)
  return best


# ------------------------------------------------------------------------ peft


def hugging_face_fields(config: sizes.T5Config) -> dict[str, Any]:
  """The config.json of a T5 1.1 of these sizes."""
  return {
    'vocab_size': config.vocab_size,
    'd_model': config.emb_dim,
    'd_kv': config.head_dim,
    'd_ff': config.mlp_dim,
    'num_layers': config.num_encoder_layers,
    'num_decoder_layers': config.num_decoder_layers,
    'num_heads': config.num_heads,
    'feed_forward_proj': 'gated-gelu',
    'tie_word_embeddings': False,
    'dropout_rate': 0.0,
    'decoder_start_token_id': 0,
  }


def torch_device() -> str:
  """Where PyTorch computes: where JAX does."""
  return 'cpu' if on_cpu() else 'cuda'


def peft(args: argparse.Namespace, device: str = ''):
  """The same model with the same prompt, by PEFT, on `torch_device`."""
  import peft as peft_lib
  import torch
  import transformers

  device = device or torch_device()
  torch.set_num_threads(1)
  if device == 'cuda':
    torch.set_float32_matmul_precision('high')  # As JAX's.
  torch.manual_seed(0)
  fields = hugging_face_fields(plan_of(args).network.config)
  config = transformers.T5Config.from_dict(fields)
  with torch.device(device):
    base = transformers.T5ForConditionalGeneration(config)
    # T5 1.1 has an output layer of its own; some versions tie it all the same.
    base.lm_head = torch.nn.Linear(
      config.d_model, config.vocab_size, bias=False
    )
  base = base.to(getattr(torch, args.dtype))
  tuning = peft_lib.PromptTuningConfig(
    task_type=peft_lib.TaskType.SEQ_2_SEQ_LM,
    num_virtual_tokens=args.prompt_length,
  )
  return peft_lib.get_peft_model(base, tuning).to(device)


def torch_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
  """A batch as PEFT's models take it; padding has no loss."""
  import torch

  tokens, targets = (
    torch.from_numpy(np.array(batch[name])).long().to(torch_device())
    for name in ('encoder_input_tokens', 'decoder_target_tokens')
  )
  return {
    'input_ids': tokens,
    'attention_mask': (tokens > 0).long(),
    'labels': targets.masked_fill(targets == 0, -100),
  }


def peft_step(args: argparse.Namespace) -> Callable[[Mapping], float]:
  """An update by PEFT, with Adafactor, of one `torch_batch` after another."""
  import transformers

  model = peft(args)
  model.train()
  optimizer = transformers.Adafactor(
    [p for p in model.parameters() if p.requires_grad],
    lr=0.3,
    relative_step=False,
    scale_parameter=False,
    warmup_init=False,
  )

  def step(inputs):
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return step
