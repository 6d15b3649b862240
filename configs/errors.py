"""The one error that a wrong configuration raises."""


class ConfigError(ValueError):
    """A configuration cannot be used; the message is one line naming the key or file and the remedy."""
