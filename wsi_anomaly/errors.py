"""The error tree: everything a user can cause, and nothing else.

    WsiAnomalyError
    ├── OptionsError            an option, a pipeline file or a command line that makes no sense
    ├── CohortError             the slides to work on cannot be found or told apart
    ├── KeywordError            a keyword list cannot be used
    ├── AnnotationError         a user's mask, outline or label file cannot be used
    ├── SlideError              one slide cannot be worked on; the others go on
    │   ├── MissingMppError     microns per pixel are not known
    │   ├── NoTissueError       there is nothing on the glass
    │   └── CorruptSlideError   the file is damaged
    ├── OutputError             an output cannot be written or read
    │   ├── MissingOutputError  an earlier stage has not run
    │   ├── StaleOutputError    it was made with other options or by another version
    │   └── LockedOutputError   another process is writing it
    ├── ModelError              a model folder is incomplete, damaged or does not fit
    └── PluginError             a plug-in cannot be used
        ├── UnknownPluginError  no installed package offers that name
        └── MissingExtraError   the plug-in needs a package that is not installed

The command line prints these without a traceback. A message names the thing, what is wrong with it, and what to do.
Any other exception is a bug in this package and shows its traceback.
"""


class WsiAnomalyError(Exception):
    """Something the user can mend."""


class OptionsError(WsiAnomalyError):
    """An option, a pipeline file or a command line that makes no sense."""


class CohortError(WsiAnomalyError):
    """The slides to work on cannot be found or told apart."""


class KeywordError(WsiAnomalyError):
    """A keyword list cannot be used."""


class AnnotationError(WsiAnomalyError):
    """A user's mask, outline or label file cannot be used."""


class SlideError(WsiAnomalyError):
    """One slide cannot be worked on; the others go on."""


class MissingMppError(SlideError):
    """Microns per pixel are not known."""


class NoTissueError(SlideError):
    """There is nothing on the glass."""


class CorruptSlideError(SlideError):
    """The file is damaged."""


class OutputError(WsiAnomalyError):
    """An output cannot be written or read."""


class MissingOutputError(OutputError):
    """An earlier stage has not run."""


class StaleOutputError(OutputError):
    """The output was made with other options or by another version."""


class LockedOutputError(OutputError):
    """Another process is writing the output."""


class ModelError(WsiAnomalyError):
    """A model folder is incomplete, damaged or does not fit."""


class PluginError(WsiAnomalyError):
    """A plug-in cannot be used."""


class UnknownPluginError(PluginError):
    """No installed package offers a plug-in of that name."""


class MissingExtraError(PluginError):
    """The plug-in needs a package that is not installed."""
