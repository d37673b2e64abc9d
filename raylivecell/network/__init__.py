"""The network, its loss and its optimizer. torch, but no Ray.

unet, monai_networks    the networks
tracing            whether a network is being exported
losses             BCE + Dice, plus the loss of the target kind
optimizer          Adam and learning-rate schedules
transfer           arrays -> tensors on the device
windows            processing of large images in overlapping windows (no torch)
averaging          test-time augmentation (no torch)
forward            inference on images of any size
"""
