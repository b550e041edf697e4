"""The one exception for everything that the user can mend."""


class UserError(Exception):
    """What is wrong, where, and how to mend it, in one sentence; the command line prints it and exits with 1."""
