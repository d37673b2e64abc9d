"""Inference with a trained network: `predict`, `evaluate`, `export`, and `raylivecell.load`.

segmenter          segment one image in this process
image_file         segment one image file: cells, output images and table rows
stacks             list the planes of files with several, and read one
actors             batch inference on Ray Data with a pool of actors
predict, results   segment a folder of images; result files, and the tables merged from them
growth             growth curves of the wells in those tables
evaluate, calibrate    scores of a split; watershed thresholds tuned on validation images
label_files        label images of other tools, to be scored by evaluate
export, graph_files, onnx_model   write a checkpoint as one file; its graph as ONNX or .pt2; read ONNX files
bioimageio, model_card, torchscript   write a bioimage.io package; its rdf.yaml and README.md, its TorchScript weights
"""
