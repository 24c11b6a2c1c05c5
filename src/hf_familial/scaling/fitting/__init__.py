"""From rows to a fit: which rows, what is made small, the search, and laws compared."""
