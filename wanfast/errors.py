"""The errors a user can meet, one per kind of thing to mend."""


class RequestError(ValueError):
    """An argument breaks a rule: the message names the argument, the rule, the value and a value that works."""


class CheckpointError(ValueError):
    """A model file cannot be used: the message names the file and, where one is at fault, the tensor."""


class MemoryBudgetError(MemoryError):
    """What was asked for does not fit: the message gives the numbers and what would fit."""


class NumericsError(ArithmeticError):
    """A computation left the finite numbers: the message names the step and what may mend it."""


class NotFiniteError(RequestError):
    """Frames came out NaN or infinite: the message says what may mend it."""


class MediaError(OSError):
    """A picture or video cannot be read or written: the message names the file and what would work."""
