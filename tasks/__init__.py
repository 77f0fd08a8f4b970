"""Tasks that come with ptune, one module a family, and a user's own rows.

A module of SeqIO tasks is named in MIXTURE_OR_TASK_MODULE, or imported by one
that is; it imports SeqIO and TensorFlow. `files`, `hugging_face`, `rows`,
`templates` and `texts` make tasks of a user's rows and import neither.
"""
