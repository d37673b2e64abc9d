"""`raylivecell prepare` as a job: `ray job submit --working-dir . -- python jobs/prepare.py` and the same flags."""

import sys

from raylivecell.cli.main import main

sys.exit(main(["prepare", *sys.argv[1:]]))
