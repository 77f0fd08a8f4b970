"""The launchers, with real local processes, and TPU VMs of a fake gcloud.

The fake gcloud runs ssh commands in a real shell, in a directory that
represents the worker's home. So these tests cover the scripts too.
"""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LOCAL = [sys.executable, str(ROOT / 'launch' / 'local.py')]
TPU_VM = [sys.executable, str(ROOT / 'launch' / 'tpu_vm.py')]
WHERE = ['my-tpu', '--zone=us-west4-a']


def script(path, text):
  """Writes a Python program; returns the command that runs it."""
  path.write_text(textwrap.dedent(text))
  return [sys.executable, str(path)]


def start(command, **kwargs):
  return subprocess.Popen(
    command,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    **kwargs,
  )


def run(command, **kwargs):
  done = subprocess.run(
    command, text=True, capture_output=True, timeout=120, **kwargs
  )
  return done.returncode, done.stdout + done.stderr


# --------------------------------------------------------------------- local


def test_local_processes_form_one_mesh(tmp_path):
  program = script(
    tmp_path / 'sum.py',
    """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec as P
    flags = dict(a.removeprefix('--').split('=') for a in sys.argv[1:])
    jax.distributed.initialize(
      flags['coordinator_address'], int(flags['process_count']),
      int(flags['process_index']))
    mesh = jax.make_mesh((4,), ('x',), (jax.sharding.AxisType.Auto,))
    x = jax.make_array_from_callback(
      (4,), jax.NamedSharding(mesh, P('x')), lambda i: np.arange(4.)[i])
    total = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, P()))(x)
    print(f'{jax.local_device_count()} of {jax.device_count()}: {total}')
    """,
  )
  status, output = run(
    [*LOCAL, '--processes=2', '--devices_per_process=2', '--', *program],
    env={**os.environ, 'XLA_FLAGS': ''},
  )
  assert status == 0, output
  assert '[0] 2 of 4: 6.0' in output and '[1] 2 of 4: 6.0' in output


def test_local_ends_the_others_when_one_fails(tmp_path):
  # Process 0 ignores SIGTERM, like a process that hangs in a collective.
  program = script(
    tmp_path / 'fail.py',
    """
    import signal, sys, time
    if '--process_index=1' in sys.argv:
      sys.exit(7)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
    """,
  )
  begin = time.monotonic()
  status, output = run(
    [*LOCAL, '--processes=3', '--grace_seconds=1', '--', *program]
  )
  assert status == 7
  assert 'process 1 failed' in output
  assert time.monotonic() - begin < 30


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_local_forwards_signals_to_all(tmp_path, number):
  program = script(
    tmp_path / 'wait.py',
    """
    import signal, sys, time
    def note(number, frame):
      print('saved after', signal.Signals(number).name)
      sys.exit(0)
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    print('ready')
    time.sleep(60)
    """,
  )
  process = start([*LOCAL, '--processes=2', '--', *program])
  lines = [process.stdout.readline().strip() for _ in range(2)]
  assert sorted(lines) == ['[0] ready', '[1] ready']
  process.send_signal(number)
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 0
  for i in range(2):
    assert f'[{i}] saved after {number.name}' in output


def test_local_reports_the_signal_that_ended_a_process(tmp_path):
  program = script(
    tmp_path / 'die.py',
    'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
  )
  status, _ = run([*LOCAL, '--processes=1', '--', *program])
  assert status == 128 + signal.SIGKILL


# -------------------------------------------------------------------- tpu_vm

