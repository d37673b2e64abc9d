"""`raylivecell evaluate` as a job, with the same flags: `ray job submit --working-dir . -- python jobs/evaluate.py ...`."""

import sys

from raylivecell.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
