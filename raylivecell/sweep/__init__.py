"""`sweep`: search for a better recipe with Ray Tune and Optuna around the training loop.

1. space, space_check    the searched fields and their ranges, and checks of them
2. study           the Optuna study, which can be resumed
   search          Ray Tune's search algorithm on that study
3. tune, trial     the Ray Tune run; one trial
   board           the table of running trials on the console
4. final_seeds     starting and best recipe trained again with fresh seeds
5. statistics, report    importance and comparison of fields; report.html
6. sweep           the command: 1 to 5
"""
