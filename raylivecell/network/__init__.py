"""The network and what it is trained with. torch, but no Ray.

unet, monai_networks    the networks
losses             BCE + Dice, and the losses of boundaries and distances
optimizer          Adam and learning-rate schedules
transfer           arrays -> tensors on the device
windows            large images in overlapping windows (no torch)
forward            a network on whole images
"""
