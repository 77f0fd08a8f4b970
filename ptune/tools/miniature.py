"""Tunes a small model on rows of text, in seconds and without SeqIO.

    config, base = load(pretrained.directory('tiny'))
    made = programs(config, prompt_method(), prompt_optimizer(600))
    rows = train, validation, test
    tuned = tune('prompt', made, base, Pieces(), rows, steps=600)
    tuned.accuracy, tuned.prompt

`ptune demo` and benchmarks use it; their data are lists of (text, label). The
loop is that of `ptune train`, without a run directory.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress
import sentencepiece

from ptune import pretrained
from ptune.convert import identity, open_checkpoint, restore
from ptune.methods import prompt, prompt_init
from ptune.model import network, parameters, partitioning, structure
from ptune.model.adapters import Method
from ptune.model.models import EncoderDecoderModel
from ptune.model.sizes import T5Config
from ptune.serving.bank import PromptBank
from ptune.training import optim, profiling, report, settings
from ptune.training import state as state_lib
from ptune.training.loop import Loop
from ptune.training.member import Member

BATCH_SIZE = 32
TEST_BATCH = 200  # Rows in a test batch; the size of a split is a multiple.
EVALUATIONS = 8  # Points of a curve.
INPUT_LENGTH, ANSWER_LENGTH = 32, 8  # Tokens, EOS included.

Row = tuple[str, str]  # A text and its label.
Splits = tuple[Sequence[Row], Sequence[Row], Sequence[Row]]
Features = dict[str, np.ndarray]


class Pieces:
  """The vocabulary of ptune's models, without TensorFlow."""

  def __init__(self):
    self.processor = sentencepiece.SentencePieceProcessor(
      model_file=str(pretrained.VOCABULARY)
    )
    self.unk_id = self.processor.unk_id()
    self.eos_id = self.processor.eos_id()
    self.size = self.processor.get_piece_size()

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    return self.processor.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids up to EOS or padding, without sentinels."""
    kept: list[int] = []
    for i in ids:
      if i in (0, self.eos_id):
        break
      if i < self.size:
        kept.append(int(i))
    return self.processor.decode(kept)


def load(
  checkpoint: str | os.PathLike[str],
) -> tuple[T5Config, dict[str, jax.Array]]:
  """Opens a model: returns its sizes, and its parameters in float32."""
  source = open_checkpoint(checkpoint)
  config = identity.config(source)
  base = structure.parameters(network.Transformer(config))
  everywhere = partitioning.replicated(one_device())
  structs = {
    path: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=everywhere)
    for path, x in base.items()
  }
  return config, restore(source, structs)


def one_device() -> jax.sharding.Mesh:
  """Returns a mesh of one device: the model is too small to gain from more."""
  return partitioning.make_mesh(devices=jax.devices()[:1])


def prompt_method(length: int = 20) -> Method:
  """A prompt initialised with the labels' embeddings, as in the paper."""
  fill = prompt_init.from_sampled_vocab(2000)
  return prompt.prompt(length, prompt_init.from_class_labels(fill=fill))


def prompt_optimizer(steps: int) -> optax.GradientTransformation:
  """The paper's Adafactor at 0.3; here the rate decays to 0."""
  return optim.adafactor(0, optim.schedule(0.3, 'linear', 0, steps))


def full_optimizer(steps: int) -> optax.GradientTransformation:
  """The optimizer of the models' pre-training, at a fifth of the rate."""
  return optim.relative_adam(0, optim.schedule(0.003, 'linear', 0, steps))


# ----------------------------------------------------------------------- data


def features(pieces: Pieces, rows: Sequence[Row]) -> Features:
  """Returns the model's features, padded to one length: [rows, length]."""
  eos = pieces.eos_id
  texts, labels = zip(*rows, strict=True)
  inputs = _padded([pieces.encode(text) for text in texts], eos, INPUT_LENGTH)
  targets = _padded(
    [pieces.encode(label) for label in labels], eos, ANSWER_LENGTH
  )
  return {
    'encoder_input_tokens': inputs,
    'decoder_target_tokens': targets,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': (targets > 0).astype(np.int32),
  }


def _padded(rows: list[list[int]], eos_id: int, length: int) -> np.ndarray:
  padded = np.zeros((len(rows), length), np.int32)
  for i, ids in enumerate(rows):
    ids = [*ids[: length - 1], eos_id]  # A few reviews are too long.
    padded[i, : len(ids)] = ids
  return padded


