"""Using a trained model: prediction, evaluation, many prompts, HTTP.

Nothing here trains.
"""
