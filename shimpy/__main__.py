"""`python -m shimpy` is `shimpy`."""

from shimpy.cli.main import main

main()
