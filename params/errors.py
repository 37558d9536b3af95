"""The one exception that means "the user can mend this": a message and no traceback."""


class UserError(ValueError):
    """A mistake that the user can mend; the message names the file, row or field and the remedy."""
