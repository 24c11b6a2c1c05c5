"""`python -m hf_familial` is `hf-familial`."""

from .cli import main


main()