FAKE_GCLOUD = r"""
import json, os, pathlib, shutil, signal, subprocess, sys
cloud = pathlib.Path(os.environ['FAKE_CLOUD'])
home = cloud / 'home'
args = sys.argv[1:]
with open(cloud / 'calls', 'a') as f:
  f.write(json.dumps(args) + '\n')
assert args[:2] == ['compute', 'tpus'], args
kind, verb = args[2:4]
plan = json.loads((cloud / 'plan').read_text())
node = cloud / 'node'

def fail(text):
  print(text, file=sys.stderr)
  sys.exit(1)

def kill_run():
  if (home / 'ptune-run' / 'pid').exists():
    os.killpg(int((home / 'ptune-run' / 'pid').read_text()), signal.SIGKILL)

failures = plan.get(f'fail_{verb}', [])
if failures:
  text = failures.pop(0)
  (cloud / 'plan').write_text(json.dumps(plan))
  if text:
    fail(text)
if verb == 'create':
  home.mkdir()
  node.write_text('READY')
elif verb == 'describe':
  if not node.exists():
    fail('ERROR: NOT_FOUND: Resource was not found')
  state = node.read_text()
  if kind == 'queued-resources':
    waiting = plan.get('waiting', [])
    if waiting:
      print(waiting.pop(0))
      (cloud / 'plan').write_text(json.dumps(plan))
    else:
      print('SUSPENDED' if state == 'PREEMPTED' else 'ACTIVE')
  else:
    print(state)
elif verb == 'delete':
  kill_run()
  node.unlink()
  shutil.rmtree(home)
elif verb == 'scp':
  shutil.copy(args[4], home)
elif verb == 'ssh':
  if node.read_text() != 'READY':
    fail('ssh: connect to host: Connection refused')
  [command] = [a for a in args if a.startswith('--command=')]
  command = command.removeprefix('--command=')
  if 'astral.sh' in command:
    sys.exit(0)
  if 'exit_status' in command and 'setsid' not in command:
    step = cloud / 'step'
    reached = int(step.read_text() or 0) if step.exists() else 0
    if reached and reached in plan.get('preempt_at_steps', []):
      plan['preempt_at_steps'].remove(reached)
      (cloud / 'plan').write_text(json.dumps(plan))
      kill_run()
      node.write_text('PREEMPTED')
      fail('ssh: connection closed')
  home_of = {**os.environ, 'HOME': str(home)}
  done = subprocess.run(['bash', '-c', command], env=home_of)
  sys.exit(done.returncode)
else:
  fail(f'unknown command {args}')
"""

# Counts to 12, and continues where an earlier start was killed. If the plan
# preempts it, it waits for that.
FAKE_RUN = """
import json, pathlib, sys, time
step = pathlib.Path(sys.argv[1])
first = int(step.read_text()) if step.exists() else 0
print('resuming from step', first)
for i in range(first, 12):
  step.write_text(str(i + 1))
  print('step', i + 1)
  plan = json.loads((step.parent / 'plan').read_text())
  if i + 1 in plan.get('preempt_at_steps', []):
    time.sleep(60)
print('finished at step 12: gs://bucket/run')
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """Returns the fake cloud's directory; its file `plan` lists failures."""
  bin_directory = tmp_path / 'bin'
  bin_directory.mkdir()
  programs = {
    'gcloud': f'#!{sys.executable}{FAKE_GCLOUD}',
    'sudo': '#!/bin/sh\n',  # Protects this machine.
  }
  for name, text in programs.items():
    (bin_directory / name).write_text(text)
    (bin_directory / name).chmod(0o755)
  monkeypatch.setenv('PATH', f'{bin_directory}:{os.environ["PATH"]}')
  monkeypatch.setenv('FAKE_CLOUD', str(tmp_path))
  plan(tmp_path)
  return tmp_path


def plan(cloud, **what):
  (cloud / 'plan').write_text(json.dumps(what))


def calls(cloud):
  """[('tpu-vm create', [flags]), ...]"""
  lines = (cloud / 'calls').read_text().splitlines()
  return [(' '.join(a[2:4]), a[4:]) for a in map(json.loads, lines)]


def verbs(cloud):
  return [call for call, _ in calls(cloud) if 'describe' not in call]


def train(cloud, *flags, command=None):
  command = command or script(cloud / 'run.py', FAKE_RUN)
  return run(
    [
      *[*TPU_VM, 'train', *WHERE, '--poll_seconds=0.1', *flags, '--'],
      *[*command, str(cloud / 'step')],
    ]
  )


def test_tpu_train_creates_runs_and_deletes(cloud):
  status, output = train(cloud, '--spot')
  assert status == 0, output
  assert (cloud / 'step').read_text() == '12'
  assert not (cloud / 'node').exists()
  made = dict(calls(cloud))['tpu-vm create']
  assert made == [
    'my-tpu',
    '--zone=us-west4-a',
    '--version=v2-alpha-tpuv5-lite',
    '--accelerator-type=v5litepod-8',
    '--spot',
  ]
  assert verbs(cloud)[0] == 'tpu-vm create'
  assert verbs(cloud)[-1] == 'tpu-vm delete'


