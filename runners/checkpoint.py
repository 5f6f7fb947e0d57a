"""Checkpoints: nested state in safetensors and JSON, written whole or not at all, found out when damaged.

A checkpoint is a folder::

    000007-step-70000/
        SHA256SUMS            of all files below; `sha256sum -c SHA256SUMS` checks it by hand
        meta.json             env_steps, score, what the caller says about it
        state.json            the nested state; a tensor stands there as the file and the name it is stored under
        model.safetensors     a module's weights under their own names, one file for each module's state_dict
        tensors.safetensors   all other tensors

or one file, which is an uncompressed zip of these. Nothing in it can run code when it is loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from runners.disk import ASIDE, DiskFull, clear_disk_full, discard_folder, new_folder, replace_file, write_file

__all__ = ["CheckpointError", "Checkpoints", "DiskFull", "load_checkpoint", "save_checkpoint", "save_checkpoint_file"]

_LOG = logging.getLogger(__name__)

_VERSION = 1
_OTHER_TENSORS = "tensors.safetensors"
_SUMS = "SHA256SUMS"
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    safetensors.SafetensorError,
    zipfile.BadZipFile,
)

Nested = Any
"""dicts with str, int, float, bool or None as keys, lists, tuples, tensors, str, int, float, bool, None."""


class CheckpointError(RuntimeError):
    """No checkpoint can be read here. The message says why."""


class Checkpoints:
    """A run's folder of checkpoints: the last two, and the one with the highest score.

    One process writes; others may read at the same time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._damaged: set[Path] = set()

    def save(self, env_steps: int, state: Nested, meta: Mapping[str, Any], score: float | None = None) -> Path:
        """Write a checkpoint, then drop those that are neither among the last two nor the best.

        Args:
            score: higher is better; the newer of two equals is the best. None or NaN: not a candidate.

        Raises:
            DiskFull: nothing has changed.
            TypeError: ``state`` holds something else than ``Nested`` says.
        """
        for leftover in self.folder.glob(f"*{ASIDE}"):
            shutil.rmtree(leftover)
        path = self.folder / f"{self._next_number():06d}-step-{env_steps}"
        save_checkpoint(path, state, {"env_steps": env_steps, "score": score, "meta": dict(meta)})
        self._prune()
        return path

    def latest(self) -> tuple[Nested, dict[str, Any], Path] | None:
        """State, meta and folder of the newest checkpoint that is whole; None if there is none at all.

        A damaged one is passed over with a warning, and dropped by the next ``save``.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        return self._first_whole(self._all()[::-1])

    def best(self) -> tuple[Nested, dict[str, Any], Path] | None:
        """The same for the highest score; None if no checkpoint has one."""
        return self._first_whole(self._by_score())

    def _first_whole(self, candidates: list[Path]) -> tuple[Nested, dict[str, Any], Path] | None:
        errors = []
        for path in candidates:
            try:
                state, about = load_checkpoint(path)
            except CheckpointError as error:
                self._damaged.add(path)
                errors.append(str(error))
                continue
            for message in errors:
                _LOG.warning("%s; using %s instead", message, path)
            return state, about["meta"], path
        if errors:
            raise CheckpointError(f"no checkpoint in {self.folder} can be used: " + "; ".join(errors))
        return None

    def _all(self) -> list[Path]:
        """Oldest first. Numbers, not env_steps, say the age: a run that fell back repeats env_steps."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if p.is_dir() and _number(p) is not None]
        return sorted(found, key=lambda p: _number(p) or 0)

    def _next_number(self) -> int:
        found = self._all()
        return (_number(found[-1]) or 0) + 1 if found else 1

    def _by_score(self) -> list[Path]:
        """Highest score first, and of equals the newer first."""
        scored = [(score, i, p) for i, p in enumerate(self._all()) if (score := _score(p)) is not None]
        return [p for *_, p in sorted(scored, reverse=True)]

    def _prune(self) -> None:
        whole = [p for p in self._all() if p not in self._damaged]
        best = [p for p in self._by_score() if p not in self._damaged]
        for path in set(self._all()) - {*whole[-2:], *best[:1]}:
            discard_folder(path)


def save_checkpoint(path: Path, state: Nested, about: Mapping[str, Any]) -> None:
    """Write the folder ``path``, which must not exist, whole or not at all.

    Numbers and tensors come back bit for bit. A module's ``state_dict()`` gets a file of its own, named after the key
    it lies under, that ``safetensors.torch.load_file`` turns into what ``load_state_dict`` takes.

    Args:
        about: JSON values that are readable without loading the state.

    Raises:
        DiskFull: no room; nothing is left behind.
        TypeError: something that cannot be saved, named by its place in ``state``.
    """
    with clear_disk_full(path), new_folder(path) as folder:
        for name, data in _summed(_contents(state, about)):
            write_file(folder / name, data)


