"""One file for each command that judges or uses trained networks: load what was named, call the library, print.

Results go to standard output, as text or with `--json` as JSON; progress goes to standard error, and only to a
terminal. What takes seconds to import is imported inside, so that help and mistakes in the arguments come at once.
"""
