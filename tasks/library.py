"""Registers the whole library. Each of its modules can be imported alone."""

from ptune.tasks import (  # noqa: F401
  c4,
  glue,
  nli,
  qa,
  summarization,
  super_glue,
)
