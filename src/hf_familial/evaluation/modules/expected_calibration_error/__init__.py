"""Expected calibration error, as a module of the `evaluate` library."""
