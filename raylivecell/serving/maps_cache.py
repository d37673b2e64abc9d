"""The network's maps of recent images: the same image with other thresholds is segmented without the network."""

import hashlib
import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from raylivecell.network.windows import Maps, Network


class MapsCache:
    """A network with the maps of its most recent images, in bounded memory; for any number of threads."""

    def __init__(self, network: Network, max_bytes: int) -> None:
        self.network, self.max_bytes = network, max_bytes
        self._maps: OrderedDict[bytes, Maps] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, image: NDArray[np.uint8]) -> Maps:
        """Maps of `image` (H, W), float32 (C, H, W), not to be changed."""
        key = hashlib.blake2b(image.tobytes(), key=repr(image.shape).encode()[:64]).digest()
        with self._lock:
            if key in self._maps:
                self._maps.move_to_end(key)
                return self._maps[key]
        maps = self.network(image)
        maps.flags.writeable = False
        with self._lock:
            if key not in self._maps and maps.nbytes <= self.max_bytes:
                self._maps[key] = maps
                self._bytes += maps.nbytes
                while self._bytes > self.max_bytes:
                    self._bytes -= self._maps.popitem(last=False)[1].nbytes
        return maps
