"""`ptune serve`: serves one frozen model with many prompts over HTTP.

    ptune serve runs/sst2 runs/rte
    ptune serve --base=ptune://tiny --prompts=sst2=/runs/sst2,rte=rte.npy

docs/serving.md describes the interface and the limits.
"""

import argparse
import datetime
import itertools
import json
import logging
import os
import pathlib
import signal
from collections.abc import Mapping
from typing import Any

from absl import logging as absl_logging

from ptune.errors import UserError
from ptune.host import paths

TOKEN = 'PTUNE_SERVE_TOKEN'


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `ptune serve`."""
  del command
  add = parser.add_argument
  add(
    'runs',
    nargs='*',
    metavar='RUN',
    help='runs of ptune train; the name of each directory names its prompt',
  )
  add(
    '--base',
    help='the frozen model: ptune://tiny, or a checkpoint of T5X, Hugging Face'
    ' or ptune (default: the base model of the runs)',
  )
  add(
    '--prompts',
    metavar='NAME=PATH,...',
    help='files, runs or a directory of .npy files; more can be uploaded later',
  )
  add(
    '--vocabulary',
    help='a SentencePiece file, needed if the directory of the base has none',
  )
  add('--host', default='127.0.0.1', help='address to listen on (%(default)s)')
  add(
    '--allowed_hosts',
    metavar='NAME,...',
    default='',
    help='host names to answer to, besides --host; * for all',
  )
  add(
    '--port', type=int, default=8000, help='0 for any free port (%(default)s)'
  )
  add(
    '--token_file',
    help='a file with the token that allows changing prompts; or set'
    f' ${TOKEN} to the token',
  )
  add('--dtype', default='float32', help='float32 or bfloat16 (%(default)s)')
  add(
    '--model_parallel',
    type=int,
    default=1,
    help='number of devices that share one copy of the weights (%(default)s)',
  )
  for name, default, what in (
    ('input_length', None, "most tokens of an input (the runs', or 128)"),
    ('output_length', None, "most tokens of an answer (the runs', or 32)"),
    ('prompt_length', 128, 'most tokens of an uploaded prompt'),
    ('batch_size', 32, 'most rows in a batch'),
    ('max_queue', 512, 'most inputs in the queue'),
    ('max_body', 8_000_000, 'most bytes of a request'),
  ):
    what += '' if default is None else ' (%(default)s)'
    add(f'--{name}', type=int, default=default, help=what)
  for name, default, what in (
    ('max_wait', 0.005, 'seconds that an input waits for others'),
    ('timeout', 30.0, 'seconds after which a request fails'),
  ):
    add(f'--{name}', type=float, default=default, help=f'{what} (%(default)s)')


def run(args: argparse.Namespace) -> int:
  """Serves until SIGTERM or Ctrl-C; then answers all pending requests.

  Raises:
    ValueError: If a flag, the base or a prompt is wrong.
    OSError: If the port is taken.
  """
  try:
    import uvicorn

    from ptune.serving import web
  except ModuleNotFoundError as error:
    raise UserError(
      f'{error}; it comes with pip install "ptune[serve]"'
    ) from error
  take_from_runs(args)
  # Check the port before loading the model, which may take minutes. Close it
  # again, so that no client waits while the model loads.
  listen(args.host, args.port).close()
  app = make(args, web)
  # uvicorn raises the signal that stopped it again when it is done.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
  config = uvicorn.Config(
    app,
    access_log=False,
    log_config=None,
    timeout_graceful_shutdown=int(args.timeout) + 5,
  )
  sockets = [listen(args.host, args.port)]
  host, port = sockets[0].getsockname()[:2]
  logging.getLogger('uvicorn').setLevel(logging.WARNING)
  print(f'http://{host}:{port}', flush=True)
  server = uvicorn.Server(config)
  server.run(sockets)
  print('stopped; all requests were answered', flush=True)
  return 0


def take_from_runs(args: argparse.Namespace) -> None:
  """Fills in flags that were not given from the records of the runs.

  Raises:
    ValueError: If a run does not exist, or the runs have different bases.
  """
  from ptune.training import run_file

  records = {run: run_file.read(run) for run in args.runs}
  if missing := [run for run, record in records.items() if not record]:
    raise UserError(
      f'{", ".join(missing)}: no run of ptune train, because {run_file.FILE} is'
      ' not there. For prompt files use --prompts'
    )
  bases = {run: r['initial_checkpoint_path'] for run, r in records.items()}
  if args.base is None and len({*bases.values()}) != 1:
    raise UserError(
      f'--base is needed: the runs have the bases {bases}'
      if bases
      else '--base is needed, the frozen model, or a run of ptune train'
    )
  args.base = args.base or bases[args.runs[0]]
  args.prompts = ','.join([*args.runs, *filter(None, [args.prompts])]) or None
  for name, feature, default in (
    ('input_length', 'inputs', 128),
    ('output_length', 'targets', 32),
  ):
    if getattr(args, name) is None:
      lengths = [r['task_feature_lengths'][feature] for r in records.values()]
      setattr(args, name, max(lengths, default=default))


def listen(host: str, port: int) -> Any:
  """Opens a listening socket.

  Raises:
    OSError: If the address or port cannot be used.
  """
  import socket

  if not 0 <= port <= 65535:
    raise UserError(f'--port is {port}; expected 0 to 65535')
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family, backlog=2048)
  except OSError as error:
    raise OSError(
      f'cannot listen on --host {host} --port {port}: {error.strerror};'
      ' choose another port'
    ) from error


def _read_token(file: str) -> str:
  """Reads the token in --token_file."""
  try:
    path = pathlib.Path(paths.check_file(file, '--token_file'))
    token = path.read_text('utf-8').strip()
  except UnicodeDecodeError as error:
    raise UserError(f'--token_file {file} is not UTF-8: {error}') from error
  if not token:
    raise UserError(f'--token_file {file} is empty')
  return token


def make(args: argparse.Namespace, web: Any) -> Any:
  """Makes the application: loads the model and compiles its programs."""
  from ptune.convert import identity, open_checkpoint
  from ptune.convert.vocabulary import open_vocabulary
  from ptune.errors import check_counts
  from ptune.model import partitioning
  from ptune.serving import bank as bank_lib
  from ptune.serving import hosts, trained_model
  from ptune.serving.batching import Batcher

  counts = ('input_length', 'output_length', 'prompt_length', 'batch_size')
  counts += ('max_queue', 'max_body', 'model_parallel')
  check_counts(**{f'--{name}': getattr(args, name) for name in counts})
  longest = datetime.timedelta(days=1).total_seconds()
  if not (0 <= args.max_wait <= longest and 0 < args.timeout <= longest):
    raise UserError(
      f'--max_wait is {args.max_wait} and --timeout {args.timeout}; expected'
      f' seconds up to {longest:.0f}, the timeout more than 0'
    )
  allowed = [name.strip() for name in args.allowed_hosts.split(',')]
  answered = hosts.of(args.host, filter(None, allowed))
  token = os.environ.get(TOKEN) or None
  if args.token_file is not None:
    token = _read_token(args.token_file)
  config = identity.config(open_checkpoint(args.base), dtype=args.dtype)
  vocabulary = open_vocabulary(args.vocabulary or args.base)
  if vocabulary.vocab_size > config.vocab_size:
    raise UserError(
      f'the vocabulary has {vocabulary.vocab_size} ids, and the base'
      f' {config.vocab_size}; set --vocabulary to the vocabulary of the base'
    )
  if vocabulary.eos_id != config.ids.eos:
    raise UserError(
      f'the vocabulary ends texts with the token {vocabulary.eos_id}, and the'
      f' base with {config.ids.eos}; set --vocabulary to the vocabulary of the'
      ' base'
    )
  prompts = bank_lib.parse(args.prompts) if args.prompts else {}
  bank = trained_model.load_bank(
    config,
    args.base,
    args.output_length,
    prompts,
    mesh=partitioning.make_mesh(args.model_parallel),
  )
  metrics = web.Metrics()
  batcher = Batcher(
    bank,
    args.input_length,
    args.output_length,
    args.batch_size,
    args.max_wait,
    args.max_queue,
    metrics.observe_batch,
  )
  absl_logging.info('compiling; prompts: %s', ', '.join(bank.names) or 'none')
  batcher.warm_up()
  return web.make(
    web.Service(
      bank,
      batcher,
      metrics,
      encode=lambda text: [*vocabulary.encode(text), vocabulary.eos_id],
      decode=vocabulary.decode,
      limits=web.Limits(args.prompt_length, args.max_body, args.timeout),
      token=token,
      hosts=answered,
      base=args.base,
      shown={
        name: web.Shown(*found)
        for name, path in prompts.items()
        if any(found := examples_of_run(path))
      },
    )
  )


def examples_of_run(path: str) -> tuple[list[str], list[str]]:
  """Reads labels and some inputs from a run's validation predictions.

  Args:
    path: A prompt's path: MODEL_DIR of a run, its prompts/, or a file.

  Returns:
    The distinct targets, if they are few enough to be labels, and examples of
    inputs. Both are empty if the path does not belong to an evaluated run.
  """
  place = pathlib.Path(path)
  files = [*place.glob('eval/*/predictions-*.jsonl')] or [
    *place.parent.glob('eval/*/predictions-*.jsonl')
  ]
  if not files:
    return [], []
  newest = max(files, key=lambda file: file.stat().st_mtime)
  records: list[Mapping[str, Any]] = []
  with newest.open() as lines:
    for line in itertools.islice(lines, 1000):
      records.append(json.loads(line))
  targets = sorted({str(r['targets']) for r in records if 'targets' in r})
  labels = targets if 1 < len(targets) <= min(20, len(records) // 2) else []
  inputs = [str(r['inputs']) for r in records if 'inputs' in r]
  return labels, inputs[:: max(1, len(inputs) // 6)][:6]
