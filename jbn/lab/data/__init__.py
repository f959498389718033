"""The data of a run: handwritten digits or folders of images, cut into batches."""

from jbn.lab.data.images import digits as digits
from jbn.lab.data.images import mnist as mnist
