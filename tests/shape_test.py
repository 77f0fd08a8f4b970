"""Limits on the size of programs, functions and modules."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = ('distill', 'evaluate', 'infer', 'train', 'train_many')
TREES = {
  file.relative_to(ROOT): ast.parse(file.read_text())
  for folder in ('ptune', 'tasks')
  for file in sorted((ROOT / folder).rglob('*.py'))
}


def functions(tree):
  return [
    node
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
  ]


def test_a_program_has_at_most_12_parameters():
  for name in PROGRAMS:
    tree = TREES[pathlib.Path('ptune', f'{name}.py')]
    program = next(f for f in functions(tree) if f.name == name)
    arguments = program.args
    count = len(arguments.args) + len(arguments.kwonlyargs)
    assert 1 <= count <= 12, name


def test_no_function_has_more_than_120_lines():
  long = {
    f'{file}: {node.name}': node.end_lineno - node.lineno + 1
    for file, tree in TREES.items()
    for node in functions(tree)
    if node.end_lineno - node.lineno + 1 > 120
  }
  assert not long
