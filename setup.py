"""Installs ptune; the metadata and the tools' settings are in pyproject.toml.

`gin/` and `tasks/` are at the top of the repository, because users of T5X look
for them there. They are installed inside the package as `ptune.gin` (files
only) and `ptune.tasks`.
"""

import setuptools

setuptools.setup(
  packages=[
    *setuptools.find_packages(include=['ptune', 'ptune.*']),
    'ptune.tasks',
    'ptune.gin',
  ],
  package_dir={
    'ptune': 'ptune',
    'ptune.tasks': 'tasks',
    'ptune.gin': 'gin',
  },
  package_data={
    'ptune': ['py.typed'],
    'ptune.serving': ['page.html'],
    'ptune.gin': ['*/*.gin'],
    'ptune.pretrained': [
      'README.md',
      'vocab.model',
      '*/config.json',
      '*/model.safetensors',
    ],
  },
)
