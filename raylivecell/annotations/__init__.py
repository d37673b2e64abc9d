"""Annotation files -> cells -> label images. No Ray, no torch.

1. json_stream    streaming JSON reader
   coco           COCO's records: images, polygons, run lengths
   categories     selection of the categories that are cells
2. label_images   label images: TIFF, PNG, NPY
   imagej_rois    RoiSet.zip and .roi of ImageJ
   geojson        GeoJSON of QuPath
   image_files    annotation files of one image in any of these formats
   errors         damaged or unsupported annotation files
3. rle            run-length encoding of masks, COCO's formats
   pixel_outlines labels <-> outlines on pixel corners, exact
4. drawing        polygons -> label image -> foreground and border map
"""
