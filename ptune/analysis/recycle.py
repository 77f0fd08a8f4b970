"""`ptune recycle`: moves a prompt from the model it was trained on to another.

The method is that of Lester et al. 2022, "Reducing Retraining by Recycling
Parameter-Efficient Prompts" (arXiv 2208.05577). V_s [tokens, source embed] and
V_t [tokens, target embed] are the embeddings of the tokens that both models
have. P_s [prompt, source embed] is the prompt. A map that is fitted to take V_s
to V_t is applied to P_s, which gives P_t:

    linear  v2v-lin   min_W |V_s W - V_t|,              P_t = P_s W
    mlp     v2v-nn    min |f(V_s) - V_t|,               P_t = f(P_s),
                      f(x) = relu(x W_1 + b_1) W_2 + b_2, hidden 4 times the
                      target's embed, Adam at 3e-4, batches of 50, 25 epochs
    lstsq   lin-comb  min |A V_s - P_s|, smallest A,    P_t = A V_t

With the pseudo-inverse V_s+, the first is P_s (V_s+ V_t) and the last is (P_s
V_s+) V_t: the same prompt, except for rounding. The paper fits to 4,000 English
words after the first 1,000. ptune fits to all shared tokens, or to those that
--skip and --tokens select.

    ptune recycle runs/sst2 --source=BASE_A --target=BASE_B --method=linear \\
      --output=recycled.npy

For few pairs of models, a recycled prompt works as well as on its own model.
Use it to start training (PROMPT_FILE of prompts/from_file.gin).
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from ptune.analysis.neighbours import blocks_of, read_vocabulary
from ptune.convert import open_checkpoint, output
from ptune.convert.export import check_base, check_width, export
from ptune.convert.identity import fingerprint
from ptune.convert.prompts import Prompt, read_prompt
from ptune.convert.source import EMBEDDING, Source
from ptune.errors import UserError

HIDDEN, BATCH, EPOCHS, RATE = 4, 50, 25, 3e-4
# Singular values of the source's embedding below this share of the largest
# count as rounding errors.
CUTOFF = 1e-6

Map = Callable[[np.ndarray], np.ndarray]  # [rows, source] -> [rows, target]


def recycle(
  prompt: Prompt, source: np.ndarray, target: np.ndarray, method: str
) -> tuple[np.ndarray, dict[str, float]]:
  """Moves a prompt from one model's embedding to another's.

  Args:
    prompt: The prompt of the source model.
    source: The source's embeddings of the shared tokens, [tokens, source
      embed].
    target: The target's embeddings of the same tokens, [tokens, target embed].
    method: One of METHODS.

  Returns:
    The prompt [prompt, target embed] in float32, fitted to all tokens; and two
    errors, relative to the norm of the values to fit: `fit_error` over the
    tokens, and `held_out_error` over every tenth token, for a map fitted to the
    other tokens.

  Raises:
    ValueError: If there are fewer than 20 tokens, or the result is not finite.
  """
  if len(source) < 20:
    raise UserError(
      f'{len(source)} tokens are too few to fit a map; expected at least 20.'
      ' Give more with --tokens'
    )
  fit = METHODS[method]
  held = np.arange(len(source)) % 10 == 9
  tried = fit(source[~held], target[~held])
  errors = {'held_out_error': _error(tried(source[held]), target[held])}
  found = fit(source, target)
  errors['fit_error'] = _error(found(source), target)
  moved = np.asarray(found(prompt.array), np.float32)
  if not np.isfinite(moved).all():
    raise UserError(
      f'--method={method} gave a prompt with NaN or infinity; use'
      ' --method=linear'
    )
  return moved, errors


def _error(found: np.ndarray, expected: np.ndarray) -> float:
  expected = np.asarray(expected, np.float64)
  missed = np.linalg.norm(found - expected)
  return float(missed / max(np.linalg.norm(expected), 1e-30))


def linear(source: np.ndarray, target: np.ndarray) -> Map:
  """Solves source W = target for W [source embed, target embed]."""
  weights = _inverse_gram(source) @ _product(source, target)
  return lambda rows: np.asarray(rows, np.float64) @ weights


def lstsq(source: np.ndarray, target: np.ndarray) -> Map:
  """Writes rows as sums of the source's embeddings, and sums the target's."""
  inverse = _inverse_gram(source)

  def move(rows: np.ndarray) -> np.ndarray:
    moved = np.zeros((len(rows), target.shape[1]))
    half = np.asarray(rows, np.float64) @ inverse
    for part in _parts(len(source)):  # A [rows, tokens], in blocks of tokens.
      shares = half @ source[part].T.astype(np.float64)
      moved += shares @ target[part].astype(np.float64)
    return moved

  return move


class TwoLayers(nn.Module):
  """[rows, source embed] -> [rows, target embed]."""

  embed: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dense(self.embed)(nn.relu(nn.Dense(HIDDEN * self.embed)(x)))


def mlp(source: np.ndarray, target: np.ndarray) -> Map:
  """Trains two layers by the paper's recipe; each call gives the same ones."""
  network, tx = TwoLayers(target.shape[1]), optax.adam(RATE)
  size = min(BATCH, len(source))
  # Each epoch drops different rows, those that do not fill a batch.
  rng, full = np.random.default_rng(0), len(source) // size * size
  orders = [rng.permutation(len(source))[:full] for _ in range(EPOCHS)]
  batches = np.concatenate(orders).reshape(-1, size)

  def loss(params, x, y):
    return optax.l2_loss(network.apply(params, x), y).mean()

  @jax.jit
  def train(source, target, batches):
    def step(state, rows):
      params, opt_state = state
      gradients = jax.grad(loss)(params, source[rows], target[rows])
      updates, opt_state = tx.update(gradients, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), None

    params = network.init(jax.random.key(0), source[:1])
    return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]

  params = train(source, target, batches)
  return lambda rows: np.asarray(network.apply(params, jnp.asarray(rows)))


