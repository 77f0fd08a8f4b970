"""Creates, installs, watches and deletes Cloud TPU VMs for a run of ptune.

    python launch/tpu_vm.py train my-tpu --zone=us-west4-a --spot \\
      --accelerator_type=v5litepod-8 -- ptune train --gin_file=...

`train` does everything: it creates the TPU, installs this checkout, starts the
command on every worker, and watches it. If the TPU is preempted, it creates
another and starts the same command, which resumes from the last checkpoint.
When the run says that it is finished, it deletes the TPU, unless --keep is
given. The other commands are single steps: create, install, run, logs, status,
stop, delete.

MODEL_DIR and INITIAL_CHECKPOINT_PATH must be in a bucket, because files on a
TPU VM are lost with it. --dry_run prints every command and runs none. This
program needs Python and gcloud, and no other part of ptune.
"""

import argparse
import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The runtime image of each kind of TPU, by the prefix of its type.
RUNTIMES = {
  'v4': 'tpu-ubuntu2204-base',
  'v5litepod': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}

# Scripts for the workers. All our files there are in ~/ptune-run. The images'
# Python is older than ptune needs, so uv installs one.
INSTALL = """\
set -e
mkdir -p ~/ptune-src
tar -xzf ~/ptune-src.tgz -C ~/ptune-src
curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --quiet --clear --python 3.12 ~/ptune-venv
~/.local/bin/uv pip install --quiet --python ~/ptune-venv -e ~/ptune-src'[tpu]'
echo installed"""

# setsid and nohup keep the run alive when ssh ends. The status is written last.
RUN = """\
mkdir -p ~/ptune-run && cd ~/ptune-run || exit 1
if [ -f pid ] && kill -0 -- -$(cat pid) 2>/dev/null; then
  echo 'a run is going on here; stop it first' >&2; exit 3
fi
[ -f log ] && mv log log.before
rm -f exit_status
export PATH=~/ptune-venv/bin:$PATH PYTHONUNBUFFERED=1
nohup setsid bash -c {script} > log 2>&1 < /dev/null &
echo started"""
# The trap: a signal to the group must end the command and not this shell.
SCRIPT = 'trap : TERM; echo $$ > pid; {command}; echo $? > exit_status; rm pid'

# The last line is 'running', 'exit N' or 'idle'.
STATUS = """\
cd ~/ptune-run 2>/dev/null || { echo idle; exit 0; }
[ -f log ] && tail -n 20 log
grep -qsE 'finished at step|is finished, at step' log && echo finished
if [ -f exit_status ]; then echo exit $(cat exit_status)
elif [ -f pid ] && kill -0 -- -$(cat pid) 2>/dev/null; then echo running
else echo idle; fi"""

LOGS = 'tail -n 100 -F ~/ptune-run/log'

# First a SIGTERM, as in a preemption, so that the run saves; then a SIGKILL.
# Then end all other processes that hold the chips, and remove their lock.
STOP = """\
cd ~/ptune-run 2>/dev/null && [ -f pid ] && {{
  kill -TERM -- -$(cat pid) 2>/dev/null
  for i in $(seq {grace}); do
    kill -0 -- -$(cat pid) 2>/dev/null || break; sleep 1
  done
  kill -KILL -- -$(cat pid) 2>/dev/null
}}
for device in /dev/accel* /dev/vfio/[0-9]*; do
  [ -e $device ] && sudo fuser -k -KILL $device 2>/dev/null
done
sudo rm -f /tmp/libtpu_lockfile
echo stopped"""

# A TPU in one of these states does not recover by itself.
LOST = ('PREEMPTED', 'TERMINATED', 'STOPPED', 'SUSPENDED', 'FAILED')


class GcloudError(RuntimeError):
  """A gcloud command failed; the message is its output."""


