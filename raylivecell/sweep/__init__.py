"""`sweep`: search for a better recipe with Ray Tune and Optuna around the training loop.

1. space, space_check    the searched fields and their ranges; checks of them
2. study           the Optuna study, which can be resumed
   search          Ray Tune's search algorithm on that study
3. tune, trial     Ray Tune's run; one trial
   board           the table of running trials on the console
4. final_seeds     start and best trained again with fresh seeds
5. statistics, report    what matters, as numbers and as report.html
6. sweep           the command: 1 to 5
"""
