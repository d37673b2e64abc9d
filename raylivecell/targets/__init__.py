"""Target kinds: the kinds of network output. To add a kind, write one module and add its name to `registry`.

registry           names of the kinds -> `Target` objects
base               the interface of a kind: channels, drawing, loss, height map
foreground, boundary, distance    the kinds
sample_planes      order of the planes of a training sample
dice               the Dice loss, for the foreground and for boundaries
masked             losses without the ignored pixels
"""
