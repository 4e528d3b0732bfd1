"""A GLB reader of the tests' own, after the format's specification."""

import io
import json
import struct

import numpy as np
from PIL import Image

_TYPES = {5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


class GlbFile:
    """The document, the attributes of its one primitive, and its images."""

    def __init__(self, path):
        data = path.read_bytes()
        magic, version, length = struct.unpack("<4sII", data[:12])
        size, kind = struct.unpack("<I4s", data[12:20])
        assert (magic, version, length, kind) == (b"glTF", 2, len(data), b"JSON")
        self.document = json.loads(data[20 : 20 + size])
        binary, kind = struct.unpack("<I4s", data[20 + size : 28 + size])
        assert kind == b"BIN\0" and 28 + size + binary == len(data) and size % 4 == binary % 4 == 0
        self.binary = data[28 + size :]
        ((primitive,),) = (mesh["primitives"] for mesh in self.document["meshes"])
        self.attributes = {name: self._accessor(index) for name, index in primitive["attributes"].items()}
        self.faces = self._accessor(primitive["indices"]).reshape(-1, 3).astype(np.int64)
        (self.material,) = self.document["materials"]

    def image(self, texture):
        """(H, W, C) uint8 of a texture reference."""
        source = self.document["textures"][texture["index"]]["source"]
        return np.asarray(Image.open(io.BytesIO(self._view(self.document["images"][source]["bufferView"]))))

    def _view(self, index):
        view = self.document["bufferViews"][index]
        return self.binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]

    def _accessor(self, index):
        accessor = self.document["accessors"][index]
        values = np.frombuffer(self._view(accessor["bufferView"]), _TYPES[accessor["componentType"]])
        assert len(values) == accessor["count"] * _WIDTHS[accessor["type"]]
        return values.reshape(accessor["count"], -1)
