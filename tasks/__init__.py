"""Tasks that come with ptune, one module a family, and tasks of your own rows.

Name a module of SeqIO tasks in MIXTURE_OR_TASK_MODULE, or import it in a module
that you name there; it imports SeqIO and TensorFlow. `files`, `hugging_face`,
`rows`, `templates` and `texts` make tasks of your rows and import neither.
"""
