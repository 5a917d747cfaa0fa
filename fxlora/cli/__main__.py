"""`python -m fxlora.cli` is `fxlora`."""

from fxlora.cli import main

main()
