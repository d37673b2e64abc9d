"""How good a segmentation is, by pixels and by cells. No torch, no Ray.

pixel_scores       Dice and IoU from counted pixels
instance_scores    mSA, panoptic quality, counts, from two label images
average_precision  LIVECell's COCO protocol
coco_results       COCO results files of any tool
bootstrap          percentile intervals, for these and for sweeps
scores             all of it for one image, and for many with intervals
"""
