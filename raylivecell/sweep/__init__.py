"""`sweep`: Ray Tune and Optuna around the training loop.

1. space, space_check    which fields are searched, over which ranges
2. study           the Optuna study, resumable
   search          Ray Tune's searcher on that study
3. tune, trial     Ray Tune's run; one trial
   board           the table of running trials on the console
4. final_seeds     the best trials again with new seeds
5. statistics, report    what mattered
6. sweep           the command: 1 to 5
"""
