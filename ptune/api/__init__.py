"""The Python API: a base model, what is trained on it, and prompts beside it.

    base = ptune.load('hf://google/flan-t5-base')
    tuned = ptune.tune(base, train, validation=dev, steps=300)
    tuned.predict(['so insightful'])

`ptune` has its names. Here stands no second trainer: `tune` calls the program
`ptune train`, and what it returns is what that program left in its directory.
"""

from ptune.api.base import Base
from ptune.api.calls import load, tune
from ptune.api.prompt_bank import Bank, bank
from ptune.api.tuned import Tuned

__all__ = ['Bank', 'Base', 'Tuned', 'bank', 'load', 'tune']
