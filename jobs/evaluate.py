"""`raylivecell evaluate` as a job: `ray job submit --working-dir . -- python jobs/evaluate.py` and the same flags."""

import sys

from raylivecell.cli.main import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
