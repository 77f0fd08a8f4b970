"""Commands beside the programs: plan, doctor, demo, lists of methods and tasks.

Nothing but the command line imports them.
"""
