"""The commands export, import, convert, inspect and push: flags and calls.

They copy files and use neither an accelerator nor gin files.
"""

import argparse
import json
import os

from ptune.errors import UserError

COMMANDS = ('export', 'import', 'convert', 'inspect', 'push')


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
  """Adds the flags of one of these commands."""
  if command == 'inspect':
    parser.add_argument('path', help='a checkpoint, run, prompt or adapter')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument(
      '--fingerprint',
      action='store_true',
      help='read the whole base model, to compute its fingerprint',
    )
    return
  if command == 'push':
    parser.add_argument('path', help='a run, or a prompt of any kind')
    parser.add_argument('name', help='the repository on the Hub: user/name')
    parser.add_argument('--base', help='the base model, if it is not recorded')
    parser.add_argument(
      '--base_name', help="the base's name on the Hub: google/flan-t5-base"
    )
    parser.add_argument(
      '--private', action='store_true', help='make a new repository private'
    )
    parser.add_argument(
      '--task', type=int, help='index of the prompt in a multi-task run'
    )
    return
  if command == 'export':
    parser.add_argument(
      'run', nargs='?', metavar='RUN', help='a MODEL_DIR; takes its best prompt'
    )
    parser.add_argument(
      '--prompt', help='instead of RUN, a file of its prompts/, or an adapter'
    )
    parser.add_argument(
      '--format',
      default='peft',
      choices=['npy', 'peft', 't5x', 'safetensors', 'huggingface'],
      help='t5x and huggingface merge other methods than prompts into the base'
      ' (%(default)s)',
    )
    parser.add_argument(
      '--base',
      help='the model that the prompt was trained on (the one that its run'
      ' recorded)',
    )
    parser.add_argument(
      '--base_name', help="the base's name for PEFT: google/t5-v1_1-base"
    )
  else:
    parser.add_argument('path', help='the input')
  if command == 'convert':
    parser.add_argument(
      '--format', required=True, choices=['t5x', 'huggingface']
    )
    parser.add_argument(
      '--activations',
      type=lambda text: tuple(text.split(',')),
      help='MLP activations, such as gelu,linear; T5X does not store them',
    )
    parser.add_argument(
      '--vocabulary',
      help="the vocabulary for transformers (the model's own)",
    )
    parser.add_argument(
      '--base_only',
      action='store_true',
      help='leave out prompts and other adapters',
    )
  if command != 'convert':
    parser.add_argument(
      '--task',
      type=int,
      help='index of the prompt, for multi-task runs and adapters',
    )
  if command != 'import':
    parser.add_argument(
      '--step', type=int, help='the training step of a T5X checkpoint'
    )
  parser.add_argument(
    '--output',
    required=command != 'export',
    help='the output' + (' (RUN/export/FORMAT)' if command == 'export' else ''),
  )
  parser.add_argument(
    '--overwrite', action='store_true', help='replace an earlier output'
  )


def run(args: argparse.Namespace) -> None:
  """Runs the command `args.program`, and prints what it did.

  Raises:
    ValueError, OSError: Errors that users can fix.
  """
  if args.program == 'inspect':
    from ptune.convert import inspection

    found = inspection.inspect(args.path, fingerprint=args.fingerprint)
    print(json.dumps(found) if args.json else inspection.text(found))
    return
  if args.program == 'push':
    from ptune.convert.publish import push

    lines = push(
      args.path,
      args.name,
      base=args.base,
      base_name=args.base_name,
      private=args.private,
      task=args.task,
    )
    print('\n'.join(lines))
    return
  if args.program == 'convert':
    from ptune.convert.conversion import convert

    lines = convert(
      args.path,
      args.format,
      args.output,
      step=args.step,
      activations=args.activations,
      base_only=args.base_only,
      vocabulary=args.vocabulary,
      overwrite=args.overwrite,
    )
    print('\n'.join(lines))
    return
  from ptune.convert import merged
  from ptune.convert.export import export
  from ptune.convert.prompts import find, read_prompt

  if args.program == 'import':
    prompt = read_prompt(args.path, args.task)
    lines = export(prompt, 'npy', args.output, overwrite=args.overwrite)
    print('\n'.join([*prompt.notes, *lines]))
    return
  path, output = _ends(args)
  if merged.is_trained(place := find(path)):
    lines = merged.export_merged(
      place,
      args.format,
      output,
      base=args.base,
      step=args.step,
      overwrite=args.overwrite,
    )
    print('\n'.join(lines))
    return
  else:
    prompt = read_prompt(path, args.task)
    lines = export(
      prompt,
      args.format,
      output,
      base=args.base,
      base_name=args.base_name,
      step=args.step,
      overwrite=args.overwrite,
    )
  print('\n'.join([*prompt.notes, *lines]))


def _ends(args: argparse.Namespace) -> tuple[str, str]:
  """Returns the input and the output of `ptune export`."""
  path = args.run or args.prompt
  if path is None or (args.run and args.prompt):
    raise UserError(
      f'RUN is {args.run!r} and --prompt {args.prompt!r}; give one of the two'
    )
  if args.output is not None:
    return path, args.output
  if args.run is None:
    raise UserError('--prompt needs --output, the path to write')
  return path, os.path.join(args.run, 'export', args.format)
