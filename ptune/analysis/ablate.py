"""`ptune ablate`: measures which rows of a prompt matter, and prunes the rest.

Ma et al. 2022, "XPrompt" (arXiv 2210.04457), prunes a prompt to the rows that
matter most (KEEP_ROWS), and then these rows to the pieces that matter most
(KEEP_PIECES). A row consists of PIECES pieces of equal width along embed.
IMPORTANCE defines how much row i of the prompt P [prompt, embed] matters:

    leave_one_out   score(P) - score(P without row i)
    gradient        mean_x |dL(x)/dg_i| at g = 1, where P has the rows g_i p_i:
                    the paper's definition; one pass forward and back

The importance of a piece is defined in the same way, in the prompt of the kept
rows; a left-out piece becomes 0. The score is BEST_METRIC on EVAL_SPLIT. The
network reads prompts of any length, so a row that is left out has no effect at
all.

    ptune ablate --gin_file=models/t5_1_1_base.gin \\
      --gin_file=methods/prompt.gin --gin_file=runs/ablate.gin \\
      --gin.MODEL_DIR="'/runs/sst2'" --gin.KEEP_ROWS=10 ...

You can use the pruned prompt as PROMPT_FILE. The paper trains it again from its
original initialisation. prompts/from_file.gin continues from its trained
values.
"""

import csv
import dataclasses
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table
from etils import epath

from ptune.analysis import figures
from ptune.convert.prompts import read_prompt, write_prompt
from ptune.data import device_feed, seqio_task
from ptune.errors import UserError
from ptune.host.files import write_atomically
from ptune.methods import prompt as prompt_lib
from ptune.model import parameters, partitioning
from ptune.model.adapters import Method
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import Config
from ptune.serving import trained_model
from ptune.serving.evaluation import Evaluation, Scores, evaluation_of
from ptune.training import selection, settings

LOSSES = ('-loss', 'loss', 'token_accuracy')  # These need no decoding.
# The number of rows of data, each with its own prompt, whose loss is computed
# at once.
AT_ONCE = 256

Flat = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pruning:
  """The parts of a prompt to keep.

  Attributes:
    rows: KEEP_ROWS, the number of rows to keep; None for all.
    pieces: KEEP_PIECES, the number of pieces to keep in all rows together; the
      others become 0. None for all.
    pieces_a_row: PIECES, the number of pieces of a row; 16 in the paper.
  """

  rows: int | None = None
  pieces: int | None = None
  pieces_a_row: int = 16


