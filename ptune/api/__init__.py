"""The Python API: a base model, what you train on it, and a bank of prompts.

    base = ptune.load('hf://google/flan-t5-base')
    tuned = ptune.tune(base, train, validation=dev, steps=300)
    tuned.predict(['so insightful'])

`ptune` re-exports these names. There is no second trainer here: `tune` calls
the program `ptune train`, and returns what that wrote to its directory.
"""

from ptune.api.base import Base
from ptune.api.calls import load, tune
from ptune.api.prompt_bank import Bank, bank
from ptune.api.tuned import Tuned

__all__ = ['Bank', 'Base', 'Tuned', 'bank', 'load', 'tune']
