"""Errors that are the user's to mend."""


class UserError(ValueError):
    """Bad input: the message is one line saying what was wrong, where, and what would be right.

    The commands print it without a traceback and end with exit code 2.
    """


class ConfigError(UserError):
    """A config that cannot be built; the message names the key."""


class DataError(UserError):
    """Data that is missing, or not what the configuration says. The message is one line."""
