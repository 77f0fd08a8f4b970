"""Prints the scores of majority and naive Bayes on the downstream tasks.

    python examples/real_text/baselines.py

It uses the same environment variables as `real_text_tasks`. One naive Bayes is
trained on SST-2, like the prompts. Another is trained on the corpus's praise
and complaints, which shows how much pre-training can learn.
"""

import os
import pathlib

import corpus_rows
import naive_bayes


def read(directory: str, split: str) -> list[tuple[str, bool]]:
  """Returns the rows of a split: sentences, and whether they are positive."""
  text = pathlib.Path(directory, f'{split}.tsv').read_text()
  rows = [line.split('\t') for line in text.splitlines()[1:]]
  return [(sentence, label == '1') for sentence, label in rows]


def right(rows, answer) -> float:
  """Returns the percentage of rows whose label is `answer(text)`."""
  return 100 * sum(answer(text) == label for text, label in rows) / len(rows)


def main() -> None:
  """Prints a table."""
  train = read(os.environ['SST2'], 'train')
  known = corpus_rows.texts(os.environ['CORPUS'], os.environ['WITHHELD'])
  polar = [(t.text, t.polarity == 'praise') for t in known if t.polarity]
  common = sum(label for _, label in train) > len(train) / 2
  answers = {'majority': lambda text: common}
  for name, rows in (('SST-2', train), ('the corpus', polar)):
    weights = naive_bayes.fit(rows)
    answers[f'naive Bayes of {name}'] = lambda text, weights=weights: (
      naive_bayes.log_odds(weights, text) > 0
    )
  for variable in ('SST2', 'CUSTOMER_REVIEWS'):
    for split in ('validation', 'test'):
      rows = read(os.environ[variable], split)
      for name, answer in answers.items():
        print(f'{variable:16} {split:10} {name:26} {right(rows, answer):.1f}')


if __name__ == '__main__':
  main()
