"""A trained network on images: `predict`, `evaluate`, `export`, and `raylivecell.load`.

segmenter          a network on one image, in this process
image_file         one image file -> its cells, pictures and table rows
actors             a function with a costly start on many items, on Ray Data
predict, results   a folder of images -> cells; result files and the tables merged from them
evaluate, calibrate    scores of a split, and watershed thresholds tuned on validation images
export, onnx_model a checkpoint as ONNX or .pt2, and reading ONNX files
"""
