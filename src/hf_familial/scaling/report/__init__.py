"""A study for readers: its file, its pictures and its page."""
