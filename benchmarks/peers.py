"""The compared programs, and how they are measured.

`ours` is prompt tuning by ptune, `peft` by Hugging Face's PEFT on PyTorch. Both
have the same model shape with random weights, the same batch, and one thread.
Compared programs run in turns in one process on one core, so that other load on
the machine affects both. Seconds are CPU seconds of the process. If JAX has an
accelerator, both use it, and seconds are wall seconds.
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

# The published sizes, and smaller ones with the same vocabulary.
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
LARGE = 8192  # For an accelerator's best rate.

# ------------------------------------------------------------------- measuring


def on_cpu() -> bool:
  """Whether the computations run on the CPU."""
  return jax.default_backend() == 'cpu'


def clock() -> str:
  """Returns the clock that measures the seconds."""
  return 'CPU' if on_cpu() else 'wall'


def seconds_of(call: Callable[[], Any]) -> float:
  """Returns the seconds of one call until its result is ready."""
  now = time.process_time if on_cpu() else time.perf_counter
  start = now()
  jax.block_until_ready(call())
  return now() - start


def in_turns(
  calls: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
  """Returns the seconds of each call in each round, by name."""
  taken: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      taken[name].append(seconds_of(call))
  return taken


def interleaved(
  calls: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, Any]:
  """Times the calls in turns, `rounds` + 1 times; the first round is dropped.

  Returns:
    `seconds`, the median of each call. For each call but the first, its time
    divided by the first call's: `times_NAME` (median over the rounds) and
    `times_NAME_min`.
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
  """Returns a parser with the flags that most benchmarks share."""
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
  for name in SWITCHES:  # Only for `ours`.
    made.add_argument(f'--{name}', action='store_true')
  return made


def run(
  parser: argparse.ArgumentParser,
  measure: Callable[[argparse.Namespace], Mapping[str, Any]],
) -> None:
  """Parses the flags, measures on one core, and prints a line of JSON."""
  args = parser.parse_args()
  # This must happen before JAX finds devices and starts its threads.
  if not jax_setup.has_cpu_only():  # Leaves memory to PyTorch.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  elif hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  jax_setup.configure_cpu()  # Like the `ptune` command.
  result = measure(args)
  device = jax.devices()[0].device_kind
  about = {'device': device, 'clock': clock(), 'jax': jax.__version__}
  print(json.dumps({**vars(args), **about, **result}))


# ------------------------------------------------------------------------ ours


class Ours(NamedTuple):
  """A network with a prompt, and random values for it.

  Attributes:
    plan: The plan of its parameters.
    trainable: The prompt, as a nested dict like in the network.
    frozen: The other parameters, in the form that a run holds.
  """

  plan: parameters.Plan
  trainable: Any
  frozen: Any

  @property
  def model(self) -> EncoderDecoderModel:
    return EncoderDecoderModel(self.plan.network)


def plan_of(args: argparse.Namespace, **changes: Any) -> parameters.Plan:
  """Returns the parameter plan that the flags select; builds nothing."""
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
  """Returns the network that the flags select, with random values."""
  plan = plan_of(args)
  params = parameters.initialize(plan, plan.params, seed=0)
  frozen = frozen_weights.freeze(plan, {p: params.pop(p) for p in plan.frozen})
  return Ours(plan, parameters.unflatten(params), parameters.unflatten(frozen))


def batch_of(
  plan: parameters.Plan, rows: int, inputs: int, targets: int
) -> dict[str, jax.Array]:
  """Returns T5's features with random tokens, without padding."""
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
    Both programs, the optimizer, and the abstract state.
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
  """Returns a function that takes the next step, with the given arguments."""

  def call(*more):
    nonlocal state
    state, sums = step(state, *rest, *more)
    return state, sums

  return call


def analytic_flops(args: argparse.Namespace) -> int:
  """Returns the FLOP of a step, counted as in papers.

  For each matrix, a token costs two FLOP per weight forward and two backward,
  because frozen weights have no gradient. In attention, a pair of positions
  costs four FLOP forward and eight backward, because both operands have
  gradients.
  """
  config = plan_of(args).network.config
  heads = config.num_heads * config.head_dim
  attention, mlp = config.emb_dim * heads, config.emb_dim * config.mlp_dim
  mlp *= 1 + len(config.mlp_activations)
  read, written = args.prompt_length + args.inputs, args.targets
  encoder, decoder = config.num_encoder_layers, config.num_decoder_layers
  weights = read * encoder * (4 * attention + mlp)
  weights += read * decoder * 2 * attention  # For cross-attention.
  weights += written * decoder * (6 * attention + mlp)
  weights += written * config.emb_dim * config.vocab_size
  pairs = encoder * read**2 + decoder * (written**2 + read * written)
  return args.batch * (4 * weights + 12 * pairs * heads)


def matmul_rate(args: argparse.Namespace) -> float:
  """Returns the FLOP per second of the faster of an MLP's products.

  On an accelerator, it measures a large product of square matrices instead.
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
  """Returns the config.json of a T5 1.1 with these sizes."""
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
  """Returns PyTorch's device, which is the one that JAX uses."""
  return 'cpu' if on_cpu() else 'cuda'


def peft(args: argparse.Namespace, device: str = ''):
  """Returns PEFT's model with the same shapes and prompt, on `torch_device`."""
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
    # The output layer has its own weights in T5 1.1, but some versions tie it.
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
  """Converts a batch to the inputs of PEFT's models; padding has no loss."""
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
  """Returns PEFT's update with Adafactor, which takes a `torch_batch`."""
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
