"""SeqIO tasks that come with ptune: one module a family, imported by name.

A module is named in MIXTURE_OR_TASK_MODULE, or imported by one that is. Tasks
import SeqIO and TensorFlow, and nothing of ptune.
"""
