"""Scores of a segmentation, by pixels and by cells. No Ray.

pixel_scores       Dice and IoU from pixel counts
instance_scores    mSA, panoptic quality, counts, from two label images
label_rules        torch-em's label images of overlapping cells
average_precision  LIVECell's COCO protocol
coco_results       reader for COCO results files of any tool
bootstrap          percentile intervals, also for sweeps
scores             all scores of one image, and of many images with intervals
"""
