"""Every error that a user can cause.

    QLinearError
    ├── SchemeError        a scheme, format or granularity that does not exist or does not fit
    ├── NumericsError      NaN or infinity where a number has to be
    ├── CheckpointError    a folder that is not a checkpoint, or is damaged
    │   └── SourceLostError    a checkpoint that could no longer be read
    ├── OutputError        a place that cannot be written to
    ├── DataError          calibration or evaluation data that cannot be used
    ├── StructureError     a model whose blocks cannot be found or run
    └── DeviceError        a device that is not there, or has too little memory

Each message is one line: what is wrong, where, and how to mend it. The command line prints it as it is
and exits with 2. All are ValueErrors, so code that wraps qlinear needs no import to catch them.
"""


class QLinearError(ValueError):
    """The root: a mistake in what the caller gave, never a failure of qlinear.

    known_to_all: whether every process of a job raises it, so that one of them may speak for all.
    """

    known_to_all = False


class SchemeError(QLinearError):
    """A scheme, format or granularity that does not exist, or does not fit the tensor."""


class NumericsError(QLinearError):
    """NaN or infinity in a weight, an activation or a statistic."""


class CheckpointError(QLinearError):
    """A source that is not a checkpoint, is damaged, or is already quantized."""


class SourceLostError(CheckpointError):
    """A source that was sound when it was opened, and could not be read later: what it gave until then is valid."""


class OutputError(QLinearError):
    """An output folder that cannot be used: not empty, too small a disk, in use."""


class DataError(QLinearError):
    """Calibration or evaluation data that cannot be read or does not fit the model."""


class StructureError(QLinearError):
    """A model whose decoder blocks cannot be found or run."""


class DeviceError(QLinearError):
    """A device to compute on that is not there, or has too little memory."""
