"""A trained network on images: `predict`, `evaluate`, `export`, and `raylivecell.load`.

segmenter          a network on one image, in this process
image_file         one file -> its cells, pictures and table rows
actors             a function with a costly start over many items, on Ray Data
predict, results   a folder of images -> cells, and the merged tables
evaluate, calibrate    scores of a split, and the thresholds chosen on validation images
export, onnx_model a checkpoint as ONNX or .pt2, and ONNX read again
"""
