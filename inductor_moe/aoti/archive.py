"""The file format of a generation package: a .pt2 archive with its weights stored once.

    data/aotinductor/prefill/...  data/aotinductor/decode/...   what AOTInductor compiled
    data/generation/weights/N                                   the bytes of one tensor storage
    extra/inductor_moe.json                                     `Metadata`

AOTInductor's loaders find the methods by name. The constants are given to each of them from the
one set of weights, as tensors that both use and neither owns.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inductor_moe import compat
from inductor_moe.errors import PackageError

FORMAT = 1
METADATA = "extra/inductor_moe.json"
WEIGHTS = "data/generation/weights/"
COMPILED = "data/aotinductor/"  # where AOTInductor's loaders look


@dataclasses.dataclass(frozen=True)
class Constant:
    """Where a constant of a method lies: a view of the storage in record `weight`."""

    weight: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """A tensor of a session, zero before the first token."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a runner needs to know.

    device        "cpu" or "cuda"; compute_capability of the GPU it was compiled for, as "9.0"
    methods       name -> constant name -> Constant
    states        in the order of the methods' inputs, after tokens, temperature, top_p, uniforms
    weight_bytes  the size of every weight record
    sampling      "top_p", or "greedy": the methods do not read temperature, top_p and uniforms
    ranks, rank   how many processes run the model together, each with its package, and whose
                  this is; group: the name by which the methods call that process group
    checksums     record -> CRC-32, of what the methods were compiled to
    """

    format: int
    torch: str
    model_type: str
    device: str
    compute_capability: str
    batch_size: int
    max_seq_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    states: tuple[StateSpec, ...]
    methods: dict[str, dict[str, Constant]]
    weight_bytes: tuple[int, ...]
    sampling: str = "top_p"  # what packages without the field do
    ranks: int = 1
    rank: int = 0
    group: str = ""
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Metadata:
        """Raises PackageError for another format, with what to do about it."""
        fields = json.loads(text)
        found = fields.get("format")
        if found != FORMAT:
            raise PackageError(
                f"the package has format {found}; this version of inductor_moe reads format "
                f"{FORMAT}: export the model again, or install the version that wrote it"
            )
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        fields["weight_bytes"] = tuple(fields["weight_bytes"])
        fields["states"] = tuple(
            StateSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in fields["states"]
        )
        fields["methods"] = {
            method: {
                name: Constant(
                    c["weight"], c["dtype"], tuple(c["shape"]), tuple(c["stride"]), c["offset"]
                )
                for name, c in constants.items()
            }
            for method, constants in fields["methods"].items()
        }
        return Metadata(**fields)


class WeightTable:
    """The distinct storages behind the constants of all methods."""

    def __init__(self) -> None:
        self.storages: list[torch.UntypedStorage] = []
        self._numbers: dict[int, int] = {}

    def add(self, tensor: Tensor) -> Constant:
        storage = tensor.untyped_storage()
        number = self._numbers.setdefault(storage.data_ptr(), len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        return Constant(
            number,
            dtype_name(tensor.dtype),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
        )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write(
    path: str | os.PathLike[str],
    files: Mapping[str, Sequence[str]],
    storages: Sequence[torch.UntypedStorage],
    metadata: Metadata,
) -> None:
    """Write a package: the compiled files of each method, the weights, the metadata.

    The file appears under its name when it is whole.
    """
    partial = Path(f"{os.fspath(path)}.partial")
    try:
        records: dict[str, Any] = {
            f"{WEIGHTS}{number}": storage for number, storage in enumerate(storages)
        }
        checksums = {
            f"{COMPILED}{method}/{os.path.basename(file)}": zlib.crc32(Path(file).read_bytes())
            for method, paths in files.items()
            for file in paths
        }
        records[METADATA] = dataclasses.replace(metadata, checksums=checksums).to_json()
        compat.write_pt2(partial, files, records)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Archive:
    """A package opened for reading. Raises PackageError if it is not one, or not whole."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise PackageError(f"{self.path}: no such file")
        try:
            self._reader = compat.pt2_reader(self.path)
            self.names: tuple[str, ...] = tuple(self._reader.get_all_records())
        except RuntimeError as error:
            raise PackageError(
                f"{self.path} is not a .pt2 package, or was cut off while it was written or copied"
            ) from error

    def read(self, name: str) -> bytes:
        """A record."""
        try:
            return bytes(self._reader.get_record(name))
        except RuntimeError as error:
            raise PackageError(f"{self.path}: record {name} is damaged or missing") from error

    def metadata(self) -> Metadata:
        """Raises PackageError if the package holds no generation methods."""
        if METADATA not in self.names:
            raise PackageError(
                f"{self.path} holds no generation methods; inductor_moe.export_generation writes "
                "packages that do"
            )
        try:
            return Metadata.from_json(self.read(METADATA).decode())
        except PackageError as error:
            raise PackageError(f"{self.path}: {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise PackageError(f"{self.path}: {METADATA} is damaged ({error})") from error

    def check(self, metadata: Metadata) -> None:
        """Raises PackageError if compiled code is damaged; PyTorch's loader would run it."""
        for name, checksum in metadata.checksums.items():
            if zlib.crc32(self.read(name)) != checksum:
                raise PackageError(f"{self.path}: record {name} is damaged")

    def weights(self, metadata: Metadata, device: torch.device) -> list[Tensor]:
        """Every weight record as bytes on a device; on the CPU a view of the mapped file."""
        size = self.path.stat().st_size
        mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        found = []
        for number, length in enumerate(metadata.weight_bytes):
            offset = self._reader.get_record_offset(f"{WEIGHTS}{number}") if length else 0
            if offset + length > size:
                raise PackageError(
                    f"{self.path}: weight {number} reaches past the end of the file"
                )
            found.append(mapped[offset : offset + length].to(device))
        return found


def view(weights: Sequence[Tensor], constant: Constant) -> Tensor:
    """The tensor that a constant stands for, sharing memory with its weight record."""
    dtype = getattr(torch, constant.dtype)
    return torch.as_strided(
        weights[constant.weight].view(dtype), constant.shape, constant.stride,
        weights[constant.weight].storage_offset() // dtype.itemsize + constant.offset,
    )  # fmt: skip
