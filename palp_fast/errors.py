"""The exceptions of the library: each message is one line that says what is wrong and what would be right."""


class ConfigError(ValueError):
    """A wrong setting: names the field, its value and what is allowed. Raised before anything is loaded or written."""


class DataError(ValueError):
    """A training image cannot be read: names the file."""


class TrainingDiverged(RuntimeError):
    """Training became non-finite: names the step and the tensor. The last good checkpoint is safe on disk."""
