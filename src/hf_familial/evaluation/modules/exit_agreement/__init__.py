"""Agreement of an exit with the deepest one, as a module of the `evaluate` library."""
