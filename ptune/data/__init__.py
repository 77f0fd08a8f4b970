"""From the examples of a task to the batch of a step.

Nothing here knows a network or a run.
"""
