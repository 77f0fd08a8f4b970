"""The figures and tables of papers, from training to drawing.

A study runs the programs `train` and `train_many`, which never import it.
"""
