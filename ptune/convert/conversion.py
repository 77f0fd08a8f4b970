"""`ptune convert`: whole models, from any layout to T5X's or Hugging Face's.

Values are copied bit by bit, and transposed where torch needs it.
"""

from etils import epath

from ptune.convert import identity, open_checkpoint, output
from ptune.convert.source import Source
from ptune.convert.tokenizer_files import write_vocabulary
from ptune.errors import UserError
from ptune.model.sizes import TokenIds

# An output directory that is replaced must contain one of these.
MARKS = {'t5x': ('checkpoint',), 'huggingface': ('config.json',)}


def convert(
  path: epath.PathLike,
  layout: str,
  directory: epath.PathLike,
  *,
  step: int | None = None,
  activations: tuple[str, ...] | None = None,
  base_only: bool = False,
  overwrite: bool = False,
  vocabulary: epath.PathLike | None = None,
) -> list[str]:
  """Writes a model in another layout; holds one array at a time.

  Args:
    path: As for `open_checkpoint`.
    layout: 't5x' (the older layout, which T5X reads with any setting) or
      'huggingface'.
    directory: The directory to write.
    step: The training step; the checkpoint's if not given. Adafactor's decay
      continues from it.
    activations: MLP activations, if the files do not say them and they differ
      from those of the published models.
    base_only: Whether to leave out prompts and other adapters.
    overwrite: Whether to replace an earlier output.
    vocabulary: The vocabulary to write for transformers; the one beside the
      model if not given.

  Returns:
    Lines of text that report the result.

  Raises:
    ValueError: The model is not complete, a value is NaN or infinite, or the
      output exists.
  """
  target = output.check(
    directory, overwrite, MARKS[layout], inputs=(str(path),)
  )
  source = open_checkpoint(path)
  config = identity.config(
    source, **({'mlp_activations': activations} if activations else {})
  )
  _check_activations(source, activations)
  identity.check_whole(source, config)
  if layout == 't5x':
    identity.check_t5x(source, config)
  leaves = identity.base_leaves(source)
  beyond = sorted(source.leaves.keys() - leaves.keys())
  if beyond and not base_only:
    raise UserError(
      f'{path} holds more than the model, and the other layout has no place for'
      ' it:\n'
      + '\n'.join(f'  {name}' for name in beyond)
      + '\nConvert a prompt with ptune import, and leave it out here with '
      '--base_only'
    )
  step = source.step if step is None else step
  checksums = identity.Checksums()
  read = {name: checksums.reading(name, x) for name, x in leaves.items()}
  written_vocabulary: list[str] = []
  with output.new_directory(target) as temporary:
    if layout == 't5x':
      from ptune.convert.t5x import write_t5x

      write_t5x(temporary, read, step or 0)
    else:
      from ptune.convert.huggingface import write_huggingface

      write_huggingface(temporary, read, config, step)
      written_vocabulary = write_vocabulary(
        temporary, vocabulary or path, config.vocab_size, config.ids.pad
      )
    # Check its names and shapes again before anything is replaced.
    written = open_checkpoint(temporary)
    assert written.shapes == {name: x.shape for name, x in leaves.items()}
  lines = [f'read {source.describe()}', f'base {checksums.digest()}']
  told = source.activations or source.config
  if layout == 'huggingface' and told is None:
    lines.append(
      f'took mlp_activations {config.mlp_activations}, because the input does'
      ' not say them; --activations sets others'
    )
  if layout == 't5x' and config.ids != TokenIds():
    lines.append(
      f'T5X stores no special tokens, and this model has {config.ids}: choose'
      ' its file of models/, or set sizes.t5.ids'
    )
  if layout == 't5x' and step is None:
    lines.append('the step was taken as 0; set it with --step=N')
  return [*lines, *written_vocabulary, f'wrote {target}']


def _check_activations(
  source: Source, activations: tuple[str, ...] | None
) -> None:
  said = source.activations
  if activations and said and activations != said:
    raise UserError(
      f'--activations={",".join(activations)}, but the {source.where} says'
      f' {",".join(said)}'
    )
