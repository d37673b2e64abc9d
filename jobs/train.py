"""`raylivecell train` as a job, with the same flags: `ray job submit --working-dir . -- python jobs/train.py ...`."""

import sys

from raylivecell.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
