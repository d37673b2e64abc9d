"""`synth`: drawn phase-contrast images of cells, with LIVECell's layout and JSON.

1. cell_shapes     where cells are, and the mask of each
2. optics          masks -> an 8-bit phase-contrast-like image
3. layout          names, splits and entries as LIVECell has them
   planted_defects every defect that `prepare` must find
4. writer          1 to 3 for a whole dataset
"""