def ablate(
  *,
  data: settings.Data,
  config: Config,
  method: Method,
  trained: settings.Trained,
  evaluation: settings.Evaluation = settings.Evaluation(best_metric='-loss'),
  importance: str = 'leave_one_out',
  pruning: Pruning = Pruning(),
  model: Callable[..., EncoderDecoderModel] = EncoderDecoderModel,
  output_dir: str | None = None,
  seed: int = 0,
  model_parallel: int = 1,
) -> np.ndarray:
  """Measures the importance of every row of a prompt, and prunes it.

  Writes ablation.csv, .png and .svg to the output directory. If it prunes
  pieces, it writes the same files for them, named ablation_of_pieces. If it
  prunes anything, it writes pruned.npy and pruned.json.

  Args:
    data: The task and its batches.
    config: The network's sizes.
    method: A plain prompt, of the length of the trained one.
    trained: The trained prompt.
    evaluation: The split, and the metric that is the score; '-loss' is by far
      the fastest.
    importance: One of IMPORTANCES.
    pruning: The parts to keep.
    model: Makes the loss of a network.
    output_dir: The directory to write to; None for MODEL_DIR/ablate_<split>.
    seed: For sampling.
    model_parallel: The number of devices that share one copy of the weights.

  Returns:
    The importance of each row, [prompt].

  Raises:
    ValueError: If the settings do not fit together.
  """
  settings.check(data, evaluation)
  keep_rows, keep_pieces = pruning.rows, pruning.pieces
  pieces, best_metric = pruning.pieces_a_row, evaluation.best_metric
  if importance not in IMPORTANCES:
    raise UserError(
      f'IMPORTANCE is {importance!r}; expected one of {list(IMPORTANCES)}'
    )
  task = seqio_task.load(data.task, data.module)
  seqio_task.check_vocabulary(
    task, config.vocab_size, config.ids, trained_model.base_of(trained)
  )
  mesh = partitioning.make_mesh(model_parallel)
  plan = parameters.plan(config, method, mesh)
  device_feed.check_batch_size(evaluation.batch_size or data.batch_size, mesh)
  length = _length(plan)
  _check_pruning(pruning, length, config.emb_dim)
  trained_model.check(plan, trained)
  directory = trained_model.output_directory(
    'EVAL_OUTPUT_DIR',
    output_dir,
    trained.model_dir,
    f'ablate_{evaluation.split}',
  )

  def measure(plan: parameters.Plan) -> Measure:
    model_of_plan = model(plan.network)
    evaluate_all = evaluation_of(
      task, plan, model_of_plan, data, evaluation, seed
    )
    return Measure(plan, model_of_plan, evaluate_all, best_metric)

  whole = measure(plan)
  params, _ = trained_model.load(plan, trained)
  frozen = parameters.flatten(params)
  prompt = parameters.to_host(frozen.pop(prompt_lib.PATH))
  score = float(whole(frozen, prompt[None])[0])
  if importance == 'gradient':
    found = whole.gradients(frozen, prompt)
  else:
    shorter = measure(_shortened(plan, length - 1))
    others = np.stack([np.delete(prompt, i, axis=0) for i in range(length)])
    found = score - shorter(frozen, others)
  kept, kept_pieces, scores = None, None, {'all': score}
  left = whole
  if keep_rows is not None:
    kept = _largest(found, keep_rows)
    left, prompt = measure(_shortened(plan, keep_rows)), prompt[kept]
    scores['pruned'] = float(left(frozen, prompt[None])[0])
  of_pieces = np.empty((0, pieces))
  if keep_pieces is not None:
    if importance == 'gradient':
      of_pieces = left.gradients(frozen, prompt, pieces)
    else:
      score = scores.get('pruned', score)
      others = _without_a_piece(prompt, pieces)
      of_pieces = score - np.stack([left(frozen, row) for row in others])
    kept_pieces = _largest(of_pieces.reshape(-1), keep_pieces)
    gates = np.zeros(of_pieces.size, prompt.dtype)
    gates[kept_pieces] = 1
    prompt = np.asarray(_gated(prompt, gates.reshape(of_pieces.shape)))
    scores['pruned'] = float(left(frozen, prompt[None])[0])
  if jax.process_index() == 0:
    _write(directory, found, kept, importance)
    if kept_pieces is not None:
      _write_pieces(directory, of_pieces, kept_pieces, kept, importance)
    if kept is not None or kept_pieces is not None:
      facts = {
        **_known(trained),
        'importance': importance,
        'metric': best_metric,
        'scores_of_rows': scores,
      }
      if kept is not None:
        facts['kept_rows'] = kept.tolist()
      if kept_pieces is not None:
        facts |= {'kept_pieces': kept_pieces.tolist(), 'pieces': pieces}
      write_prompt(directory / 'pruned.npy', prompt, facts)
    _show(found, kept, kept_pieces, scores, importance, best_metric)
    print(f'written to {directory}')
  return found


IMPORTANCES = ('leave_one_out', 'gradient')


def _check_pruning(pruning: Pruning, length: int, embed: int) -> None:
  """Raises UserError if `pruning` does not fit a prompt [length, embed]."""
  keep_rows, keep_pieces = pruning.rows, pruning.pieces
  pieces = pruning.pieces_a_row
  if keep_rows is not None and not 1 <= keep_rows < length:
    raise UserError(
      f'KEEP_ROWS is {keep_rows}; expected 1 to {length - 1}, because the'
      f' prompt has {length} rows'
    )
  all_pieces = (keep_rows or length) * pieces
  if keep_pieces is not None and not 1 <= keep_pieces < all_pieces:
    raise UserError(
      f'KEEP_PIECES is {keep_pieces}; expected 1 to {all_pieces - 1}:'
      f' the {keep_rows or length} rows have {pieces} pieces each'
    )
  if pieces < 1 or embed % pieces:
    raise UserError(
      f'PIECES is {pieces}; expected a divisor of {embed}, the width of a row'
    )


def _known(trained: settings.Trained) -> dict[str, Any]:
  """The facts of the prompt that hold for the pruned prompt too."""
  known = read_prompt(trained.prompt_file or trained.model_dir or '').facts
  return {k: known[k] for k in ('step', 'task', 'base', 'method') if k in known}


def _largest(values: np.ndarray, count: int) -> np.ndarray:
  """The indices of the largest values, in order."""
  return np.sort(np.argsort(-values, kind='stable')[:count])


