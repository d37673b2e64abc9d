"""Growth curves from the file names and cell counts of a time series. Pure functions; no Ray.

names              plate, condition, well, site and time in a file name
curves             means and spreads per well and time, replicates
fit                doubling time with its interval, and reasons not to trust it
"""
