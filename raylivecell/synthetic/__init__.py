"""`synth`: synthetic phase-contrast images of cells in LIVECell's layout and JSON.

1. cell_shapes      positions and masks of cells
2. optics           masks -> an 8-bit phase-contrast-like image
3. layout           names, splits, paths and JSON entries in LIVECell's layout
   planted_defects  every defect that `prepare` must detect
4. writer           writes a complete dataset by steps 1 to 3
"""
