"""What a user sets: gin files, macros and flags, found, read and checked.

Nothing heavy is imported, and no setting is acted on.
"""
