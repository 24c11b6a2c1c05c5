"""From a fit to what to train: predictions, plans, leverage, advice."""
