"""Quality and cost of all exits, as a module of the `evaluate` library."""
