"""Gin files and --gin flags: how they are found, read and checked.

What gin would take without a word (a macro that nothing reads, a file that
overrides another by its place in the command) is refused here, and what gin
says of the rest is made one line that names the nearest right thing.
"""

import ast
import contextlib
import inspect
import os
import pathlib
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ptune.errors import UserError, nearest

# The macros that ptune's files read: what each is, and an example, whose type
# the value must have.
MACROS = {
  'BATCH_SIZE': ('examples a step', '32'),
  'BEST_METRIC': ('what chooses the best prompt', "'accuracy'"),
  'BUCKET_MULTIPLE': ('lengths are padded to a multiple of it', '32'),
  'CHECKPOINT_PATH': ('the base model', "'/models/t5_1_1_small'"),
  'CHECKPOINT_PERIOD': ('steps between checkpoints', '1000'),
  'CLASS_LABELS': ('labels that initialise the prompt', "['no', 'yes']"),
  'DATASET': ('of Hugging Face datasets', "'imdb'"),
  'DEFAULT_PROMPT': ('of rows that name none', "'sst2'"),
  'DROPOUT_RATE': ('dropout in training', '0.1'),
  'DTYPE': ('what activations are computed in', "'bfloat16'"),
  'EARLY_STOPPING': ('evaluations without a better score', '5'),
  'EVAL_OUTPUT_DIR': ('where an evaluation writes', "'/runs/eval'"),
  'EVAL_PERIOD': ('steps between evaluations', '1000'),
  'EVAL_SPLIT': ('the split that is evaluated', "'validation'"),
  'EVAL_STEPS': ('batches of an evaluation, None for all', '20'),
  'FROZEN_DTYPE': ('what frozen matrices are kept in', "'int8'"),
  'FSDP': ('frozen matrices split over all devices', 'True'),
  'FUSED_ATTENTION': ("an accelerator's attention, where it has one", 'True'),
  'IMPORTANCE': ('leave_one_out or gradient', "'leave_one_out'"),
  'INFER_FILE': ('one input a line, or JSON lines', "'inputs.txt'"),
  'INFER_MODE': ('predict or score', "'predict'"),
  'INFER_OUTPUT_DIR': ('where predictions are written', "'/runs/out'"),
  'INFER_SPLIT': ('the split that is predicted', "'test'"),
  'INITIAL_CHECKPOINT_PATH': ('the base model', "'/models/t5_1_1_small'"),
  'INITIAL_TEXT': ('text that initialises the prompt', "'Classify this:'"),
  'INPUTS': ('template of the inputs', "'review: {text}'"),
  'KEEP_CHECKPOINTS': ('how many are kept, None for all', '3'),
  'KEEP_PIECES': ('pieces of a pruned prompt that are not 0', '80'),
  'KEEP_ROWS': ('rows of a pruned prompt', '10'),
  'LABEL_NAMES': ('words for integer labels', "['no', 'yes']"),
  'LEARNING_RATE': ('peak learning rate', '0.3'),
  'LEARNING_RATES': ('of a sweep', '[0.1, 0.3]'),
  'LENGTHS': ('prompt lengths of a study', '[1, 5, 20, 100]'),
  'MEMBERS': ('prompts of an ensemble', '5'),
  'METHOD': ('set by a file of methods/ or prompts/', '@prompt.prompt()'),
  'METRICS': ('by name, see tasks/from_files.gin', "['accuracy']"),
  'MICROBATCHES': ('parts that a batch is computed in', '4'),
  'MIXTURE_OR_TASK_MODULE': ('registers the task', "'my_tasks'"),
  'MIXTURE_OR_TASK_NAME': ('the SeqIO task', "'my_sst2'"),
  'MODEL': ('set by a file of models/', '@sizes.t5()'),
  'MODELS': ('of a study', "['tiny', 'mini']"),
  'MODEL_DIR': ('where a run writes', "'/runs/sst2'"),
  'MODEL_PARALLEL': ('devices that hold one copy of the weights', '4'),
  'OPTIMIZER': ('set by a file of methods/', '@optim.adafactor'),
  'PACK': ('rows with room for so many of the longest examples', '4'),
  'PIECES': ('that a row is cut in to be pruned', '16'),
  'PROFILE_STEPS': ('steps traced into MODEL_DIR/profile', '5'),
  'PROMPTS': ('several prompts', "'sst2=a.npy,rte=b.npy'"),
  'PROMPT_FILE': ('a saved prompt', "'/runs/sst2/prompts/best.npy'"),
  'PROMPT_LENGTH': ('rows of the prompt', '100'),
  'RANDOM_SEED': ('of data order, initialisation, dropout', '0'),
  'RANK': ('score every label instead of writing one', 'True'),
  'REMAT': ('compute layers again in the backward pass', 'True'),
  'SCAN': ('compile one layer of each stack, and loop over them', 'True'),
  'SEEDS': ('how often a study repeats all', '3'),
  'SETTING': ('miniature or paper', "'paper'"),
  'SKIP_BAD_ROWS': ('count and list them, do not stop', 'True'),
  'SOURCE_PROMPTS': ('saved prompts of other tasks', "['mnli.npy']"),
  'SOURCE_WEIGHTS': ('of their mean', '[0.7, 0.3]'),
  'STUDIES': ('set by a file of studies/', '[@studies.sweep()]'),
  'TARGETS': ('template of the targets', "'{label}'"),
  'TARGET_TEXT': ('text that a loss draws the prompt to', "'Say yes or no:'"),
  'TASK_FEATURE_LENGTHS': ('in tokens', "{'inputs': 128, 'targets': 8}"),
  'TASK_FILES': ('a file or files for each split', "{'train': 'train.tsv'}"),
  'TASK_NAME': ('of the task made of files', "'mine'"),
  'TOGETHER': ('most trainings in one program', '8'),
  'TRAIN_STEPS': ('steps of this run', '30000'),
  'USE_CACHED_TASKS': ('read tasks cached by SeqIO', 'True'),
  'USUAL': ('the model of studies of one size', "'xl'"),
  'VOCABULARY': ('of the tasks that come with ptune', "'ptune://tiny'"),
}
# Macros that are set by choosing a file of such a directory, which sets the
# others beside them too.
CHOICES = {
  'MODEL': (('models',), ()),
  'METHOD': (('methods', 'prompts'), ('OPTIMIZER', 'LEARNING_RATE')),
}
# Read if no file and no binding sets MODEL.
DEFAULT_MODEL = 'models/from_checkpoint.gin'
KINDS = ('losses', 'methods', 'models', 'prompts', 'runs', 'studies', 'tasks')

