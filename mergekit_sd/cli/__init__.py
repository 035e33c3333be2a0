"""The command line: a thin skin over the public API. Sees nothing of the engine's rooms."""
