"""Files of microscopes, by the libraries of the extra `formats`.

files       list the planes of a file, decode one; errors of the libraries, a stream for them, checks of their XML
czi_file, lif_file, nd2_file    Zeiss CZI by czifile, Leica LIF by liffile, Nikon ND2 by nd2
"""
