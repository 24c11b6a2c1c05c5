"""Agreement of an exit with the deepest exit, as a module of the `evaluate` library."""