_SETS_MACRO = re.compile(r'^([A-Za-z_]\w*)\s*=', re.MULTILINE)
_READS_MACRO = re.compile(r'%([A-Za-z_]\w*)')
_INCLUDES = re.compile(r"""^include\s+['"](.*)['"]""", re.MULTILINE)
# @configurable, configurable.parameter = value, and the head of a block.
_NAMES = re.compile(r'@([\w.]+)|^([\w.]+)\.\w+\s*=|^([\w.]+):', re.MULTILINE)

# A file with those that it includes: their texts, its own first.
Sources = dict[pathlib.Path, str]


class UsageError(UserError):
  """What is wrong with a command line."""


def own_directory() -> pathlib.Path:
  """Where ptune's own gin files lie."""
  # In a wheel `ptune.gin` lies inside the package, in a checkout beside it.
  package = pathlib.Path(__file__).resolve().parent
  inside = package / 'gin'
  return inside if inside.is_dir() else package.parent / 'gin'


def own_files(kinds: Iterable[str] = KINDS) -> list[str]:
  """The names of ptune's own files, such as 'runs/train.gin'."""
  directory = own_directory()
  return sorted(
    str(path.relative_to(directory))
    for kind in kinds
    for path in directory.glob(f'{kind}/*.gin')
  )


def find(file: str, search_paths: Iterable[str] = ()) -> pathlib.Path:
  """The gin file of a name.

  Raises:
    UsageError: If there is none; it names the nearest ones.
  """
  places = [*search_paths, '.', str(own_directory())]
  for place in places:
    path = pathlib.Path(place, os.path.expanduser(file))
    if path.is_file():
      return path.resolve()
  raise UsageError(
    f'there is no gin file {file!r} in {", ".join(places)}'
    + nearest(file, own_files())
  )


