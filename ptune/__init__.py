"""ptune: soft prompts for frozen T5-family models, in JAX.

Importing the package loads nothing heavy: take the modules you need, such as
`ptune.model.network`, `ptune.methods.prompt` or `ptune.train`.
"""

import os

__version__ = '0.1.0'

# In a checkout, `tasks/` lies beside this package, and not in it as when it is
# installed. Python that starts there finds this one first.
_beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_beside, 'tasks', 'registry.py')):
  __path__.append(_beside)
