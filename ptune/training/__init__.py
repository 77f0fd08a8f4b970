"""What stands around the training loop: state, optimizer, checkpoints, report.

Nothing here asks a trained model, and no program is imported.
"""
