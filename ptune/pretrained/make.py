"""Makes one of ptune's models: pre-trains it and writes it for the package.

    python -m ptune.pretrained.make --model=tiny --output=models/tiny

trains with runs/pretrain_generated.gin. If you interrupt it, the same command
resumes it. It then removes the embedding rows of pre-training tasks, and writes
config.json and model.safetensors in bfloat16.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax.numpy as jnp
from etils import epath

from ptune.convert import identity, open_checkpoint
from ptune.convert.huggingface import write_huggingface
from ptune.convert.source import EMBEDDING, LOGITS, Leaf

STEPS = 3000


def train(
  model: str,
  work_dir: str,
  steps: int,
  seed: int,
  embedding_rows: int,
  bindings: Sequence[str] = (),
) -> None:
  """Pre-trains with `ptune train` in a separate process.

  Raises:
    subprocess.CalledProcessError: It failed and has printed why.
  """
  settings = {
    'MODEL_DIR': repr(work_dir),
    'TRAIN_STEPS': steps,
    'RANDOM_SEED': seed,
    'EVAL_STEPS': 4,
    'sizes.t5.vocab_size': embedding_rows,
  }
  command = [
    *(sys.executable, '-m', 'ptune.cli', 'train'),
    f'--gin_file=models/{model}.gin',
    '--gin_file=runs/pretrain_generated.gin',
    *(f'--gin.{name}={value}' for name, value in settings.items()),
    *(f'--gin.{binding}' for binding in bindings),
  ]
  subprocess.run(command, check=True)


def export(checkpoint: str, output: str, vocab_size: int) -> None:
  """Writes a checkpoint as a Hugging Face directory, in bfloat16.

  Args:
    checkpoint: A MODEL_DIR of full tuning, or any checkpoint.
    output: The directory to write.
    vocab_size: Rows of the embedding, and columns of the output layer, to keep.
  """
  source = open_checkpoint(checkpoint)
  config = identity.config(source, vocab_size=vocab_size)
  leaves = {}
  for path, leaf in source.leaves.items():
    value = leaf.read().astype(jnp.bfloat16)
    if path == EMBEDDING:
      value = value[:vocab_size]
    elif path == LOGITS:
      value = value[:, :vocab_size]
    leaves[path] = Leaf(value.shape, value.dtype, value.__getitem__)
  directory = epath.Path(output)
  directory.mkdir(parents=True, exist_ok=True)
  # Without the step, because Adafactor's decay would be that of a long run.
  write_huggingface(directory, leaves, config)


def make_vocabulary(output: str) -> None:
  """Trains the SentencePiece vocabulary that all the models share."""
  from ptune.tasks import generated, generated_text, vocabulary

  with tempfile.TemporaryDirectory() as scratch:
    text = pathlib.Path(scratch, 'text.txt')
    lines = generated_text.vocabulary_text(generated.SEED, 40_000)
    text.write_text('\n'.join([*lines, '']))
    vocabulary.train_vocabulary([str(text)], generated.PIECES, output)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m ptune.pretrained.make', description=__doc__
  )
  parser.add_argument('--model', default='tiny', help='a file of gin/models/')
  parser.add_argument('--output', required=True, help='directory to write')
  parser.add_argument(
    '--work_dir', help='the MODEL_DIR of the training (default: OUTPUT.run)'
  )
  parser.add_argument('--steps', type=int, default=STEPS)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--gin_bindings', action='append', default=[], help='more settings'
  )
  args = parser.parse_args(argv)
  from ptune.tasks import generated  # Slow, because it imports TensorFlow.

  work_dir = args.work_dir or f'{args.output.rstrip("/")}.run'
  try:
    train(
      args.model,
      work_dir,
      args.steps,
      args.seed,
      generated.EMBEDDING_ROWS,
      args.gin_bindings,
    )
  except subprocess.CalledProcessError as error:
    return error.returncode
  if (step := open_checkpoint(work_dir).step or 0) < args.steps:
    print(
      f'stopped at step {step}; run the same command to continue',
      file=sys.stderr,
    )
    return 1
  export(work_dir, args.output, generated.VOCABULARY_ROWS)
  written = open_checkpoint(args.output)
  print(f'{written.describe()}\nfingerprint {identity.fingerprint(written)}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
