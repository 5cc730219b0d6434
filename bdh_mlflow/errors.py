"""Everything that can go wrong for a user: one family of exceptions, each with the exit code of the command line.

    BdhError                 1  the program could not do what was requested
    ├── InputError           2  the request cannot be carried out: correct the input
    │   ├── ConfigError      2  a configuration file or override
    │   ├── DataError        2  the text to train on
    │   ├── CheckpointError  2  a file that is not a checkpoint, or a damaged one
    │   └── ResumeError      2  a run or checkpoint that cannot be continued
    ├── SaveError            1  a checkpoint could not be written
    ├── StoppedError         1  training cannot continue; the last good step is saved
    │   └── NonFiniteError   1  loss or gradient norm is NaN or infinite
    └── TrackingError        1  the tracking server cannot be used

Messages say where, what was found, what is accepted and what to do next. The library raises; only `cli` prints.
"""


class BdhError(Exception):
    """Base of every error that a user can cause or meet; `str(error)` is the complete message."""

    exit_code = 1


class InputError(BdhError):
    """The input is wrong; nothing was written."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration that cannot be used; lists every problem found."""


class DataError(InputError):
    """Text data that is missing, unreadable or too small."""


class CheckpointError(InputError):
    """A file that is not an intact checkpoint."""


class ResumeError(InputError):
    """A resume target that does not exist or does not fit the configuration."""


class SaveError(BdhError):
    """A checkpoint could not be written; earlier ones are untouched."""


class StoppedError(BdhError):
    """Training cannot continue; the last good step is saved."""


class NonFiniteError(StoppedError):
    """Loss or gradient norm is NaN or infinite; the update was not applied."""


class TrackingError(BdhError):
    """The tracking server refused or cannot be reached."""
