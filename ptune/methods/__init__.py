"""Parameter-efficient methods, one module each; see `adapters.Method`."""
