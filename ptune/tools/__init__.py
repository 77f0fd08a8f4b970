"""Other commands: plan, doctor, demo, lists of methods and tasks.

Only the command line imports them.
"""
