"""`raylivecell train` as a job: `ray job submit --working-dir . -- python jobs/train.py` and the same flags."""

import sys

from raylivecell.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