def batches(data: Features, steps: int, seed: int) -> Iterator[Features]:
  """Yields batches of epochs laid end to end, each epoch in its own order."""
  rng = np.random.default_rng(seed)
  count = len(data['encoder_input_tokens'])
  order = np.empty(0, np.int64)
  for _ in range(steps):
    while len(order) < BATCH_SIZE:
      order = np.concatenate([order, rng.permutation(count)])
    rows, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
    yield {name: x[rows] for name, x in data.items()}


# --------------------------------------------------------------------- tuning


class Tuned(NamedTuple):
  """The result of a training.

  Attributes:
    first: The trained parameters before the first step, by path.
    last: The trained parameters after the last step.
    curve: (step, accuracy on the validation rows).
    untrained: Accuracy on the test rows before the first step, if asked for.
    accuracy: Accuracy on the test rows.
    seconds: Time of the training, with compilation and validation.
  """

  first: Mapping[str, np.ndarray]
  last: Mapping[str, np.ndarray]
  curve: list[tuple[int, float]]
  untrained: float | None
  accuracy: float
  seconds: float

  @property
  def prompt(self) -> np.ndarray:
    """The prompt, [prompt, embed] float32."""
    return self.last[prompt.PATH]

  @property
  def nbytes(self) -> int:
    """Size of the trained parameters, in bytes."""
    return sum(x.nbytes for x in self.last.values())


class Programs(NamedTuple):
  """Programs compiled once, for all trainings of a method on a model."""

  plan: parameters.Plan
  tx: optax.GradientTransformation
  abstract: state_lib.TrainState
  update: Any
  right: Any


def programs(
  config: T5Config, method: Method, tx: optax.GradientTransformation
) -> Programs:
  """Prepares the programs that train a method with an optimizer."""
  plan = parameters.plan(config, method, one_device())
  model = EncoderDecoderModel(plan.network)
  abstract = state_lib.abstract_state(tx, plan)
  update = state_lib.compile_step(model, tx, plan, abstract)
  return Programs(
    plan, tx, abstract, update, jax.jit(functools.partial(right, model))
  )


class Accuracy:
  """The accuracy on rows, in the form that the loop calls."""

  split = 'validation'

  def __init__(self, made: Programs, data: Features):
    self._made, self._data = made, data

  def __call__(self, trees, step=0, asked=None):
    """Returns the share of rows that are answered correctly."""
    del step, asked
    count, total = len(self._data['encoder_input_tokens']), 0
    assert count % TEST_BATCH == 0, count
    with self._made.plan.scope():
      for i in range(0, count, TEST_BATCH):
        batch = {name: x[i : i + TEST_BATCH] for name, x in self._data.items()}
        total += int(np.sum(self._made.right(trees, batch)))
    return {'rows': {'accuracy': total / count}}


class Unsaved:
  """A run of the loop that writes nothing to disk; it shows a progress bar."""

  start, failed = 0, False

  def __init__(self, plan: parameters.Plan, steps: int, bar: 'Bar'):
    self.members = [Member('', plan, {}, lambda state: state.trainable)]
    self.train_steps, self.reports = steps, {'': bar}
    self.saving = settings.Saving(steps + 1, log_period=steps + 1)
    self.sums: dict[str, dict[str, float]] = {}
    self.profile = profiling.Profile('', None)

  def asked(self, step: int | None = None) -> bool:
    """Returns False: no signal stops it softly; Ctrl-C ends it at once."""
    del step
    return False

  def nothing(self, *args, **settings) -> None:
    """Stands in for what a run on disk would do."""

  check_directory = check_finite = save = save_best = nothing
  write_prompt = log_end = nothing

  def lost_best(self, member: Member) -> bool:
    """Returns False, because no best prompt is kept."""
    del member
    return False

  def last_good(self) -> str:
    """Returns the end of the message about a loss that is not finite."""
    return 'Nothing was saved'

  def paused(self, doing: str) -> Any:
    """Shows what the run is doing."""
    self.reports[''].show(doing)
    return contextlib.nullcontext()


class Bar:
  """Records a training's scores and shows a bar, which stays at the end."""

  def __init__(self, title: str, steps: int, bar: rich.progress.Progress):
    self.records: list[report.Record] = []
    self._bar, self._line = bar, bar.add_task(title, total=steps, shown='')

  def show(self, shown: str, step: int | None = None) -> None:
    """Changes the text after the bar."""
    self._bar.update(self._line, completed=step, shown=shown)

  def progress(self, step: int, sums: Mapping[str, float]) -> None:
    """Shows the metrics of the steps so far."""
    loss = sums['loss'] / max(sums['tokens'], 1.0)
    shown = f'loss {loss:6.3f}, {self.accuracy():6.1%} of validation correct'
    self.show(shown, step)

  def train(self, step: int, sums: Mapping[str, float]) -> None:
    """Does nothing, because `progress` has shown it already."""

  def evaluate(self, step: int, split: str, scores: Any) -> None:
    """Records the scores of all tasks."""
    for task, values in scores.items():
      self.records.append(
        {'step': step, 'split': split, 'task': task, **values}
      )

  def accuracy(self) -> float:
    """Returns the newest accuracy."""
    return self.records[-1]['accuracy']


