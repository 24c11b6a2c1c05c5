"""What is to be run: the grid of an IsoFLOP study, its runs, and what they are expected to take."""
