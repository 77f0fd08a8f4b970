"""User settings: finds, reads and checks gin files, macros and flags.

It imports nothing heavy and acts on no setting.
"""
