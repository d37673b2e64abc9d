"""Target kinds: what the network learns of a cell image. A new kind is one module and its name in `registry`.

registry           names of the kinds -> `Target` objects
base               the interface of a kind: channels, drawing, loss, height map
foreground, boundary, distance    the kinds
sample_planes      order of the planes of a training sample
dice               the Dice loss, for the foreground and for boundaries
"""
