"""Analyses of a prompt: its neighbours, similar prompts, rows that matter."""
