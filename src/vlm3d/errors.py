"""Every error that a user can cause, and the exit code that the command line gives it.

```
VLM3DError                    1   anything below; catch this to catch them all
├── ConfigError               2   a setting is unknown, has the wrong type or contradicts another
├── InputError                3   an input cannot be used
│   ├── UnreadableFileError       truncated, damaged, not the format that it claims
│   ├── ArchiveError              a zip with unsafe paths, too many files or too many bytes
│   ├── NotAChestCTError          readable, but not a 3D CT in HU, or not of a chest
│   ├── SeriesError               no series, several of them, or slices that make no volume
│   ├── MaskError                 an anatomy mask on another grid or with unknown labels
│   └── DataError                 a data set's tables, files or splits contradict each other
├── CheckpointError           4   a checkpoint folder lacks, or has too much of, something
├── OutputError               5   the output cannot be written (permission, full disk)
├── MissingExtraError         6   an optional package is needed; the message says what to type
├── WeightsUnavailableError   7   pretrained weights are in no place that was looked in
├── ResourceError             8   the machine has too little memory for what was asked
└── TrainingError             9   training cannot go on: a loss is no number
```

130 is the exit code of an interrupt (Ctrl-C), 143 that of a termination (SIGTERM); both clean up what is half done. A
message is one line that says what is wrong, what was found and what to do. Messages carry nothing that a header says of
a patient, only paths and numbers; a file or folder that is named after a patient is shown under that name.
"""

from __future__ import annotations


class VLM3DError(Exception):
    """Base of all errors that a user can cause; its text is one line fit to print."""

    exit_code = 1


class ConfigError(VLM3DError):
    """A setting is unknown, of the wrong type, or contradicts another."""

    exit_code = 2


class InputError(VLM3DError):
    """An input file or folder cannot be used."""

    exit_code = 3


class UnreadableFileError(InputError):
    """The file is missing, truncated, damaged, or not of the format that it claims."""


class ArchiveError(InputError):
    """An archive holds unsafe paths, or more files or bytes than are accepted."""


class NotAChestCTError(InputError):
    """The image can be read but is not a 3D chest CT in Hounsfield units."""


class SeriesError(InputError):
    """A DICOM folder holds no usable series, or the slices of one do not form a volume."""


class MaskError(InputError):
    """An anatomy mask does not fit the scan's grid or holds labels that no table knows."""


class DataError(InputError):
    """A data set's tables, files or splits are missing something or contradict each other."""


class CheckpointError(VLM3DError):
    """A checkpoint folder is incomplete, damaged, or made for another model."""

    exit_code = 4


class OutputError(VLM3DError):
    """An output cannot be written."""

    exit_code = 5


class MissingExtraError(VLM3DError):
    """An optional package is needed and not installed."""

    exit_code = 6


class WeightsUnavailableError(VLM3DError):
    """Pretrained weights were found in none of the places looked in."""

    exit_code = 7


class ResourceError(VLM3DError):
    """The machine has too little memory for what was asked."""

    exit_code = 8


class TrainingError(VLM3DError):
    """Training cannot go on: a loss or a gradient is no number."""

    exit_code = 9


INTERRUPTED_EXIT_CODE = 130
TERMINATED_EXIT_CODE = 143
