"""Image files -> gray pixels -> the network's 8-bit scale. No Ray, no torch.

1. decode         TIFF, PNG, JPEG, BMP -> uint8 or uint16 (H, W), or an error where a reading would be a guess
   channels       colour and palette images -> one gray plane
   tiff, tiff_tags, tiff_segments, jpeg, file_kinds    the formats
2. grey_levels    statistics of one image: background, spread, padding
3. intensity      the rule that maps stored values to 0..255
"""
