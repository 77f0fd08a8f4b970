"""Counts the bytes of frozen weights and of a step, by type; runs nothing.

    python -m benchmarks.memory --size=t5_1_1_base

XLA reports the memory of a compiled step, so all numbers are deterministic for
one version of XLA. `arguments` are the weights, the state and the batch.
`temporary` is the additional memory of a step. --versus=peft adds the bytes of
PEFT's model, in the types that it has on a CPU. PyTorch cannot predict the
memory of a step.
"""

import argparse

from benchmarks import peers
from ptune.model import frozen_weights, model_info

# Types of activations and of frozen weights.
TYPES = (
  ('float32', 'float32'),
  ('bfloat16', 'bfloat16'),
  ('float32', 'int8'),
  ('bfloat16', 'int8'),
)


def measure(args):
  result = {}
  for dtype, frozen in TYPES:
    plan = peers.plan_of(args, dtype=dtype, frozen_dtype=frozen)
    batch = peers.batch_of(plan, args.batch, args.inputs, args.targets)
    memory = peers.compile_step(plan, batch)[0].memory_analysis()
    held = frozen_weights.shapes(plan).values()
    result[f'{dtype}, {frozen} weights'] = {
      'frozen_bytes': sum(map(model_info.nbytes, held)),
      'argument_bytes': memory.argument_size_in_bytes,
      'temporary_bytes': memory.temp_size_in_bytes,
    }
  if args.versus == 'peft':
    for dtype in ('float32', 'bfloat16'):
      one = argparse.Namespace(**{**vars(args), 'dtype': dtype})
      model = peers.peft(one, 'meta')
      held = [p for p in model.parameters() if not p.requires_grad]
      size = sum(p.numel() * p.element_size() for p in held)
      result[f'peft, {dtype} weights'] = {'frozen_bytes': size}
  return result


if __name__ == '__main__':
  flags = peers.parser(__doc__)
  flags.add_argument('--versus', choices=('peft',))
  peers.run(flags, measure)
