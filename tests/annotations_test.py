"""Values from gin are checked against the annotations of parameters."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest

import gin
from ptune.config import annotations, gin_files
from ptune.errors import UserError
from ptune.model import sizes
from ptune.training import settings


@pytest.fixture(autouse=True)
def no_gin_from_elsewhere():
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.mark.parametrize(
  ('hint', 'good', 'bad'),
  [
    (int, [0, -3], [True, 1.0, '1', None, 10**30]),
    (float, [0, 0.5], [True, math.nan, math.inf, '1', None]),
    (bool, [True], [1, 'True', None]),
    (str, ['a', ''], [b'a', 1, None]),
    (int | None, [None, 3], ['3', 3.5]),
    (float | str | None, ['x', 1, None], [[], True]),
    (Sequence[int], [[1, 2], (), (3,)], ['12', [1, 'a'], 3, None]),
    (tuple[str, ...], [['a'], ('a', 'b')], ['a', [1]]),
    (Mapping[str, int], [{}, {'a': 1}], [{'a': 'b'}, {1: 1}, []]),
    (Literal['a', 'b'], ['a'], ['c', 1]),
    (Callable[..., Any], [len], ['len', None, 3]),
    (Callable[..., Any] | None, [len, None], ['len']),
    (settings.Data, [], ['data', None, [], 3]),
    (Any, [None, 'a', 3], []),
  ],
)
def test_what_fits_an_annotation(hint, good, bad):
  assert all(annotations.fits(value, hint) for value in good)
  assert not any(annotations.fits(value, hint) for value in bad)


@pytest.mark.parametrize(
  ('binding', 'message'),
  [
    ("models.Decoding.top_k='5'", "Decoding.top_k is '5'; expected a whole"),
    ('models.Decoding.top_p=None', 'top_p is None; expected a number'),
    ('train.train.seed=True', 'train.seed is True; expected a whole number'),
    ("optim.schedule.end_factor='a'", "end_factor is 'a'; expected a number"),
    ('optim.schedule.learning_rate=1e999', 'is inf; expected a number'),
    ("prompt.prompt.init='x'", "init is 'x'; expected a reference, such as @"),
    ("settings.Data.in_memory='x'", "in_memory is 'x'; expected True or False"),
  ],
)
def test_a_parameter_of_another_type_is_refused(binding, message):
  files = ['runs/train.gin', 'methods/prompt.gin']
  with pytest.raises(UserError, match=message):
    gin_files.parse(files, [binding])


def test_all_parameters_that_are_wrong_are_named():
  files = ['runs/train.gin', 'methods/prompt.gin']
  bindings = ["models.Decoding.top_k='5'", 'optim.schedule.decay=None']
  with pytest.raises(UserError, match=r'(?s)Decoding.top_k.*schedule.decay'):
    gin_files.parse(files, bindings)


def test_every_file_of_ours_fits_the_annotations():
  for file in gin_files.own_files():
    gin.clear_config()
    gin_files.parse([file])


def test_the_sizes_of_a_model_are_checked():
  good = sizes.t5('t5_small')
  for name, value in (
    ('emb_dim', 'a'),
    ('num_heads', 0),
    ('dropout_rate', 'x'),
    ('logits_via_embedding', 1),
    ('mlp_activations', (3,)),
  ):
    with pytest.raises(UserError, match=name):
      dataclasses.replace(good, **{name: value})
