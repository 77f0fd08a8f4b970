"""Data: from the examples of a task to the batch of a step.

Nothing here knows about networks or runs.
"""
