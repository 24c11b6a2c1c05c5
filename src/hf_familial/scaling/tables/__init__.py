"""Load tables of training runs, however people write them, as rows that laws can be fitted to."""
