"""The one exception that means "the user can mend this": the command line prints it and exits with 2."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line: the thing that is wrong, then the mend."""
