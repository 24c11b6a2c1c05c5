"""`python -m hf_familial` runs the same commands as `hf-familial`.

It starts more slowly, because Python imports the package, and with it torch, before this module.
"""

from .cli import main


main()
