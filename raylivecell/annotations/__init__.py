"""Annotation files -> cells -> label images. No Ray, no torch.

1. json_stream    large JSON, record by record
   coco           COCO's records: images, polygons, run lengths
   categories     which categories are cells
2. rle            masks as COCO's compressed run lengths
3. drawing        polygons -> label image -> foreground and border map
"""
