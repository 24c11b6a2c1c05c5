"""Running a design: every run once, here or on other machines, whatever happens in between."""
