"""What follows from a law, or from curves without one: costs of runs, optima, quantities."""
