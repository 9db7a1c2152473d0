"""`python -m ensdistill` is the command `ensdistill`."""

from ensdistill.cli import main

main()