def parse(
  files: Sequence[str],
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  program: Callable[..., object] | None = None,
) -> None:
  """Reads gin files and bindings, and checks every macro.

  ptune's own files set different macros each, the user's are read after them,
  and the bindings last: the order in which the files are named makes no
  difference.

  Args:
    files: Names of gin files.
    bindings: What stands behind `--gin.`; a later one replaces an earlier one.
    search_paths: Where files are looked for, before the working directory and
      ptune's own.
    program: What is to be run; that it can be is checked if given.

  Raises:
    UsageError: If a file, name or macro is unknown, missing or not read, a
      value is none, or two files set the same macro.
  """
  import gin

  own = own_directory()
  paths = sorted({find(file, search_paths) for file in files})
  folders = [*(str(pathlib.Path(p).resolve()) for p in search_paths), str(own)]
  sources = {path: _with_includes(path, folders) for path in paths}
  texts = [text for found in sources.values() for text in found.values()]
  if _lacks('MODEL', texts, bindings):
    path = own / DEFAULT_MODEL
    sources[path] = _with_includes(path, folders)
    texts += sources[path].values()
  ours = {p: s for p, s in sources.items() if p.is_relative_to(own)}
  yours = {p: s for p, s in sources.items() if p not in ours}
  for group in (ours, yours):
    _check_one_sets_each(group, own)
  _check_known(yours, bindings, '\n'.join([*texts, *bindings]))
  for folder in folders:
    gin.add_config_file_search_path(folder)
  # Not among Python's packages, of which gin takes a directory runs/ for one,
  # and fails: `_with_includes` has found all files.
  gin.config._FILE_READERS[:] = [(open, os.path.isfile)]
  for path in [*ours, *yours]:
    with _one_line(texts):
      gin.parse_config_file(str(path))
  for binding in bindings:
    with _one_line(texts, binding):
      gin.parse_config(binding)
  _check_types()
  if program is not None:
    _check_needed(program)
    _check_read(bindings, '\n'.join([*texts, *bindings]))
  # Not finalised: modules of tasks, imported later, may be configurable too.


def flag(name: str) -> str:
  """A macro's flag as an example: --gin.MODEL_DIR="'/runs/sst2'"."""
  example = MACROS.get(name, ('', '...'))[1]
  plain = re.fullmatch(r'[\w.]+', example)
  return f'--gin.{name}=' + (example if plain else f'"{example}"')


def _with_includes(path: pathlib.Path, folders: Iterable[str]) -> Sources:
  found: Sources = {}
  todo = [path]
  while todo:
    path = todo.pop()
    found[path] = path.read_text()
    for file in _INCLUDES.findall(found[path]):
      places = [pathlib.Path(place, file) for place in ('.', *folders)]
      included = [place.resolve() for place in places if place.is_file()]
      if not included:
        raise UsageError(
          f'{path} includes {file!r}, which is in none of .,'
          f' {", ".join(folders)}{nearest(file, own_files())}'
        )
      if included[0] not in found:
        todo.append(included[0])
  return found


def _lacks(macro: str, texts: Iterable[str], bindings: Iterable[str]) -> bool:
  """Whether a macro is read, and nothing sets it."""
  texts = [*texts, *bindings]
  read = any(macro in _READS_MACRO.findall(text) for text in texts)
  return read and not any(macro in _SETS_MACRO.findall(text) for text in texts)


def _check_one_sets_each(
  group: Mapping[pathlib.Path, Sources], own: pathlib.Path
) -> None:
  """Refuses two files that set the same, such as two of models/."""

  def name(path):
    return str(path.relative_to(own) if path.is_relative_to(own) else path)

  set_by: dict[str, tuple[pathlib.Path, pathlib.Path]] = {}
  for path, sources in group.items():
    # A file may set anew what one that it includes sets.
    for source, text in sources.items():
      for key in _settings(text):
        other, its_source = set_by.setdefault(key, (path, source))
        if other != path and its_source != source:
          both = ' and '.join(sorted((name(path), name(other))))
          raise UsageError(f'{both} both set {key}; choose one of them')


def _settings(text: str) -> Iterator[str]:
  """What a gin file sets: macros, and parameters as `configurable.name`."""
  block = ''
  for line in text.splitlines():
    if head := re.match(r'([\w./]+):', line):
      block = f'{head[1]}.'
    elif setting := re.match(r'(\s*)([\w./]+)\s*=', line):
      yield (block if setting[1] else '') + setting[2]


def _check_known(
  yours: Mapping[pathlib.Path, Sources], bindings: Iterable[str], text: str
) -> None:
  """Refuses flags that are no bindings, and macros that are not known.

  Known are ptune's, and what the text of all files and bindings reads.
  """
  known = {*MACROS, *_READS_MACRO.findall(text)}
  for binding in bindings:
    name = re.split(r'[=:\s]', binding.strip(), maxsplit=1)[0]
    if not re.match(r'[\w./]+\s*=|.*[\n:]', binding.strip()):
      raise UsageError(
        f'--gin.{binding.strip()} has no value; expected --gin.NAME=VALUE,'
        f' such as {flag(name if name in MACROS else "TRAIN_STEPS")}'
      )
    for macro in _SETS_MACRO.findall(binding):
      if macro not in known:
        raise UsageError(f'there is no macro {macro!r}{nearest(macro, known)}')
  for sources in yours.values():
    for path, text in sources.items():
      for macro in _SETS_MACRO.findall(text):
        if macro not in known:
          raise UsageError(
            f'{path} sets {macro}, which nothing reads{nearest(macro, known)}'
          )


