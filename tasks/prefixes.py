"""Small tasks of pre-training, each told by ids that its rows start with.

A task asks for one attribute of a text and has a word of its own, drawn at
random, for each value. Its rows start with ids that tell which task it is: some
pieces of the vocabulary, drawn once for the task, and as many that only this
task has. These are no pieces but rows of the embedding beyond the vocabulary,
so that a model learns to be steered by vectors in front of its input:

    inputs   1029 1711 806 122 3140 3141 3142 3143 <text> </s>
    targets  <label> </s>

`generated` makes such tasks of generated text, examples/real_text of real text.
TensorFlow is not imported here: `pretraining.prepend_prefix` puts ids to text.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

PREFIX = 4  # Ids of each kind.
FIRST_PIECE = 259  # After the special pieces and those of bytes.


@dataclasses.dataclass(frozen=True)
class PrefixTask:
  """A task of pre-training: to name one attribute by arbitrary labels.

  Attributes:
    attribute: Which one is asked for.
    labels: The value -> the word that is to be answered.
  """

  attribute: str
  labels: dict[str, str]


def draw_tasks(
  seed: int,
  count: int,
  values: Mapping[str, Sequence[str]],
  weights: Mapping[str, int],
  words: Sequence[str],
) -> list[PrefixTask]:
  """Draws tasks: an attribute, 2 to 4 of its values, a word for each.

  Args:
    seed: Of all that is drawn.
    count: How many tasks.
    values: The values of each attribute.
    weights: How often an attribute is drawn, if not once.
    words: The labels to draw from.
  """
  rng = random.Random(f'tasks {seed}')
  attributes = list(values)
  shares = [weights.get(name, 1) for name in attributes]
  tasks = []
  for _ in range(count):
    attribute = rng.choices(attributes, shares)[0]
    known = values[attribute]
    chosen = rng.sample(known, min(rng.randint(2, 4), len(known)))
    labels = rng.sample(words, len(chosen))
    tasks.append(PrefixTask(attribute, dict(zip(chosen, labels, strict=True))))
  return tasks


def prefix_ids(
  seed: int, task: int, pieces: int, vocabulary_rows: int
) -> list[int]:
  """The ids that a task's rows start with: PREFIX pieces, as many of its own.

  Args:
    seed: Of the pieces.
    task: Its number.
    pieces: Of the vocabulary, without sentinels.
    vocabulary_rows: With them; a task's own ids are beyond.
  """
  rng = random.Random(f'prefix {seed} {task}')
  shared = [rng.randrange(FIRST_PIECE, pieces) for _ in range(PREFIX)]
  first = vocabulary_rows + task * PREFIX
  return shared + list(range(first, first + PREFIX))