@dataclasses.dataclass(frozen=True)
class Tpu:
  """One slice, and the gcloud commands for it.

  Attributes:
    name: The name of the TPU VM, and of its queued resource if it has one.
    zone: Its zone.
    project: Its project; gcloud's own if not given.
    accelerator_type: Kind and size, such as 'v5litepod-8'.
    runtime_version: The image; chosen by the type if not given.
    spot: Whether it is cheaper and may be taken away at any time.
    queued: Whether to create it as a queued resource, which waits for capacity.
    service_account: The VM's account; the project's default if not given.
    dry_run: Whether to print commands instead of running them.
  """

  name: str
  zone: str
  project: str | None = None
  accelerator_type: str = 'v5litepod-8'
  runtime_version: str | None = None
  spot: bool = False
  queued: bool = False
  service_account: str | None = None
  dry_run: bool = False

  def create(self) -> None:
    """Requests the TPU. A queued one does not exist yet when this returns."""
    version = self.runtime_version or _runtime(self.accelerator_type)
    options = [f'--accelerator-type={self.accelerator_type}']
    if self.spot:
      options.append('--spot')
    if self.service_account:
      options.append(f'--service-account={self.service_account}')
    if self.queued:
      self._gcloud(
        'queued-resources',
        'create',
        f'--node-id={self.name}',
        f'--runtime-version={version}',
        *options,
      )
    else:
      self._gcloud('tpu-vm', 'create', f'--version={version}', *options)

  def state(self) -> str:
    """Returns READY if it can be used, NOT_FOUND, or gcloud's word.

    For a queued TPU it checks both the request and the VM, because a request
    stays ACTIVE for a while after its VM was preempted.
    """
    if self.queued:
      request = self._describe('queued-resources', 'state.state')
      if request != 'ACTIVE':
        return request
    return self._describe('tpu-vm', 'state')

  def delete(self) -> None:
    """Deletes it with everything on it, which ends its costs."""
    if self.queued:
      self._gcloud('queued-resources', 'delete', '--force', '--quiet')
    else:
      self._gcloud('tpu-vm', 'delete', '--quiet')

  def install(self) -> None:
    """Installs this checkout, with JAX for TPUs, on every worker."""
    with tempfile.TemporaryDirectory() as folder:
      archive = f'{folder}/ptune-src.tgz'
      # Only committed files without history: a few hundred kilobytes.
      self._run(
        ['git', '-C', str(ROOT), 'archive', f'--output={archive}', 'HEAD']
      )
      self._gcloud(
        'tpu-vm', 'scp', '--worker=all', files=[archive, f'{self.name}:']
      )
    self.ssh(INSTALL)

  def start(self, command: Sequence[str]) -> None:
    """Starts a command on every worker, detached from the ssh session."""
    script = SCRIPT.format(command=shlex.join(command))
    self.ssh(RUN.format(script=shlex.quote(script)))

  def status(self) -> str:
    """Returns worker 0's status of the run; see STATUS."""
    return self.ssh(STATUS, worker='0', capture=True)

  def stop(self, grace_seconds: int = 40) -> None:
    """Ends the run on every worker, and all other processes on the TPU."""
    self.ssh(STOP.format(grace=grace_seconds))

  def ssh(self, script: str, worker: str = 'all', capture: bool = False) -> str:
    """Runs a shell script on one worker or on all."""
    return self._gcloud(
      'tpu-vm',
      'ssh',
      f'--worker={worker}',
      f'--command={script}',
      capture=capture,
    )

  def _describe(self, kind: str, field: str) -> str:
    try:
      found = self._gcloud(
        kind, 'describe', f'--format=value({field})', capture=True
      )
    except GcloudError as error:
      if re.search('NOT_FOUND|not found', str(error)):
        return 'NOT_FOUND'
      raise
    return found.strip() or 'UNKNOWN'

  def _gcloud(
    self,
    kind: str,
    verb: str,
    *options: str,
    files: Sequence[str] = (),
    capture: bool = False,
  ) -> str:
    where = [f'--zone={self.zone}']
    if self.project:
      where.append(f'--project={self.project}')
    what = list(files) or [self.name]
    return self._run(
      ['gcloud', 'compute', 'tpus', kind, verb, *what, *where, *options],
      capture,
    )

  def _run(self, command: Sequence[str], capture: bool = False) -> str:
    if self.dry_run:
      print(shlex.join(command))
      return ''
    done = subprocess.run(
      command,
      text=True,
      stdout=subprocess.PIPE if capture else None,
      stderr=subprocess.PIPE,
      check=False,
    )
    if done.returncode:
      raise GcloudError(
        f'{shlex.join(command[:6])} ... failed with {done.returncode}:\n'
        + done.stderr.strip()
      )
    return done.stdout or ''


def _runtime(accelerator_type: str) -> str:
  for beginning, version in RUNTIMES.items():
    if accelerator_type.startswith(beginning):
      return version
  raise SystemExit(
    f'no --runtime_version is known for {accelerator_type!r}, only for'
    f' {sorted(RUNTIMES)}; to list versions: gcloud compute tpus tpu-vm'
    ' versions list --zone=ZONE'
  )


