"""`raylivecell predict` as a job, with the same flags: `ray job submit --working-dir . -- python jobs/predict.py ...`."""

import sys

from raylivecell.cli import main

sys.exit(main(["predict", *sys.argv[1:]]))
