"""The one label value that every loss, metric and pipeline leaves out."""

# uint8 on disk and on the way to the device, so that it is also the largest label there is:
# a dataset has at most 255 classes.
IGNORE_LABEL = 255
