"""Networks of the T5 family, their sites, loss and decoding.

JAX and Flax only: nothing here reads files, data or gin.
"""
