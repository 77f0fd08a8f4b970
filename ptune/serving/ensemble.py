"""An ensemble: several prompts of one task, and their majority vote.

Lester et al. 2021 (arXiv 2104.08691), section 6: N prompts of one task are N
models that share all weights except the prompt. They answer in one batch that
holds every example N times. The most frequent answer wins. If several answers
have the same number of votes, the one with the highest sum of scores wins.
Table 3 of the paper compares the ensemble with the average and the best prompt.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ptune.data.padding import repeat_last
from ptune.host.files import write_atomically
from ptune.serving.bank import PromptBank
from ptune.serving.predictor import fetched

Scores = dict[str, dict[str, float]]
# The name of the vote, beside the names of the prompts.
NAME = 'ensemble'


class Votes(NamedTuple):
  """The majority's answer to each row.

  Attributes:
    tokens: [rows, length] the winning answers.
    scores: [rows] their mean score over the members that gave them.
    count: [rows] the number of these members.
  """

  tokens: np.ndarray
  scores: np.ndarray
  count: np.ndarray


def vote(tokens: np.ndarray, scores: np.ndarray) -> Votes:
  """Returns the majority's answer to each row.

  Args:
    tokens: [members, rows, length] the answers of each member.
    scores: [members, rows] their scores.
  """
  same = np.all(tokens[:, None] == tokens[None], axis=-1)
  count = np.sum(same, axis=1)  # [members, rows]
  summed = np.sum(same * scores[None], axis=1)
  # lexsort's last key has priority; among equals the first member wins.
  winner = np.lexsort((-summed, -count), axis=0)[:1]
  pick = lambda x: np.take_along_axis(x, winner, axis=0)[0]
  return Votes(
    np.take_along_axis(tokens, winner[..., None], axis=0)[0],
    pick(summed) / pick(count),
    pick(count),
  )


class Asked(NamedTuple):
  """The results of all members on a data set, with its rows in any order.

  Attributes:
    rows: [rows] the numbers of the rows.
    tokens: [members, rows, length] the answers; None if targets were scored.
    scores: [members, rows] the scores of the answers or of the targets.
  """

  rows: list[int]
  tokens: np.ndarray | None
  scores: np.ndarray


def evaluate(
  evaluation: Any, bank: PromptBank, names: Sequence[str]
) -> tuple[dict[str, Scores], dict[str, Asked]]:
  """Computes the metrics of every prompt and of their vote.

  For a metric of scores, the ensemble's score is the mean over the members.

  Args:
    evaluation: The `Evaluation` of the task.
    bank: The prompts and the model.
    names: The members.

  Returns:
    The metrics by task, for each member and for `NAME`, the vote. And the
    answers of all members by task, for tasks with generated answers.
  """
  kept: dict[tuple[int, bool], Asked] = {}

  def asked(dataset, answers: bool) -> Asked:
    key = (id(dataset), answers)
    if key not in kept:
      kept[key] = _ask(evaluation, bank, names, dataset, answers)
    return kept[key]

  def measure(name: str, predicted, scored) -> Scores:
    def predict(dataset):
      found = asked(dataset, True)
      tokens, scores = predicted(found)
      pairs = zip(found.rows, tokens, strict=True)
      return list(pairs), {'scores': scores.tolist()}

    def score(dataset):
      found = asked(dataset, False)
      return list(zip(found.rows, scored(found).tolist(), strict=True))

    return evaluation.metrics(name, predict, score)

  scores: dict[str, Scores] = {}
  for i, name in enumerate(names):
    own = measure(
      name,
      lambda found, i=i: (found.tokens[i], found.scores[i]),
      lambda found, i=i: found.scores[i],
    )
    losses = evaluation.losses(bank.trees([name] * evaluation.batch_size))
    scores[name] = {task: own[task] | losses[task] for task in losses}
  scores[NAME] = measure(
    NAME,
    lambda found: vote(found.tokens, found.scores)[:2],
    lambda found: np.mean(found.scores, axis=0),
  )
  answers = {
    task: kept[id(dataset), True]
    for task, dataset in evaluation.datasets.items()
    if (id(dataset), True) in kept
  }
  return scores, answers


def report(
  evaluation: Any,
  bank: PromptBank,
  decode: Callable[[list[int]], Any],
  tell: Callable[[dict[str, Any], dict[str, float]], None],
  directory: epath.Path,
) -> Scores:
  """Evaluates all prompts of a bank; reports and writes the results.

  Args:
    evaluation: See `evaluate`.
    bank: The prompts and the model.
    decode: Turns tokens into a text.
    tell: Called with a description of the metrics, and the metrics.
    directory: `<task>/votes.jsonl` is written below it.

  Returns:
    The metrics of the vote, by task.
  """
  names = bank.names
  scores, answered = evaluate(evaluation, bank, names)
  for task in evaluation.datasets:
    about = {'split': evaluation.split, 'task': task}
    for name in names:
      tell({**about, 'prompt': name}, scores[name][task])
    for which, values in summary(scores, task).items():
      tell({**about, 'prompts': which}, values)
  for task, found in answered.items():
    lines = [
      json.dumps(record, ensure_ascii=False)
      for record in records(found, names, decode)
    ]
    if jax.process_index() == 0:
      folder = directory / task
      folder.mkdir(parents=True, exist_ok=True)
      write_atomically(folder / 'votes.jsonl', '\n'.join([*lines, '']))
  return scores[NAME]


def _ask(
  evaluation: Any,
  bank: PromptBank,
  names: Sequence[str],
  dataset: Any,
  predicts: bool,
) -> Asked:
  """Gets every member's answers, or their scores of the targets."""
  members = len(names)

  def ask():
    for which, batch in evaluation.batches(dataset, copies=members):
      size = len(batch['encoder_input_tokens']) // members
      trees = bank.trees(np.repeat(names, size).tolist())
      if predicts:
        numbers = np.tile(repeat_last(which, size), members)
        yield which, bank.predictor.predict(trees, batch, numbers)
      else:
        yield which, (None, bank.predictor.score(trees, batch))

  rows, tokens, scores = [], [], []
  for which, (said, values) in fetched(ask()):
    rows.extend(which.tolist())
    scores.append(values.reshape(members, -1)[:, : len(which)])
    if predicts:
      tokens.append(said.reshape(members, -1, said.shape[-1])[:, : len(which)])
  whole = lambda parts: np.concatenate(parts, axis=1)
  return Asked(rows, whole(tokens) if predicts else None, whole(scores))