METHODS = {'linear': linear, 'lstsq': lstsq, 'mlp': mlp}


def _inverse_gram(x: np.ndarray) -> np.ndarray:
  """The pseudo-inverse of x^T x [embed, embed], in float64.

  float32 keeps 7 digits of x, and float64 keeps 14 of its square, so squaring
  loses no precision. It also needs only a part of x at a time.
  """
  values, vectors = np.linalg.eigh(_product(x, x))
  kept = values > max(values[-1], 0) * CUTOFF**2
  return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns x^T y in float64."""
  total = np.zeros((x.shape[1], y.shape[1]))
  for part in _parts(len(x)):
    total += x[part].T.astype(np.float64) @ y[part].astype(np.float64)
  return total


def _parts(rows: int) -> list[slice]:
  return [slice(start, start + 4096) for start in range(0, rows, 4096)]


# ------------------------------------------------------------- shared tokens


@dataclasses.dataclass(frozen=True)
class Side:
  """A model, and the path of its vocabulary if the model has none beside it."""

  path: epath.PathLike
  words: epath.PathLike | None = None


def shared_tokens(
  sides: tuple[Side, Side], rows: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids of the tokens that two models share.

  If both vocabularies are known, these are the tokens with the same text. If
  neither is known and the embeddings have the same number of rows, these are
  all ids.

  Args:
    sides: The models.
    rows: The number of rows of each embedding.

  Returns:
    The source's ids [tokens] in ascending order, and the target's ids of the
    same tokens.

  Raises:
    ValueError: If the vocabularies are needed and unknown.
  """
  texts: list[list[str | None] | None] = []
  reasons = []
  for side in sides:
    try:
      texts.append(read_vocabulary(side.words or side.path)[0])
    except ValueError as error:
      if side.words is not None:
        raise
      texts.append(None)
      reasons.append(str(error))
  if None not in texts:
    source, target = (
      {text: i for i, text in enumerate(found[:n]) if text}  # pyrefly: ignore
      for found, n in zip(texts, rows, strict=True)
    )
    pairs = [(i, target[text]) for text, i in source.items() if text in target]
    ids = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    return ids[:, 0], ids[:, 1]
  if rows[0] != rows[1]:
    raise UserError(
      f'the embeddings have {rows[0]} and {rows[1]} rows: only the'
      ' vocabularies say which rows belong to the same token; name them with'
      ' --source_vocabulary and --target_vocabulary.\n' + '\n'.join(reasons)
    )
  return np.arange(rows[0]), np.arange(rows[0])