def tune(
  title: str,
  made: Programs,
  base: Mapping[str, jax.Array],
  pieces: Pieces,
  rows: Splits,
  steps: int,
  seed: int = 0,
  console: rich.console.Console | None = None,
  test_untrained: bool = False,
) -> Tuned:
  """Trains under a progress bar, then tests.

  Args:
    title: Text before the bar.
    made: The programs.
    base: The parameters of the model, by path; they do not change.
    pieces: The vocabulary.
    rows: Rows for training, validation and test.
    steps: Training steps.
    seed: Seed of the first values and of the order of the rows.
    console: Where to show progress; nowhere if not given.
    test_untrained: Whether to test before the first step too.
  """
  start = time.monotonic()
  train, validation, test = (features(pieces, part) for part in rows)
  labels = sorted({label for _, label in rows[0]})
  trainable, frozen = initial(made.plan, base, pieces, labels, seed)
  first = _on_host(trainable)
  state = state_lib.first_state(made.tx, trainable, made.abstract)
  tested, validated = Accuracy(made, test), Accuracy(made, validation)
  accuracy = lambda of, state: of((state.trainable, frozen))['rows']['accuracy']
  with _progress(console) as progress:
    bar = Bar(title, steps, progress)
    untrained = accuracy(tested, state) if test_untrained else None
    bar.evaluate(0, 'validation', validated((state.trainable, frozen)))
    train_on = Loop(
      Unsaved(made.plan, steps, bar),
      made.update,
      frozen,
      {'': validated},
      settings.Evaluation(period=max(steps // EVALUATIONS, 1)),
    )
    state = train_on(state, enumerate(batches(train, steps, seed)))
    reached = accuracy(tested, state)
    bar.show(f'{reached:6.1%} of {len(rows[2])} test rows correct', steps)
  return Tuned(
    first,
    _on_host(state.trainable),
    [(record['step'], record['accuracy']) for record in bar.records],
    untrained,
    reached,
    time.monotonic() - start,
  )


def _on_host(tree: Any) -> dict[str, np.ndarray]:
  return jax.tree.map(np.array, parameters.flatten(tree))


def initial(
  plan: parameters.Plan,
  base: Mapping[str, jax.Array],
  pieces: Pieces,
  labels: Sequence[str],
  seed: int,
) -> tuple[Any, Any]:
  """Returns the trainable and the frozen tree before the first step."""
  added = prompt_init.initialize_adapters(
    plan,
    prompt_init.Base(
      embedding=functools.partial(parameters.embedding_rows, plan, base),
      vocabulary=lambda: pieces,
      labels=lambda: labels,
    ),
    seed,
  )
  # Copies, because the train step donates its arguments.
  copied = {path: jnp.copy(base[path]) for path in plan.trainable & plan.base}
  frozen = {path: base[path] for path in plan.frozen}
  return parameters.unflatten(copied | added), parameters.unflatten(frozen)


def _progress(console: rich.console.Console | None) -> rich.progress.Progress:
  """Returns a bar that stays at the end."""
  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description:12}'),
    rich.progress.BarColumn(bar_width=24),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn('{task.fields[shown]}'),
    rich.progress.TimeElapsedColumn(),
    console=console,
    disable=console is None,
  )


# -------------------------------------------------------------------- answers


def right(model: EncoderDecoderModel, trees, batch: Features) -> jax.Array:
  """Returns which rows the model would answer with their target: [batch] bool.

  Greedy decoding produces the target if each of its tokens is the best
  continuation of the tokens before it. One forward pass can check that.
  """
  logits = model.logits(parameters.merge(*trees), batch)
  targets = batch['decoder_target_tokens']
  same = jnp.argmax(logits, axis=-1) == targets
  return jnp.all(same | (targets == 0), axis=-1)


def bank(config: T5Config, base: Mapping[str, jax.Array]) -> PromptBank:
  """Returns the model with any prompts; it decodes greedily."""
  return PromptBank(config, base, ANSWER_LENGTH, mesh=one_device())


def answer(
  bank: PromptBank, pieces: Pieces, rows: Sequence[Row], names: Sequence[str]
) -> list[str]:
  """Returns the model's answer to each row, with the prompt of that name."""
  tokens = features(pieces, rows)['encoder_input_tokens']
  said, _ = bank.predict(names, tokens)
  return [pieces.decode(ids) for ids in said]
