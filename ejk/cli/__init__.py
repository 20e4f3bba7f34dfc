"""The command line, `python -m ejk`: the library never imports it."""
