"""The models that come with ptune; README.md in this directory describes them.

On the command line a model is `ptune://NAME`, for example

    --gin_file=models/tiny.gin --gin.INITIAL_CHECKPOINT_PATH="'ptune://tiny'"

Each is a directory that Hugging Face's transformers can open: config.json and
model.safetensors. All share one SentencePiece vocabulary.
"""

import pathlib

from ptune.errors import UserError

SCHEME = 'ptune://'
DIRECTORY = pathlib.Path(__file__).parent
VOCABULARY = DIRECTORY / 'vocab.model'


def names() -> list[str]:
  """Returns the names of the models in the package."""
  return sorted(file.parent.name for file in DIRECTORY.glob('*/config.json'))


def directory(name: str) -> pathlib.Path:
  """Returns the directory of a model.

  Args:
    name: `tiny`, or `ptune://tiny`.

  Raises:
    ValueError: If there is no such model; the error lists the models.
  """
  name = name.removeprefix(SCHEME).strip('/')
  if name not in names():
    raise UserError(
      f'{SCHEME}{name} does not come with ptune; there is'
      f' {", ".join(SCHEME + known for known in names())}. Make others with'
      ' python -m ptune.pretrained.make'
    )
  return DIRECTORY / name
