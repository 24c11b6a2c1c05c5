"""Training: arguments, trainer, callbacks, schedules, data."""
