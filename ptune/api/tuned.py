"""A trained model: ask it, measure it, save it."""

import functools
import os
import pathlib
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from absl import logging

from ptune.api import outputs, recorded
from ptune.api import rows as rows_lib
from ptune.api.base import Base
from ptune.api.recorded import Recorded
from ptune.config import flags, words
from ptune.convert import prompts, publish
from ptune.data import batches, bucketing, device_feed, padding, seqio_task
from ptune.errors import UserError
from ptune.model import frozen_weights, parameters, partitioning
from ptune.model.models import EncoderDecoderModel
from ptune.serving import predictor, trained_model
from ptune.serving.evaluation import Evaluation
from ptune.tasks.templates import columns_of, fill
from ptune.training import report
from ptune.training.settings import Trained

Row = str | Mapping[str, Any]


class Tuned:
  """A base with a prompt, or with what another method trained.

  `ptune.tune` and `ptune.load` return it. A run is read when it is needed.

  Attributes:
    base: The base model.
    directory: The MODEL_DIR of its run; None for a prompt file.
  """

  def __init__(
    self,
    base: Base,
    directory: str | os.PathLike[str] | None = None,
    prompt_file: str | os.PathLike[str] | None = None,
    temporary: bool = False,
  ):
    """Opens a run or a prompt file; see `ptune.load`."""
    self.base = base
    self.directory = None if directory is None else pathlib.Path(directory)
    self._prompt_file = prompt_file
    self._temporary = temporary
    if temporary:
      weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
    if prompt_file is not None:
      assert self._settings  # Raises if it is not for this base.

  def __repr__(self) -> str:
    what = 'a temporary run' if self._temporary else self.directory
    return f'<{what or self._prompt_file} on {self.base.path}>'

  # ------------------------------------------------------------------ asking

  @overload
  def predict(self, inputs: Row) -> str: ...
  @overload
  def predict(self, inputs: Sequence[Row]) -> list[str]: ...

  @words.in_python()
  def predict(self, inputs: Row | Sequence[Row]) -> str | list[str]:
    """Answers texts.

    Args:
      inputs: One input, or a list of them. An input is a text or a dict by
        column, as in the training rows. A text fills the template's only
        column, or is the whole input if there is no template.

    Returns:
      A list of texts, or one text for one input.

    Example:
      >>> answers = tuned.predict(['so insightful', 'so dull'])
      >>> len(answers)
      2
    """
    texts, one = self._texts(inputs)
    features = [self._encode({'inputs': text}) for text in texts]
    decode = self._task.vocabulary.decode
    answers = [
      decode(np.asarray(tokens).tolist())
      for tokens, _ in self._asked(features, self._predictor.predict)
    ]
    return answers[0] if one else answers

  @overload
  def classify(
    self, inputs: Row, labels: Sequence[str] | None = None
  ) -> dict[str, float]: ...
  @overload
  def classify(
    self, inputs: Sequence[Row], labels: Sequence[str] | None = None
  ) -> list[dict[str, float]]: ...

  @words.in_python()
  def classify(
    self, inputs: Row | Sequence[Row], labels: Sequence[str] | None = None
  ) -> dict[str, float] | list[dict[str, float]]:
    """The probability of each label; for one input they sum to 1.

    Args:
      inputs: As for `predict`.
      labels: The labels as texts. The default is the labels of the task.

    Returns:
      A list of {label: probability}, or one dict for one input.

    Raises:
      UserError: If the labels are unknown, the vocabulary cannot tell them
        apart, or they are longer than an answer.

    Example:
      >>> told = tuned.classify('so insightful', labels=['no', 'yes'])
      >>> sorted(told), round(sum(told.values()), 3)
      (['no', 'yes'], 1.0)
    """
    texts, one = self._texts(inputs)
    if labels is None:
      labels = getattr(self._task, 'labels', None)
    labels = rows_lib.check_labels(
      labels, self._task.vocabulary, self._settings.lengths['targets']
    )
    features = [
      self._encode({'inputs': text, 'targets': label})
      for text in texts
      for label in labels
    ]
    score = lambda trees, batch, rows: ((), self._predictor.score(trees, batch))
    scores = [score for _, score in self._asked(features, score)]
    found = predictor.probabilities(
      np.reshape(scores, (len(texts), len(labels)))
    )
    told = [dict(zip(labels, map(float, row), strict=True)) for row in found]
    return told[0] if one else told

  @words.in_python()
  def evaluate(self, test: Any = 'validation') -> dict[str, float]:
    """Measures the model.

    Args:
      test: Rows or a file, as for `tune`; or the name of a split of the task
        that the run trained on.

    Returns:
      The task's metrics, and `loss` and `token_accuracy` per target token.

    Example:
      >>> scores = tuned.evaluate([('so insightful', 'yes')])
      >>> sorted(scores)
      ['accuracy', 'invalid', 'loss', 'token_accuracy']
    """
    split, task = 'test', None
    if isinstance(test, str) and not flags.is_file(test):
      self._run('rows of its own')
      split, task = test, self._task
      if split not in (splits := seqio_task.splits(task)):
        raise UserError(
          f'test is {test!r}; expected {rows_lib.EXPECTED_FILE}, or a split of'
          f' the task: {", ".join(splits)}'
        )
    else:
      task = self._read(rows_lib.taken('test', test)).task
    evaluation = Evaluation(
      task,
      self._plan,
      EncoderDecoderModel(self._plan.network),
      split=split,
      feature_lengths=self._settings.lengths,
      batch_size=self._settings.batch_size,
      decoding=self._settings.decoding,
      seed=self._settings.seed,
    )
    scores = evaluation((self._params,), self.step)
    return next(iter(scores.values()))

  # ----------------------------------------------------------------- results

  @property
  def prompt(self) -> np.ndarray:
    """The prompt, [prompt, embed] float32.

    Raises:
      UserError: If the method trains no prompt.
    """
    return prompts.read_prompt(self.source).array

  @property
  def step(self) -> int:
    """The training step of this model: the best one, or the newest."""
    return self._restored[1]

  @property
  def history(self) -> list[dict[str, Any]]:
    """The records of the run, oldest first: step, split and metrics."""
    return report.read_records(self._run('history'))

  def plot(self) -> Any:
    """Draws the training loss and the scores against the step.

    Returns:
      A `matplotlib.figure.Figure`, which a notebook shows.
    """
    return report.draw(self.history)

  @words.in_python()
  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the prompt, and a .json beside it that says how it was trained.

    Args:
      path: A .npy or .safetensors file, which may exist. Other methods than
        prompts always write a .safetensors file.

    Example:
      >>> tuned.save('sst2.npy')
      >>> ptune.load('sst2.npy', base='ptune://tiny').prompt.shape[1]
      96
    """
    outputs.save(self.source, path, self.base.path)

  @words.in_python()
  def export(
    self,
    path: str | os.PathLike[str],
    format: str = 'peft',
    overwrite: bool = False,
  ) -> None:
    """Writes the model for another program, as `ptune export` does.

    Args:
      path: The directory or file to write.
      format: 'peft', 't5x', 'npy' or 'safetensors' for a prompt. Other methods
        are merged into the base: 't5x' or 'huggingface'.
      overwrite: Whether to replace an earlier output.
    """
    outputs.export(self.source, path, self.base.path, format, overwrite)

  @words.in_python()
  def push_to_hub(self, name: str, private: bool = False) -> str:
    """Uploads the prompt and a model card to the Hugging Face Hub, for PEFT.

    Args:
      name: 'user/prompt'. It is created if it does not exist.
      private: Whether only the user can see it.

    Returns:
      The address that `ptune.load` takes: 'hf://user/prompt'.
    """
    *_, address = publish.push(
      self.source, name, base=self.base.path, private=private
    )
    return address

  # ---------------------------------------------------------------- restored

  @property
  def source(self) -> str | os.PathLike[str]:
    """Its run, or its prompt file."""
    return self._prompt_file if self.directory is None else self.directory

  def _run(self, what: str) -> pathlib.Path:
    if self.directory is None:
      raise UserError(
        f'{self._prompt_file} is only a prompt and has no {what}; load the'
        ' directory of its run'
      )
    if not self.directory.is_dir():
      raise FileNotFoundError(
        f'{self.directory} does not exist any more; load the run from its new'
        ' path'
      )
    return self.directory

  def _read(self, rows: Mapping[str, Any] | None = None) -> Recorded:
    """Reads the settings of the run, with other rows if given.

    Args:
      rows: The rows of a split, by the name of the split.
    """
    if self.directory is None:
      prompt = prompts.read_prompt(self.source)
      return recorded.of_prompt(self.base, prompt, rows)
    return recorded.of_run(self.base, self.directory, rows)

  @functools.cached_property
  def _settings(self) -> Recorded:
    return self._read()

  @functools.cached_property
  def _task(self) -> Any:
    return seqio_task.load(self._settings.task, self._settings.module)

  @functools.cached_property
  def _plan(self) -> parameters.Plan:
    mesh = partitioning.make_mesh()
    return parameters.plan(self._settings.config, self._settings.method, mesh)

  @functools.cached_property
  def _restored(self) -> tuple[dict[str, Any], int]:
    if self.directory is None:
      return self._restored_prompt()
    trained = Trained(self.directory, checkpoint_path=self.base.path)
    trained_model.check(self._plan, trained)
    return trained_model.load(self._plan, trained, self.base.weights)

  def _restored_prompt(self) -> tuple[dict[str, Any], int]:
    found, plan = prompts.read_prompt(self.source), self._plan
    theirs = found.facts.get('base', self.base.fingerprint)
    if theirs != self.base.fingerprint:
      logging.warning(
        'prompt %s was trained on another base model (fingerprint %s) than %s'
        ' (%s)',
        found.path,
        theirs,
        self.base.path,
        self.base.fingerprint,
      )
    path = plan.method.prompt
    assert path is not None
    values = {path: parameters.place(found.array, plan.params[path])}
    frozen = {p: self.base.weights[p] for p in plan.frozen}
    step = int(found.facts.get('step', 0))
    return parameters.unflatten(
      values | frozen_weights.freeze(plan, frozen)
    ), step

  @property
  def _params(self) -> Mapping[str, Any]:
    return self._restored[0]

  @functools.cached_property
  def _predictor(self) -> predictor.Predictor:
    return predictor.Predictor(
      self._plan,
      EncoderDecoderModel(self._plan.network),
      self._settings.lengths['targets'],
      self._settings.decoding,
      self._settings.seed,
    )

  # ------------------------------------------------------------------- texts

  def _texts(self, inputs: Any) -> tuple[list[str], bool]:
    """The texts that the model reads, and whether there was only one input."""
    one = isinstance(inputs, str | Mapping)
    rows = [inputs]
    if not one:
      rows = rows_lib.listed('inputs', inputs, rows_lib.QUESTIONS)
    texts = [self._text(i, row) for i, row in enumerate(rows)]
    rows_lib.warn_of_odd(texts, self._settings.template)
    return texts, one

  def _text(self, number: int, row: Any) -> str:
    template = self._settings.template
    columns = columns_of(template, 'INPUTS')
    if isinstance(row, str) and len(columns) == 1:
      row = {columns[0]: row}
    if not isinstance(row, Mapping):
      raise UserError(
        f'inputs[{number}] is {row!r:.80}; expected'
        f' {"a text, or " if len(columns) == 1 else ""}a dict with the columns'
        f' {columns} of the template {template!r}'
      )
    try:
      return fill(template, row)
    except UserError as error:
      raise UserError(f'inputs[{number}]: {error}') from error

  def _encode(self, texts: Mapping[str, str]) -> batches.Batch:
    lengths = self._settings.lengths
    ids = self._settings.config.ids
    return seqio_task.encode(self._task, lengths, texts, ids)[1]

  def _asked(
    self, features: Sequence[batches.Batch], ask: Any
  ) -> Iterator[tuple[Any, Any]]:
    """The answers to the rows, in their order."""
    plan, most = self._plan, self._settings.batch_size
    found = predictor.by_row(
      padding.padded_batches(
        features,
        batch_size(len(features), most, plan.mesh),
        bucketing.BUCKET_MULTIPLE,
        self._settings.config.ids.pad,
      ),
      lambda batch: device_feed.device_put(batch, plan.mesh, plan.method.check),
      lambda batch, rows: ask((self._params,), batch, rows),
    )
    by_row = dict(found)
    return (by_row[row] for row in range(len(features)))


def batch_size(rows: int, most: int, mesh: Any) -> int:
  """The rows of a batch: a power of two, so that few shapes are compiled."""
  size = mesh.shape['data']
  while size < min(rows, most):
    size *= 2
  return min(size, max(most, mesh.shape['data']))
