"""What can go wrong for a user: one family, each with the exit code the front door gives it.

    BdhError                 1  the program could not do what was asked
    ├── InputError           2  what was asked cannot be done: mend the input
    │   ├── ConfigError      2  a configuration file or override
    │   ├── DataError        2  the text to train on
    │   ├── CheckpointError  2  a file that is not a checkpoint, or a damaged one
    │   └── ResumeError      2  a run or checkpoint that cannot be continued
    ├── SaveError            1  a checkpoint could not be written
    ├── StoppedError         1  training cannot go on; what was good is saved
    │   └── NonFiniteError   1  loss or gradients are no longer numbers
    └── TrackingError        1  the tracking server cannot be used

Messages say where, what was found, what is accepted and what to do next. The library raises; only `cli` prints.
"""


class BdhError(Exception):
    """Base of every error a user can cause or meet; `str(error)` is the whole message."""

    exit_code = 1


class InputError(BdhError):
    """The input is at fault; nothing was written."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration that cannot be carried out; lists every problem found."""


class DataError(InputError):
    """Text data that is missing, unreadable or too small."""


class CheckpointError(InputError):
    """A file that is not a whole checkpoint."""


class ResumeError(InputError):
    """A resume target that does not exist or does not fit the configuration."""


class SaveError(BdhError):
    """A checkpoint could not be written; earlier ones are untouched."""


class StoppedError(BdhError):
    """Training cannot go on; the last good step is saved."""


class NonFiniteError(StoppedError):
    """Loss or gradient norm is NaN or infinite; the update was not applied."""


class TrackingError(BdhError):
    """The tracking server refused or cannot be reached."""
