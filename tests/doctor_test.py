"""The preflight passes on eight fake devices, and names each failure's fix."""

import os
import shutil

import pytest

from ptune.tools import doctor


def test_all_checks_pass_here(tmp_path, capsys):
  assert doctor.doctor(model_dir=os.fspath(tmp_path / 'run')) == 0
  lines = capsys.readouterr().out.splitlines()
  assert all(line.startswith('ok    ') for line in lines)
  assert 'ok    devices: 8 x cpu' in lines
  assert 'on a mesh of 4 x 2' in lines[-1]
  assert not list(tmp_path.iterdir())  # It leaves no files.


def test_a_failure_names_its_fix_and_the_other_checks_go_on(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(doctor, 'check_step', lambda: 'taken')
  missing = os.fspath(tmp_path / 'no_model')
  assert doctor.doctor(initial_checkpoint_path=missing) == 1
  lines = capsys.readouterr().out.splitlines()
  [failed] = [i for i, line in enumerate(lines) if line.startswith('FAIL')]
  assert missing in lines[failed]
  assert lines[-2].startswith('      fix: check the path')
  assert lines[-1] == 'ok    a sharded step: taken'


def test_a_directory_that_cannot_be_made_is_reported(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(doctor.Failed, match='cannot be written') as failure:
    doctor.check_writable(os.fspath(tmp_path / 'file' / 'run'))
  assert 'MODEL_DIR' in failure.value.fix


def test_an_unreachable_bucket_is_reported_with_the_role_that_is_needed(
  monkeypatch,
):
  def refuse(path):
    raise PermissionError('403')

  monkeypatch.setattr(doctor.epath, 'Path', refuse)
  with pytest.raises(doctor.Failed, match='403') as failure:
    doctor.check_writable('gs://no-such-bucket/run')
  assert 'Storage Object' in failure.value.fix


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
  full = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
  monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda path: full)
  with pytest.raises(doctor.Failed, match=r'10\.0 MB free'):
    doctor.check_disk(os.fspath(tmp_path / 'not' / 'there' / 'yet'))


def test_a_wrong_version_is_reported_with_the_one_needed(monkeypatch):
  found = doctor.importlib.metadata.version
  monkeypatch.setattr(
    doctor.importlib.metadata,
    'version',
    lambda name: '0.4.1' if name == 'jax' else found(name),
  )
  with pytest.raises(doctor.Failed, match=r'jax is 0\.4\.1, ptune needs'):
    doctor.check_versions()


def test_an_idle_accelerator_is_reported(monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setattr(
    doctor.glob, 'glob', lambda p: [p] if 'nvidia' in p else []
  )
  with pytest.raises(doctor.Failed, match='a GPU, but JAX uses') as failure:
    doctor.check_devices()
  assert 'ptune[cuda]' in failure.value.fix


def test_slurm_tasks_that_do_not_join_are_reported(monkeypatch):
  monkeypatch.setenv('SLURM_NTASKS', '4')
  with pytest.raises(doctor.Failed, match='4 tasks') as failure:
    doctor.check_processes()
  assert '--multiprocess' in failure.value.fix