@pytest.mark.parametrize('queued', [False, True])
def test_tpu_train_starts_again_after_preemptions(cloud, queued):
  plan(
    cloud,
    preempt_at_steps=[4, 9],
    waiting=['WAITING_FOR_RESOURCES', 'PROVISIONING'],
  )
  status, output = train(cloud, '--spot', *(['--queued'] if queued else []))
  assert status == 0, output
  assert (cloud / 'step').read_text() == '12'
  kind = 'queued-resources' if queued else 'tpu-vm'
  assert verbs(cloud).count(f'{kind} create') == 3
  assert verbs(cloud).count(f'{kind} delete') == 3
  assert not (cloud / 'node').exists()
  if queued:
    flags = dict(calls(cloud))['queued-resources create']
    assert '--node-id=my-tpu' in flags and '--spot' in flags
    assert '--force' in dict(calls(cloud))['queued-resources delete']


def test_tpu_train_waits_for_capacity(cloud):
  message = 'There is no more capacity in the zone "us-west4-a"'
  plan(cloud, fail_create=[message] * 5)
  status, output = train(cloud, '--max_failures=2')
  assert status == 0, output
  assert verbs(cloud).count('tpu-vm create') == 6


def test_tpu_train_survives_a_gcloud_that_fails_for_a_while(cloud):
  plan(cloud, fail_describe=['connection reset', 'connection reset'])
  status, output = train(cloud)
  assert status == 0, output
  assert verbs(cloud).count('tpu-vm create') == 1


def test_tpu_train_gives_up_on_a_wrong_request(cloud):
  plan(cloud, fail_create=['PERMISSION_DENIED: tpu.nodes.create'] * 9)
  status, output = train(cloud, '--max_failures=2', '--keep')
  assert status == 1
  assert 'PERMISSION_DENIED' in output
  assert verbs(cloud).count('tpu-vm create') == 2


def test_tpu_train_gives_up_on_a_run_that_fails_and_shows_its_log(cloud):
  broken = script(cloud / 'broken.py', "raise SystemExit('no such task')")
  status, output = train(cloud, '--max_failures=2', command=broken)
  assert status == 1
  assert 'no such task' in output
  assert not (cloud / 'node').exists()  # Nothing costs money any longer.


def test_tpu_run_outlives_ssh_and_stop_ends_it(cloud):
  def tpu(action, *rest):
    status, output = run([*TPU_VM, action, *WHERE, *rest])
    assert status == 0, output
    return output

  tpu('create')
  stubborn = script(
    cloud / 'stubborn.py',
    """
    import signal, time
    def note(number, frame):
      print('saved')
      raise SystemExit(0)
    signal.signal(signal.SIGTERM, note)
    print('going on', flush=True)
    time.sleep(60)
    """,
  )
  tpu('run', '--', *stubborn)
  log = cloud / 'home' / 'ptune-run' / 'log'
  while 'going on' not in log.read_text():
    time.sleep(0.05)
  assert tpu('status').splitlines()[-1] == 'running'
  again, output = run([*TPU_VM, 'run', *WHERE, '--', *stubborn])
  assert again == 1 and 'a run is going on' in output
  tpu('stop')
  assert 'saved' in log.read_text()
  assert tpu('status').splitlines()[-1] == 'exit 0'
  tpu('delete')


def test_tpu_dry_run_prints_every_command_and_runs_none(cloud):
  status, output = run(
    [
      *[*TPU_VM, 'train', *WHERE, '--dry_run', '--project=p', '--spot', '--'],
      *['ptune', 'train', '--multiprocess', "--gin.MODEL_DIR='gs://b/r'"],
    ]
  )
  assert status == 0, output
  assert not (cloud / 'calls').exists()
  # Splits the commands like a shell; scripts span several lines.
  words = shlex.split(output)
  assert words.count('gcloud') == 8 and words.count('git') == 1
  assert all(w in words for w in ('create', 'scp', 'ssh', 'delete', '--spot'))
  assert words.count('--project=p') == words.count('gcloud')
  [started] = [w for w in words if 'setsid' in w]
  assert '--multiprocess' in started and 'gs://b/r' in started


def test_tpu_run_refuses_workers_that_would_not_join(cloud):
  status, output = run([*TPU_VM, 'run', *WHERE, '--', 'ptune', 'train'])
  assert status == 2 and '--multiprocess' in output


@pytest.mark.parametrize('path', sorted((ROOT / 'launch').glob('*.sbatch')))
def test_shell_scripts_parse(path):
  assert run(['bash', '-n', str(path)]) == (0, '')
