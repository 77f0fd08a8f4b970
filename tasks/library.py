"""Registers the whole library. You can also import each module alone."""

from ptune.tasks import (  # noqa: F401
  c4,
  glue,
  nli,
  qa,
  summarization,
  super_glue,
)
