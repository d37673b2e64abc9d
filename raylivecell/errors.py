"""The one exception that means "the user can mend this": the command line prints it and exits with 2."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line: the thing that is wrong, then the mend."""


class UnreadableImageError(ValueError):
    """An image file that cannot be used; the message gives the reason, without the file's name."""


class UnsupportedImageError(UnreadableImageError):
    """A sound file of a kind that is not read; the message names the kind and a way out."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"unsupported: {reason}")


class DamagedImageError(UnreadableImageError):
    """A file that is cut off or contradicts itself."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"damaged: {reason}")
