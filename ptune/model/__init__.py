"""The T5 network, its sites, and what is asked of it.

JAX and Flax only: nothing here reads files, data or gin.
"""
