"""Writes predictions as JSON lines, and the tables of a classification."""

import os
from collections.abc import Iterable
from typing import Any

from etils import epath

from ptune.host.files import write_atomically
from ptune.serving import classes
from ptune.tasks import metrics as task_metrics
from ptune.training import report as report_lib


def write(
  directory: os.PathLike[str] | str,
  task_name: str,
  step: int | str,
  records: Iterable[dict[str, Any]],
) -> None:
  """Writes `<task>/predictions-<step>.jsonl`, and the files of `classes`.

  Args:
    directory: The files are written below it.
    task_name: The name of the task.
    step: The step of the predictions.
    records: For each example, its texts and the `target` and `prediction` that
      metrics compare. A record whose prediction is a text or a number gets the
      key `right`; a numeric label also gets `prediction_name`.
  """
  place = epath.Path(directory) / task_name
  place.mkdir(parents=True, exist_ok=True)
  records = list(records)
  names = {
    r['target']: classes.name(r)
    for r in records
    if isinstance(r.get('target'), int) and r['target'] >= 0 and 'targets' in r
  }
  lines = []
  for record in records:
    # Only labels, numbers and texts are simply right or wrong.
    if isinstance(record.get('prediction'), str | int | float):
      right = task_metrics.is_right(record.get('target'), record['prediction'])
      record = {**record, 'right': right}
      if record['prediction'] in names:
        record['prediction_name'] = names[record['prediction']]
    lines.append(report_lib.to_json(record))
  write_atomically(place / f'predictions-{step}.jsonl', '\n'.join([*lines, '']))
  classes.write(place, step, records)
