"""Selects the best prompt by one number from the scores of an evaluation."""

from collections.abc import Mapping, Sequence

import numpy as np

from ptune.errors import UserError
from ptune.training import report

# Metrics of ptune's own; with a minus in front, the lowest is chosen.
LOWER_IS_BETTER = ('loss', 'invalid')


def score(
  best_metric: str | None, scores: Mapping[str, Mapping[str, float]]
) -> float:
  """The number to maximise, computed from the metrics of all tasks.

  Raises:
    UserError: If `best_metric` is not one of the metrics.
  """
  if best_metric in LOWER_IS_BETTER:
    raise UserError(
      f'BEST_METRIC is {best_metric!r}, and its highest value is the worst;'
      f" write '-{best_metric}'"
    )
  if best_metric is not None:
    name, sign = best_metric.removeprefix('-'), 1.0
    if name != best_metric:
      sign = -1.0
    found = [s[name] for s in scores.values() if name in s]
    if not found:
      known = sorted({k for s in scores.values() for k in s})
      raise UserError(
        f'BEST_METRIC {best_metric!r} is not among the metrics {known}'
      )
    return sign * float(np.mean(found))
  own = [
    value
    for values in scores.values()
    for name, value in values.items()
    if name not in ('loss', 'token_accuracy', 'invalid')
  ]
  if own:
    return float(np.mean(own))
  return -float(np.mean([s['loss'] for s in scores.values()]))


def is_best(
  records: Sequence[report.Record],
  best_metric: str | None,
  scores: Mapping[str, Mapping[str, float]],
) -> bool:
  """Whether the scores are better than all recorded ones."""
  return score(best_metric, scores) > max(
    history(records, best_metric), default=-np.inf
  )


def patience_is_over(
  records: Sequence[report.Record],
  best_metric: str | None,
  evaluations: int | None,
) -> bool:
  """Whether the last `evaluations` evaluations brought no better score."""
  values = history(records, best_metric)
  if evaluations is None or not values:
    return False
  return len(values) - 1 - int(np.argmax(values)) >= evaluations


def history(
  records: Sequence[report.Record], best_metric: str | None
) -> list[float]:
  """The score of each evaluation; NaN counts as -infinity."""
  values = [
    score(best_metric, report.scores_at(records, step))
    for step in report.evaluated_steps(records)
  ]
  return [-np.inf if np.isnan(value) else value for value in values]
