"""Exceptions that the user can fix: the command line prints one line and exits with 2."""

import errno

AGAIN = "and run the command again"
OS_FIXES = {
    errno.ENOSPC: f"free space on that disk, or choose another folder, {AGAIN}",
    errno.EDQUOT: f"free some of your quota, or choose another folder, {AGAIN}",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "choose a folder that you may read and write, or change its permissions",
    errno.EPERM: "choose a folder that you may read and write, or change its permissions",
    errno.ENAMETOOLONG: "use shorter names, or a folder with a shorter path",
    errno.EMFILE: f"raise the limit on open files (ulimit -n 65536) {AGAIN}",
    errno.ENFILE: f"raise the machine's limit on open files (fs.file-max) {AGAIN}",
    errno.ENOMEM: f"free memory, or use fewer --workers, {AGAIN}",
    errno.EIO: "check that disk: it cannot be read or written",
}
LONGEST = 300
"""Maximum characters quoted from another library's message."""


class UserError(Exception):
    """An error the user can fix. The message is one line: what is wrong, then how to fix it."""


class MachineError(UserError):
    """A failure of a machine, a disk or a network: a retry may succeed."""


class UnreadableImageError(ValueError):
    """An image file that cannot be used; the message gives the reason, without the file's name."""


class UnsupportedImageError(UnreadableImageError):
    """An intact file in a format that is not supported; the message names the format and how to convert it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"unsupported: {reason}")


class TooManyPixelsError(UnsupportedImageError):
    """An intact file with more pixels than are decoded."""


class DamagedImageError(UnreadableImageError):
    """A file that is truncated or inconsistent."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"damaged: {reason}")


def os_error_line(error: OSError, text: str = "") -> str:
    """Format an OSError as one line: the problem (`text`; default: its own message), then the fix for its errno."""
    text = shortened(text or str(error))
    fix = OS_FIXES.get(error.errno or 0)
    return f"{text}; {fix}" if fix and fix not in text else text


def shortened(text: str) -> str:
    """Shorten `text` to one line of at most LONGEST characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