def embeddings(source: Source, ids: np.ndarray) -> np.ndarray:
  """Embeds tokens as a model's encoder does, [n, embed] float32.

  It reads the table block by block.
  """
  leaf = source.leaves[EMBEDDING]
  scale = source.config.embedding_scale if source.config else 1.0
  found = np.empty((len(ids), leaf.shape[1]), np.float32)
  start = 0
  for block in blocks_of(leaf):
    here = (start <= ids) & (ids < start + len(block))
    found[here] = block[ids[here] - start] * scale
    start += len(block)
  return found


# ---------------------------------------------------------------- command line


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `ptune recycle`."""
  del command
  parser.add_argument('prompt', help='a MODEL_DIR or a prompt file')
  parser.add_argument(
    '--source', required=True, help='the model that it was trained on'
  )
  parser.add_argument('--target', required=True, help='the model to move it to')
  parser.add_argument(
    '--method',
    choices=METHODS,
    default='linear',
    help='the map to fit (default: %(default)s)',
  )
  for side in ('source', 'target'):
    parser.add_argument(
      f'--{side}_vocabulary',
      help=f'the SentencePiece file of --{side}, if it is not in the same'
      ' directory',
    )
  parser.add_argument(
    '--skip',
    type=int,
    default=0,
    help='the number of shared tokens to leave out, from the first',
  )
  parser.add_argument(
    '--tokens',
    type=int,
    help='the number of shared tokens to fit to (default: all)',
  )
  parser.add_argument(
    '--output',
    required=True,
    help='the .npy file to write; a .json file is written beside it',
  )
  parser.add_argument(
    '--overwrite', action='store_true', help='replace an existing file'
  )


def run(args: argparse.Namespace) -> None:
  """Runs the command line.

  Raises:
    ValueError, OSError: For errors that users can fix.
  """
  if args.skip < 0 or (args.tokens is not None and args.tokens < 1):
    raise UserError(
      f'got --skip={args.skip} --tokens={args.tokens}; expected --skip of at'
      ' least 0 and --tokens of at least 1'
    )
  path = f'{args.output.removesuffix(".npy")}.npy'
  output.check(path, args.overwrite)  # Checked before the work starts.
  prompt = read_prompt(args.prompt)
  source, target = open_checkpoint(args.source), open_checkpoint(args.target)
  check_width(prompt, source)
  if 'base' in prompt.facts:  # Else there is no check.
    check_base(prompt.path, prompt.facts, source, fingerprint(source))
  sides = (
    Side(args.source, args.source_vocabulary),
    Side(args.target, args.target_vocabulary),
  )
  rows = tuple(s.leaves[EMBEDDING].shape[0] for s in (source, target))
  last = None if args.tokens is None else args.skip + args.tokens
  ids, same = (x[args.skip : last] for x in shared_tokens(sides, rows))
  moved, errors = recycle(
    prompt,
    embeddings(source, ids),
    embeddings(target, same),
    args.method,
  )
  facts: dict[str, Any] = {
    k: prompt.facts[k] for k in ('task', 'method') if k in prompt.facts
  }
  facts['recycled'] = {
    'by': args.method,
    'source': source.path,
    'target': target.path,
    'tokens': len(ids),
    **errors,
  }
  result = dataclasses.replace(prompt, array=moved, facts=facts)
  lines = export(result, 'npy', path, overwrite=args.overwrite)
  print(
    f'{args.method} map fitted to {len(ids)} shared tokens: relative error'
    f' {errors["fit_error"]:.3g}, {errors["held_out_error"]:.3g} on held-out'
    ' tokens'
  )
  print('\n'.join(lines))
