"""`python -m raylivecell` is the command `raylivecell`."""

import sys

from raylivecell.cli import main

sys.exit(main())
