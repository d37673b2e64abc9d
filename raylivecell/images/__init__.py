"""Image files -> grey pixels -> the network's 8-bit scale. No Ray, no torch.

1. formats        TIFF, PNG, JPEG, BMP -> uint8 or uint16 (H, W); ambiguous files are refused
   planes         names and choice of the planes of a stack: time, depth, channel
   pixel_types    floating-point, signed and wide numbers -> uint8 or uint16
   channels       colour and palette images -> one grey channel
   tiff, tiff_tags, tiff_segments, tiff_codecs, tiff_stacks, ome_xml, jpeg, file_kinds    details of the formats
   microscopes    package: CZI, LIF and ND2 through optional libraries
   ranges         files whose parts are read when needed
2. grey_levels    statistics of one image: background, spread, padding
3. intensity      the rule that maps stored values to 0..255
4. scale          the factor to the network's pixel size, and back
"""
