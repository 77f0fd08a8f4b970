"""ptune: soft prompts for frozen T5-family models, in JAX.

Importing the package loads nothing heavy: take the modules you need, such as
`ptune.network`, `ptune.methods.prompt` or `ptune.train`.
"""

__version__ = '0.1.0'
