"""`python -m imstream` is the command `imstream`."""

from imstream.cli.main import main

main()