@contextlib.contextmanager
def _one_line(
  texts: Iterable[str], binding: str | None = None
) -> Iterator[None]:
  """Makes what gin says of a file or a binding one line, with the remedy.

  Args:
    texts: Those of all gin files, in which the nearest names are found.
    binding: If gin reads one, and not a file.
  """
  where = '' if binding is None else f'--gin.{binding}: '
  try:
    yield
  except (SyntaxError, tokenize.TokenError) as error:
    if binding is None and isinstance(error, SyntaxError):
      line = (error.text or '').strip()
      where = f'{error.filename}, line {error.lineno}: {line}: '
    raise UsageError(
      f'{where}this cannot be read. Values are written as in Python: strings'
      ' have quotes, which on a command line need others around them, as in'
      f' {flag("MODEL_DIR")}'
    ) from error
  except (ValueError, ImportError, AttributeError) as error:
    # Behind gin's message: the file and line, and the text of that line.
    message, *rest = str(error).strip().splitlines()
    if binding is None:
      where = ''.join(f'{part.strip()}: ' for part in rest)
    names = [n for t in texts for m in _NAMES.findall(t) for n in m if n]
    near = ''
    if match := re.search(r"matching (?:reference )?'@?([\w.]+)", message):
      near = nearest(match[1], names)
    if match := re.search(r"'([\w.]+)' doesn't have a parameter", message):
      parameter = message.rstrip("'.").split("'")[-1]
      near = nearest(parameter, _parameters(match[1]))
    raise UsageError(f'{where}{message.rstrip(".")}{near}') from error


def _parameters(configurable: str) -> list[str]:
  import gin

  found = gin.get_configurable(configurable)
  # Of a class gin makes a subclass, whose __init__ takes anything.
  original = found.__mro__[1] if isinstance(found, type) else found
  return list(inspect.signature(original).parameters)


def _check_types() -> None:
  """Refuses macros of another type than their example."""
  import gin

  wrong = []
  for name, (what, example) in MACROS.items():
    try:
      expected = ast.literal_eval(example)
      value = gin.query_parameter(f'{name}/macro.value')
    except (ValueError, SyntaxError):  # Set by a choice, or not set.
      continue
    if value is None or hasattr(value, 'scoped_selector'):
      continue  # What None means is the program's; a reference makes a value.
    if not _is_like(value, expected) and not (
      name == 'MIXTURE_OR_TASK_MODULE' and isinstance(value, list | tuple)
    ):
      wrong.append(f'{name} ({what}) is {value!r}; expected e.g. {example}')
  if wrong:
    raise UsageError('\n'.join(wrong))


def _is_like(value: Any, example: Any) -> bool:
  if isinstance(value, bool) or isinstance(example, bool):
    return isinstance(value, bool) and isinstance(example, bool)
  if isinstance(example, float):
    return isinstance(value, int | float)
  if isinstance(example, list):
    return isinstance(value, list | tuple)
  return isinstance(value, type(example))


def _check_needed(program: Callable[..., object]) -> None:
  """Refuses a command without its file of runs/, and macros that are not set.

  All that are missing are named.
  """
  import gin

  module = program.__module__.rpartition('.')[2]
  try:
    bound = gin.get_bindings(program, resolve_references=False)
  except ValueError:  # No file has named it.
    bound = {}
  if not bound:
    files = [f for f in own_files(['runs']) if _mentions(f, f'{module}.')]
    raise UsageError(
      'the gin files do not say what to run; add'
      f' --gin_file={" or --gin_file=".join(files)}'
    )
  config = gin.config_str()
  missing = set(_READS_MACRO.findall(config)) - set(_SETS_MACRO.findall(config))
  lines = []
  for name, (kinds, others) in CHOICES.items():
    if name in missing:
      missing -= {name, *others}
      files = ', '.join(own_files(kinds))
      lines.append(f'{name}, by a --gin_file: one of {files}, or your own')
  for name in sorted(missing):
    what = MACROS[name][0] if name in MACROS else 'read by your gin files'
    lines.append(f'{name} ({what}), for example {flag(name)}')
  if lines:
    raise UsageError('to be set: ' + '\n  and '.join(lines))


def _mentions(file: str, text: str) -> bool:
  return text in (own_directory() / file).read_text()


def _check_read(bindings: Iterable[str], text: str) -> None:
  """Refuses macros on the command line that have no effect."""
  read = set(_READS_MACRO.findall(text))
  for binding in bindings:
    for name in _SETS_MACRO.findall(binding):
      if name in read:
        continue
      readers = [f for f in own_files() if _mentions(f, f'%{name}\n')]
      raise UsageError(
        f'--gin.{name} has no effect: the gin files do not read it'
        + (f'; {" and ".join(readers)} would' if readers else '')
        + nearest(name, read, most=0)
      )
