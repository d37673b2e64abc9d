"""`python -m raylivecell` runs the command `raylivecell`."""

import os
import sys


def _without_working_folder() -> list[str]:
    """sys.path without the working folder, which `-m` puts first: files downloaded into it must not be imported.

    The working folder is kept if it contains this package, as in a checkout.
    """
    here = os.path.realpath(os.getcwd())
    if here == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):
        return sys.path
    return [path for path in sys.path if os.path.realpath(path or here) != here]


if __name__ == "__main__":
    sys.path[:] = _without_working_folder()
    from raylivecell.cli.main import main

    sys.exit(main())