def train(
  tpu: Tpu,
  command: Sequence[str],
  poll_seconds: float = 60,
  max_failures: int = 3,
  keep: bool = False,
) -> int:
  """Runs a command until it says that it is finished, across preemptions.

  Args:
    tpu: The TPU; it is created if it does not exist.
    command: The command, the same at each start.
    poll_seconds: Seconds between two checks of the TPU.
    max_failures: Give up after this many failures in a row, of the run or of
      gcloud. Preemptions and a lack of capacity do not count.
    keep: Whether to keep the TPU when the run has finished or failed.

  Returns:
    0 if finished, 1 if it gave up.
  """
  if tpu.dry_run:
    _print_one_start(tpu, command, keep)
    return 0
  failures, started = 0, False
  while True:
    try:
      state = tpu.state()
      if state in LOST:
        _say(f'{tpu.name} is {state}: creating it again')
        started = False
        # A request fails because there is no capacity, or because it is wrong.
        failures += state == 'FAILED'
        tpu.delete()
      elif state == 'NOT_FOUND':
        _say(f'creating {tpu.name}')
        started = False
        tpu.create()
        continue
      elif state != 'READY':
        _say(f'{tpu.name} is {state}')
      elif not started:
        if _lines(tpu.status())[-1] == 'running':
          # An earlier call of this program has started it.
          _say('the run is running')
        else:
          _say('installing and starting')
          tpu.install()
          tpu.stop()
          tpu.start(command)
        started = True
      else:
        lines = _lines(tpu.status())
        if 'finished' in lines and lines[-1] == 'exit 0':
          _say('finished')
          break
        if lines[-1] == 'running':
          _say(lines[-2] if len(lines) > 1 else 'running')
          failures = 0
          time.sleep(poll_seconds)
          continue
        started = False
        if lines[-1] == 'exit 0':  # After a signal: the TPU may be going away.
          _say('the run stopped before its end')
        elif tpu.state() == 'READY':
          # If it was preempted, one worker fails before the state says so.
          failures += 1
          _say('\n'.join(['the run failed:', *lines]))
    except GcloudError as error:
      if _no_capacity(str(error)):
        _say(f'no capacity in {tpu.zone}; trying again')
      else:
        failures += 1
        _say(str(error))
    if failures >= max_failures:
      _say(f'giving up after {failures} failures')
      break
    time.sleep(poll_seconds)
  if keep:
    _say(f'{tpu.name} was kept, and costs money until you delete it')
  else:
    tpu.delete()
  return 1 if failures >= max_failures else 0


def _print_one_start(tpu: Tpu, command: Sequence[str], keep: bool) -> None:
  """Prints the commands that `train` runs if nothing goes wrong."""
  tpu.create()
  tpu.state()
  tpu.install()
  tpu.stop()
  tpu.start(command)
  tpu.status()
  if not keep:
    tpu.delete()


def _lines(text: str) -> list[str]:
  return text.strip().splitlines() or ['idle']


def _no_capacity(message: str) -> bool:
  return bool(
    re.search(r'no more capacity|RESOURCE_EXHAUSTED|stockout', message, re.I)
  ) and not re.search('quota', message, re.I)


def _say(text: str) -> None:
  print(f'{time.strftime("%H:%M:%S")} {text}', flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'action',
    choices=(
      'train',
      'create',
      'install',
      'run',
      'logs',
      'status',
      'stop',
      'delete',
    ),
  )
  parser.add_argument('name')
  parser.add_argument('--zone', required=True)
  parser.add_argument('--project')
  parser.add_argument('--accelerator_type', default='v5litepod-8')
  parser.add_argument('--runtime_version')
  parser.add_argument('--spot', action='store_true')
  parser.add_argument('--queued', action='store_true')
  parser.add_argument('--service_account')
  parser.add_argument(
    '--worker', default='0', help='for logs: 0, 1, ... or all'
  )
  parser.add_argument('--poll_seconds', type=float, default=60)
  parser.add_argument('--max_failures', type=int, default=3)
  parser.add_argument('--keep', action='store_true', help='for train')
  parser.add_argument('--dry_run', action='store_true')
  argv = sys.argv[1:] if argv is None else list(argv)
  own, command = argv, []
  if '--' in argv:
    own, command = argv[: argv.index('--')], argv[argv.index('--') + 1 :]
  args = parser.parse_args(own)
  if bool(command) != (args.action in ('train', 'run')):
    parser.error(
      "'train' and 'run', and only they, take a command after --, such as"
      ' -- ptune train --multiprocess --gin_file=...'
    )
  if command[:1] == ['ptune'] and '--multiprocess' not in command:
    parser.error(
      'without --multiprocess, each worker of a slice would run by itself;'
      f' use {shlex.join([*command[:2], "--multiprocess"])} ...'
    )
  fields = [f.name for f in dataclasses.fields(Tpu)]
  tpu = Tpu(**{name: getattr(args, name) for name in fields})
  try:
    return _act(tpu, args, command)
  except GcloudError as error:
    print(error, file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    if args.action == 'train':
      _say(
        f'stopped watching; {tpu.name} and its run continue. Run the same'
        ' command to watch again; stop ends the run, delete the costs'
      )
    return 130


def _act(tpu: Tpu, args: argparse.Namespace, command: Sequence[str]) -> int:
  match args.action:
    case 'train':
      return train(
        tpu, command, args.poll_seconds, args.max_failures, args.keep
      )
    case 'create':
      tpu.create()
    case 'install':
      tpu.install()
    case 'run':
      tpu.start(command)
    case 'logs':
      tpu.ssh(LOGS, worker=args.worker)
    case 'status':
      state = tpu.state()
      print(f'{tpu.name}: {state}')
      if state == 'READY' or tpu.dry_run:
        print(tpu.status(), end='')
    case 'stop':
      tpu.stop()
    case 'delete':
      tpu.delete()
  return 0


if __name__ == '__main__':
  sys.exit(main())
