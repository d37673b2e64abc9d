"""Annotation files -> cells -> label images. No Ray, no torch.

1. json_stream    streaming JSON reader
   coco           COCO's records: images, polygons, run lengths
   categories     selection of the categories that are cells
2. label_images   label images: TIFF, PNG, NPY
   image_files    annotation files of one image in any format
   errors         damaged or unsupported annotation files
3. rle            run-length encoding of masks, COCO's formats
4. drawing        polygons -> label image -> foreground and border map
5. pixel_outlines labels <-> outlines on pixel corners, exact
   imagej_rois    RoiSet.zip and .roi of ImageJ
   geojson        GeoJSON of QuPath
"""
