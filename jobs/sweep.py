"""`raylivecell sweep` as a job: `ray job submit --working-dir . -- python jobs/sweep.py` and the same flags."""

import sys

from raylivecell.cli.main import main

sys.exit(main(["sweep", *sys.argv[1:]]))
