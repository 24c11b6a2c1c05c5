"""How far to trust a fit: intervals of many kinds, bias, and doubts in sentences."""
