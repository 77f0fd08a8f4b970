"""Asking a trained model: restored, batched, many prompts at once, over HTTP.

Nothing here trains.
"""