def save_checkpoint_file(file: Path, state: Nested, about: Mapping[str, Any]) -> None:
    """The same as one file, which replaces what is there. Raises what ``save_checkpoint`` does."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in _summed(_contents(state, about)):
            archive.writestr(zipfile.ZipInfo(name), data)  # without a date: equal states make equal files
    with clear_disk_full(file):
        replace_file(file, buffer.getvalue())


def _contents(state: Nested, about: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file."""
    files: dict[str, dict[str, Tensor]] = {_OTHER_TENSORS: {}}
    encoded = _encode(state, (), files)
    yield "meta.json", json.dumps(dict(about), indent=2).encode()
    yield "state.json", json.dumps({"version": _VERSION, "state": encoded}).encode()
    for name, tensors in files.items():
        yield name, safetensors.torch.save(tensors)


def load_checkpoint(path: Path) -> tuple[Nested, dict[str, Any]]:
    """The state, its tensors on the CPU, and ``about``, of a folder or of one file.

    Raises:
        CheckpointError: missing, truncated or altered files, or another version; a file of something else.
    """
    path = Path(path)
    try:
        contents = _read_summed(path if path.is_dir() else _open_file(path))
        about, document = json.loads(contents.pop("meta.json")), json.loads(contents.pop("state.json"))
        if document["version"] != _VERSION:
            raise CheckpointError(f"checkpoint {path} is of version {document['version']}, not {_VERSION}")
        files = {name: safetensors.torch.load(data) for name, data in contents.items()}
        return _decode(document["state"], files), about
    except _UNREADABLE as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error})") from error


# -- nested state as JSON ----------------------------------------------------------------------------------------------


def _encode(value: Nested, place: tuple[str, ...], files: dict[str, dict[str, Tensor]]) -> Any:
    """JSON for ``value``; its tensors go into ``files`` and leave their address."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Tensor):
        return _put(value, _OTHER_TENSORS, ".".join(place) or "tensor", files)
    if isinstance(value, list):
        return [_encode(v, (*place, str(i)), files) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": _encode(list(value), place, files)}
    if isinstance(value, OrderedDict) and value and all(isinstance(v, Tensor) for v in value.values()):
        # Module.state_dict() answers an OrderedDict, an optimiser's a dict.
        stem = place[-1] if place else "model"
        file = f"{stem}.safetensors"
        if file in files:
            file = f"{'.'.join(place)}.safetensors"
        return {"$dict": [[name, _put(tensor, file, name, files)] for name, tensor in value.items()]}
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: _encode(v, (*place, k), files) for k, v in value.items()}
        for key in value:
            if key is not None and not isinstance(key, bool | int | float | str):
                raise TypeError(f"{'.'.join(place)} has the key {key!r}; use strings or numbers")
        return {"$dict": [[k, _encode(v, (*place, str(k)), files)] for k, v in value.items()]}
    raise TypeError(
        f"{'.'.join(place) or 'the state'} is a {type(value).__module__}.{type(value).__qualname__}, which a "
        "checkpoint cannot hold; turn it into a tensor or plain Python values"
    )


def _put(tensor: Tensor, file: str, name: str, files: dict[str, dict[str, Tensor]]) -> dict[str, list[str]]:
    tensors = files.setdefault(file, {})
    while name in tensors:  # as for the keys 1 and "1"
        name += "'"
    # A copy of its own: safetensors refuses tensors that share memory, as tied weights do.
    tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return {"$tensor": [file, name]}


def _decode(value: Any, files: dict[str, dict[str, Tensor]]) -> Nested:
    """The inverse of :func:`_encode`."""
    if isinstance(value, list):
        return [_decode(v, files) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        file, name = value["$tensor"]
        return files[file][name]
    if "$tuple" in value:
        return tuple(_decode(v, files) for v in value["$tuple"])
    if "$dict" in value:
        return {k: _decode(v, files) for k, v in value["$dict"]}
    return {k: _decode(v, files) for k, v in value.items()}


# -- files -------------------------------------------------------------------------------------------------------------


def _summed(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """The files, and SHA256SUMS after them."""
    sums = ""
    for name, data in files:
        sums += f"{hashlib.sha256(data).hexdigest()}  {name}\n"
        yield name, data
    yield _SUMS, sums.encode()


def _open_file(file: Path) -> zipfile.Path:
    """Raises BadZipFile; CheckpointError for the archive of another program."""
    archive = zipfile.ZipFile(io.BytesIO(file.read_bytes()))
    if _SUMS not in archive.namelist():
        raise CheckpointError(f"{file} was not saved by this program: it has no {_SUMS}")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in archive.infolist()):
        raise CheckpointError(f"{file} was changed by another program: it is compressed or encrypted")
    return zipfile.Path(archive)


def _read_summed(folder: Path | zipfile.Path) -> dict[str, bytes]:
    """The files that SHA256SUMS lists, each as its sum says."""
    contents = {}
    for line in (folder / _SUMS).read_text("ascii").splitlines():
        expected, name = line.split("  ")
        data = (folder / Path(name).name).read_bytes()
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError(f"{name} is not what was written: its checksum differs")
        contents[name] = data
    return contents


def _number(path: Path) -> int | None:
    number, _, steps = path.name.partition("-step-")
    return int(number) if number.isdecimal() and steps.isdecimal() else None


def _score(path: Path) -> float | None:
    try:
        score = json.loads((path / "meta.json").read_bytes())["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return score if isinstance(score, int | float) and not math.isnan(score) else None
