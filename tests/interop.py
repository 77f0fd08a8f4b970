"""torch, transformers and PEFT; importing this skips a test without them."""

import warnings

import pytest

WHY = "not installed; pip install -e '.[test,interop]' brings it"
torch = pytest.importorskip('torch', reason=f'torch is {WHY}')
transformers = pytest.importorskip(
  'transformers', reason=f'transformers is {WHY}'
)
with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  peft = pytest.importorskip('peft', reason=f'peft is {WHY}')
