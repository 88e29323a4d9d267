"""Packages of a model that several processes run together: one file for each rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inductor_moe import compat
from inductor_moe.aoti.archive import Metadata
from inductor_moe.errors import ExportError, PackageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def rank_path(path: str | os.PathLike[str], mesh: DeviceMesh) -> Path:
    """The file of this rank: model.pt2 is model.rank0of2.pt2 on the first of two."""
    whole = Path(path)
    return whole.with_name(
        f"{whole.stem}.rank{mesh.get_local_rank()}of{mesh.size()}{whole.suffix}"
    )


def check_mesh(name: str, mesh: Any, error: type[Exception]) -> None:
    """Raise `error` unless it is a mesh of one dimension that this rank is on."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise error(f"{name}: device_mesh must be a DeviceMesh (got {type(mesh).__name__})")
    if mesh.ndim != 1 or mesh.get_coordinate() is None:
        raise error(
            f"{name}: device_mesh has {mesh.ndim} dimensions; it must be the one that the model "
            "was sharded over, mesh['name'] of several, with this rank on it"
        )


def check_sharded(model: Any, mesh: DeviceMesh | None) -> None:
    """Raise ExportError unless the model is sharded over just this mesh, or whole without one."""
    sharded = {m.sharded_over for m in model.modules() if hasattr(m, "sharded_over")}
    if mesh is None:
        if sharded:
            raise ExportError(
                f"export_generation: the model is sharded over {max(sharded)} ranks; pass the "
                "mesh as device_mesh="
            )
        return
    check_mesh("export_generation", mesh, ExportError)
    if sharded != {mesh.size()}:
        over = f"{max(sharded)} ranks" if sharded else "none; call parallelize first"
        raise ExportError(
            f"export_generation: device_mesh has {mesh.size()} ranks, but the model is sharded "
            f"over {over}"
        )
    if any(getattr(m, "exchange", "") == "all-to-all" for m in model.modules()):
        raise ExportError(
            "export_generation: all-to-all exchange waits for counts in Python; shard the model "
            'with exchange="all-reduce" or "auto", which a package takes for all-reduce'
        )


def join(metadata: Metadata, mesh: DeviceMesh | None, path: Path) -> None:
    """Let the methods of a package find their process group. Raises PackageError if none fits."""
    if mesh is None:
        if metadata.ranks > 1:
            raise PackageError(
                f"{path} is for rank {metadata.rank} of {metadata.ranks}; start that many "
                "processes, and pass their mesh as device_mesh="
            )
        return
    if (metadata.ranks, metadata.rank) != (mesh.size(), mesh.get_local_rank()):
        raise PackageError(
            f"{path} is for rank {metadata.rank} of {metadata.ranks}; this is rank "
            f"{mesh.get_local_rank()} of {mesh.size()}"
        )
    if not compat.name_process_group(metadata.group, mesh.get_group()):
        raise PackageError(
            f"{path}: the methods call their process group {metadata.group!r}, which is the name "
            "of another one here; make the meshes in the same order as where it was exported"
        )
