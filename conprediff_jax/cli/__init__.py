"""Modules that the commands share: flags, one line for a user's error, exit codes."""
