"""Readers of tables of training runs in many file formats and with many column names."""