def _gated(prompt, gates):
  """Multiplies [prompt, embed] by the gates of its pieces, [prompt, pieces]."""
  return prompt * jnp.repeat(gates, prompt.shape[1] // gates.shape[1], axis=1)


def _without_a_piece(prompt: np.ndarray, pieces: int) -> Iterator[np.ndarray]:
  """Yields for each row the prompts [pieces, prompt, embed] without a piece."""
  width = prompt.shape[1] // pieces
  for i in range(len(prompt)):
    others = np.repeat(prompt[None], pieces, axis=0)
    for j in range(pieces):
      others[j, i, j * width : (j + 1) * width] = 0
    yield others


def _length(plan: parameters.Plan) -> int:
  """The number of rows of a plan's prompt.

  Raises:
    ValueError: If the method is not a plain prompt of two or more rows.
  """
  name = plan.method.name
  if name.partition('/')[0] != 'prompt' or plan.method.prompt is None:
    raise UserError(
      f'method {name!r} is not a plain prompt, so rows cannot be left out; if'
      ' its run left prompts/best.npy, give that as PROMPT_FILE, with'
      ' --gin_file=methods/prompt.gin'
    )
  length = plan.params[prompt_lib.PATH].shape[0]
  if length < 2:
    raise UserError(
      'the prompt has one row, so no row can be left out; use a longer prompt'
    )
  return length


def _shortened(plan: parameters.Plan, length: int) -> parameters.Plan:
  """The plan with a prompt of another length."""
  kind = plan.method.name.partition('/')[2] or 'start'
  causal = kind == 'causal'
  position = 'start' if causal else kind
  method = prompt_lib.prompt(length, position=position, causal=causal)
  return parameters.plan(plan.network.config, method, plan.mesh)


class Measure:
  """The score of prompts of one length on the examples of a split."""

  def __init__(
    self,
    plan: parameters.Plan,
    model: EncoderDecoderModel,
    evaluation: Evaluation,
    best_metric: str | None,
  ):
    self._plan, self._evaluation = plan, evaluation
    self._best_metric = best_metric
    jit = lambda f: jax.jit(f, out_shardings=partitioning.replicated(plan.mesh))
    at_once = max(1, AT_ONCE // evaluation.batch_size)

    def sums(frozen, prompts, batch):
      one = lambda own: model.loss(_with(frozen, own), batch)[1]
      return jax.lax.map(one, prompts, batch_size=at_once)

    def gradients(frozen, prompt, gates, batch):
      def loss(gates, row):
        row = {name: x[None] for name, x in row.items()}
        return model.loss(_with(frozen, _gated(prompt, gates)), row)[0]

      found = jax.vmap(jax.grad(loss), (None, 0))(gates, batch)
      # The rows that pad a batch have no targets, so their gradient is 0.
      real = jnp.any(batch['decoder_loss_weights'] > 0, axis=1)
      return jnp.sum(jnp.abs(found), axis=0), jnp.sum(real)

    self._sums, self._gradients = jit(sums), jit(gradients)

  def __call__(self, frozen: Flat, prompts: np.ndarray) -> np.ndarray:
    """The score of each of [prompts, prompt, embed]; higher is better."""
    if self._best_metric in LOSSES:
      scores = self._losses(frozen, prompts)
    else:
      scores = [
        self._evaluation((_with(frozen, prompt),), 0) for prompt in prompts
      ]
    return np.array([selection.score(self._best_metric, s) for s in scores])

  def _losses(self, frozen: Flat, prompts: np.ndarray) -> list[Scores]:
    """`loss` and `token_accuracy` of each prompt, by task."""
    scores: list[Scores] = [{} for _ in prompts]
    for task, batch_sums in self._batches(self._sums, frozen, prompts):
      total = {k: sum(s[k] for s in batch_sums) for k in batch_sums[0]}
      tokens = np.maximum(total['tokens'], 1.0)
      for i, own in enumerate(scores):
        own[task] = {
          'loss': float(total['loss'][i] / tokens[i]),
          'token_accuracy': float(total['correct'][i] / tokens[i]),
        }
    return scores

  def gradients(
    self, frozen: Flat, prompt: np.ndarray, pieces: int | None = None
  ) -> np.ndarray:
    """mean_x |dL(x)/dg| of rows, [prompt], or of pieces, [prompt, pieces]."""
    gates = np.ones((len(prompt), pieces or 1), np.float32)
    found = [
      pair
      for _, pairs in self._batches(self._gradients, frozen, prompt, gates)
      for pair in pairs
    ]
    totals, rows = zip(*found, strict=True)
    mean = np.sum(totals, axis=0) / max(np.sum(rows), 1)
    return mean if pieces else mean[:, 0]

  def _batches(self, program, *values):
    """Yields each task's name and the program's result for each batch."""
    with self._plan.scope():
      for task, dataset in self._evaluation.datasets.items():
        yield (
          task,
          [
            jax.device_get(program(*values, batch))
            for _, batch in self._evaluation.batches(dataset)
          ],
        )


def _with(frozen: Flat, prompt: Any) -> dict[str, Any]:
  return parameters.unflatten({**frozen, prompt_lib.PATH: prompt})


# ---------------------------------------------------------------------- output


def _write(
  directory: epath.Path,
  importance: np.ndarray,
  kept: np.ndarray | None,
  name: str,
) -> None:
  table = [
    {'row': i, 'importance': f'{value:.8g}'}
    for i, value in enumerate(importance)
  ]
  if kept is not None:
    for i, line in enumerate(table):
      line['kept'] = int(i in kept)
  _write_table(directory, 'ablation', table)
  figures.save(draw(importance, kept, name), directory, 'ablation')


def _write_pieces(
  directory: epath.Path,
  importance: np.ndarray,
  kept: np.ndarray,
  rows: np.ndarray | None,
  name: str,
) -> None:
  """As `_write`, for [prompt, pieces]; rows keep their original numbers."""
  numbers = np.arange(len(importance)) if rows is None else rows
  is_kept = np.isin(np.arange(importance.size), kept).reshape(importance.shape)
  table = [
    {
      'row': int(numbers[i]),
      'piece': j,
      'importance': f'{importance[i, j]:.8g}',
      'kept': int(is_kept[i, j]),
    }
    for i, j in np.ndindex(importance.shape)
  ]
  _write_table(directory, 'ablation_of_pieces', table)
  drawn = draw_pieces(importance, is_kept, numbers, name)
  figures.save(drawn, directory, 'ablation_of_pieces')


def _write_table(
  directory: epath.Path, name: str, table: Sequence[Mapping[str, Any]]
) -> None:
  text = io.StringIO()
  writer = csv.DictWriter(text, list(table[0]), lineterminator='\n')
  writer.writeheader()
  writer.writerows(table)
  write_atomically(directory / f'{name}.csv', text.getvalue())


def draw(importance: np.ndarray, kept: np.ndarray | None, name: str):
  """Draws a bar for each row; the bars of pruned rows are grey."""
  from matplotlib import figure, ticker

  rows = np.arange(len(importance))
  is_kept = np.ones(len(rows), bool) if kept is None else np.isin(rows, kept)
  fig = figure.Figure(
    figsize=(3 + 0.09 * max(40, len(rows)), 3.2), layout='constrained'
  )
  axes = fig.subplots()
  for which, colour, label in (
    (is_kept, 'C0', 'kept'),
    (~is_kept, '0.7', 'pruned'),
  ):
    axes.bar(rows[which], importance[which], color=colour, label=label)
  axes.axhline(0, color='black', lw=0.8)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.margins(x=0.01)
  axes.set(xlabel='row of the prompt', ylabel='importance')
  axes.set_title(name.replace('_', ' '))
  if kept is not None:
    axes.legend()
  return fig


def draw_pieces(
  importance: np.ndarray, kept: np.ndarray, rows: np.ndarray, name: str
):
  """Draws a square for each piece, darker if it matters more."""
  from matplotlib import figure

  count, pieces = importance.shape
  fig = figure.Figure(
    figsize=(2.5 + 0.28 * pieces, 1.5 + 0.2 * count), layout='constrained'
  )
  axes = fig.subplots()
  image = axes.imshow(importance, cmap='Blues', aspect='auto')
  y, x = np.nonzero(~kept)
  axes.plot(x, y, 'x', color='0.5', ms=4)
  axes.set(xlabel='piece', ylabel='row of the prompt')
  axes.set_yticks(range(count), rows, fontsize=7)
  axes.set_title(f'{name.replace("_", " ")} (x: pruned)')
  fig.colorbar(image, label='importance')
  return fig


def _show(
  importance: np.ndarray,
  kept: np.ndarray | None,
  kept_pieces: np.ndarray | None,
  scores: Mapping[str, float],
  name: str,
  metric: str | None,
) -> None:
  table = rich.table.Table(box=rich.box.SIMPLE)
  for title in ('row', name.replace('_', ' '), ''):
    table.add_column(title, justify='right')
  for i in np.argsort(-importance, kind='stable').tolist():
    mark = 'kept' if kept is not None and i in kept else ''
    table.add_row(str(i), f'{importance[i]:.4g}', mark)
  rich.console.Console(highlight=False).print(table)
  of = metric or "the task's metrics"
  print(f'{of} of all {len(importance)} rows: {scores["all"]:.4g}')
  if 'pruned' in scores:
    what = [] if kept is None else [f'{len(kept)} rows']
    what += [] if kept_pieces is None else [f'{len(kept_pieces)} pieces']
    print(f'{of} of the {", ".join(what)} kept: {scores["pruned"]:.4g}')


if __name__ == '__main__':
  # The same as `ptune ablate`; gin imports this module under its own name.
  from ptune import cli

  sys.argv.insert(1, 'ablate')
  sys.exit(cli.main())
