"""`raylivecell predict` as a job: `ray job submit --working-dir . -- python jobs/predict.py` and the same flags."""

import sys

from raylivecell.cli.main import main

sys.exit(main(["predict", *sys.argv[1:]]))
