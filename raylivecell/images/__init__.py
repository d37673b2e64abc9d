"""Image files -> grey pixels -> the network's 8-bit scale. No Ray, no torch.

1. formats        TIFF, PNG, JPEG, BMP -> uint8 or uint16 (H, W); ambiguous files are refused
   channels       colour and palette images -> one grey channel
   tiff, tiff_tags, tiff_segments, jpeg, file_kinds    details of the formats
2. grey_levels    statistics of one image: background, spread, padding
3. intensity      the rule that maps stored values to 0..255
4. scale          the factor to the network's pixel size, and back
"""
