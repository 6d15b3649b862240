"""A safetensors file written tensor by tensor: nothing is held but the tensor at hand.

Source of the format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

# The format's name of every dtype that we write.
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
Spec = tuple[torch.dtype, tuple[int, ...]]


def nbytes(spec: Spec) -> int:
    """Of a tensor of this dtype and shape."""
    dtype, shape = spec
    return dtype.itemsize * math.prod(shape)


class TensorFile:
    """A new safetensors file; `write` its tensors in the order of `specs`. Writing releases the GIL.

    As a context manager: on success the file is flushed to disk, `checksum` (128 bits of BLAKE2b, in
    hexadecimal digits) and `nbytes` are set. Raises ValueError for a tensor that is not the next one.
    """

    def __init__(
        self, path: str | Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None
    ):
        self.checksum, self.nbytes = "", 0
        self._expected = list(specs.items())
        self._hash = blake2b(digest_size=16)
        self._file = open(path, "xb")  # noqa: SIM115  closed by __exit__
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name, (dtype, shape) in specs.items():
            begin, end = end, end + nbytes((dtype, shape))
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._put(len(text).to_bytes(8, "little") + text)
        self._expected.reverse()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, from whatever device."""
        if not self._expected or self._expected[-1] != (name, (tensor.dtype, tuple(tensor.shape))):
            raise ValueError(
                f"{name} {tensor.dtype} {list(tensor.shape)} is not the next tensor of this file"
            )
        self.write_parts(name, [tensor])

    def write_parts(self, name: str, parts: Iterable[Tensor]) -> None:
        """Append the next tensor from its consecutive parts, such as a stack's matrices, one at a time."""
        if not self._expected or self._expected[-1][0] != name:
            raise ValueError(f"{name} is not the next tensor of this file")
        dtype, shape = self._expected.pop()[1]
        missing = math.prod(shape)
        for part in parts:
            missing -= part.numel()
            if part.dtype != dtype or missing < 0:
                raise ValueError(
                    f"{name}: {part.dtype} {list(part.shape)} is no part of {dtype} {list(shape)}"
                )
            flat = part.detach().cpu().contiguous().reshape(-1)
            self._put(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        if missing:
            raise ValueError(f"{name} lacks {missing} numbers of its shape {list(shape)}")

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.nbytes += len(data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                if self._expected:
                    raise ValueError(f"{self._expected[-1][0]} was not written")
                self._file.flush()
                os.fsync(self._file.fileno())
                self.checksum = self._hash.hexdigest()
