"""Training: the loop, its state, optimizers, checkpoints and reports.

Nothing here uses a trained model or imports a program.
"""
