"""The machine that ptune runs on: files, paths, processes, the terminal.

Nothing here knows about models or training.
"""
