"""Small pre-training tasks; the first ids of a row say which task it is.

A task asks for one attribute of a text. It has its own word, drawn at random,
for each value of the attribute. Its rows start with ids that identify the task:
some pieces of the vocabulary, drawn once for the task, and as many ids that
only this task uses. The latter are not pieces but rows of the embedding beyond
the vocabulary. So the model learns to follow vectors in front of its input:

    inputs   1029 1711 806 122 3140 3141 3142 3143 <text> </s>
    targets  <label> </s>

`generated` makes such tasks of generated text, examples/real_text of real text.
This module does not import TensorFlow; `pretraining.prepend_prefix` adds the
ids to a text.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

PREFIX = 4  # Number of ids of each kind.
FIRST_PIECE = 259  # After the special pieces and the byte pieces.


@dataclasses.dataclass(frozen=True)
class PrefixTask:
  """A pre-training task: name one attribute with arbitrary labels.

  Attributes:
    attribute: The attribute that the task asks for.
    labels: The attribute's value -> the word that answers it.
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
    seed: Seed of everything that is drawn.
    count: How many tasks.
    values: The values of each attribute.
    weights: How often an attribute is drawn; the default is 1.
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
  """Returns the ids that a task's rows start with: PREFIX of each kind.

  Args:
    seed: Seed of the pieces.
    task: The task's number.
    pieces: Pieces in the vocabulary, without sentinels.
    vocabulary_rows: Pieces with sentinels; a task's own ids come after them.
  """
  rng = random.Random(f'prefix {seed} {task}')
  shared = [rng.randrange(FIRST_PIECE, pieces) for _ in range(PREFIX)]
  first = vocabulary_rows + task * PREFIX
  return shared + list(range(first, first + PREFIX))
