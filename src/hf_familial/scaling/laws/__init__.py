"""What a law is, and the catalogue of laws: every form on one core, as data."""
