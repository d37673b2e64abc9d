"""`raylivecell prepare` as a job, with the same flags: `ray job submit --working-dir . -- python jobs/prepare.py ...`."""

import sys

from raylivecell.cli import main

sys.exit(main(["prepare", *sys.argv[1:]]))
