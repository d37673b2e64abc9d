"""`raylivecell sweep` as a job, with the same flags: `ray job submit --working-dir . -- python jobs/sweep.py ...`."""

import sys

from raylivecell.cli import main

sys.exit(main(["sweep", *sys.argv[1:]]))