def summary(scores: Mapping[str, Scores], task: str) -> dict[str, Any]:
  """Average, best and ensemble of a task's metrics, as in the paper's table 3.

  Returns:
    {'average': metrics, 'best': metrics, 'ensemble': metrics}. The best is
    taken for each metric by itself. Average and best hold only the metrics that
    every member has, because a task may omit a metric without meaning.
  """
  members = [found[task] for name, found in scores.items() if name != NAME]
  shared = [key for key in members[0] if all(key in own for own in members)]
  each = {key: [own[key] for own in members] for key in shared}
  best = lambda key: min if key in ('loss', 'invalid') else max
  return {
    'average': {key: float(np.mean(values)) for key, values in each.items()},
    'best': {key: best(key)(values) for key, values in each.items()},
    NAME: scores[NAME].get(task, {}),
  }


def records(
  found: Asked, names: Sequence[str], decode: Callable[[list[int]], Any]
) -> list[dict[str, Any]]:
  """For each row, in order: the vote, and the answer of each member."""
  votes = vote(found.tokens, found.scores)
  table = []
  for i in np.argsort(found.rows):
    members = {
      name: {
        'prediction': decode(found.tokens[m, i].tolist()),
        'score': float(found.scores[m, i]),
      }
      for m, name in enumerate(names)
    }
    table.append(
      {
        'index': found.rows[i],
        'prediction': decode(votes.tokens[i].tolist()),
        'score': float(votes.scores[i]),
        'votes': int(votes.count[i]),
        'members': members,
      }
    )
  return table
