"""What the daemon is told: on the command line, or in a TOML file whose keys are the long options.

    qmp = "/run/backup/qmp.sock"
    workers = 4
    cluster-size = "64K"

    [[image]]
    filename = "/srv/data.img"
    node-name = "data"

The command line wins, and its images come on top of the file's.  An unknown key is an error: a misspelt one would be
a setting that silently does nothing.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from shmcbw.clusters import check_cluster_size
from shmcbw.sizes import parse_size

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class ImageOption:
    """An image to serve: its path, and its node's name ("": one made from the path)."""

    filename: str
    node_name: str = ""

    @classmethod
    def parse(cls, text: str) -> ImageOption:
        """``filename=PATH,node-name=NAME``, in any order; a comma in a path is doubled, as in QEMU.  ValueError."""
        found: dict[str, str] = {}
        for part in re.split(r"(?<!,),(?!,)", text):
            key, equals, value = part.replace(",,", ",").partition("=")
            if key not in ("filename", "node-name") or not equals or not value or key in found:
                raise ValueError(f"{text!r} is not filename=PATH[,node-name=NAME]")
            found[key] = value
        if "filename" not in found:
            raise ValueError(f"{text!r} has no filename=PATH")
        return cls(found["filename"], found.get("node-name", ""))

    def name(self, taken: Sequence[str]) -> str:
        """The node's name: as told, or from the file's name, made well-formed and unlike those that are taken."""
        if self.node_name:
            return self.node_name
        stem = re.sub(r"[^-._a-zA-Z0-9]", "_", os.path.basename(self.filename).partition(".")[0])
        stem = (stem if stem[:1].isalpha() else f"image{stem}")[:24]
        number, name = 1, stem
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        return name


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that `shmcbw serve` can be told."""

    images: tuple[ImageOption, ...] = ()
    qmp: str | None = None
    name: str | None = None
    workers: int = 2
    cluster_size: int | None = None
    slots: int | None = None
    state_dir: str | None = None
    detach_jobs: bool = False
    nbd_listen: str | None = None
    nbd_tls: tuple[str, str] | None = None
    nbd_tls_authority: str | None = None
    log_level: str = "info"

    def over(self, given: dict[str, Any]) -> Options:
        """These options, with those that were given in their place; images are added."""
        images = self.images + tuple(given.pop("images", ()))
        return replace(self, images=images, **{key: value for key, value in given.items() if value is not None})


def read_config(path: str) -> Options:
    """The options of a TOML file; ValueError says which key is wrong, OSError if it can't be read."""
    with open(path, "rb") as file:
        try:
            found = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: {error}") from None
    known = {each.name.replace("_", "-"): each.name for each in fields(Options) if each.name != "images"}
    given: dict[str, Any] = {}
    for key, value in found.items():
        try:
            if key == "image":
                given["images"] = [_image(each) for each in value]
            elif key in known:
                given[known[key]] = _checked(key, value)
            else:
                raise ValueError(f"no such setting; there are {', '.join(sorted(known))} and [[image]]")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {key}: {error}") from None
    return Options().over(given)


def _image(table: dict[str, Any]) -> ImageOption:
    if not isinstance(table, dict) or not set(table) <= {"filename", "node-name"} or "filename" not in table:
        raise ValueError("an image is a table of filename and, if wanted, node-name")
    return ImageOption(str(table["filename"]), str(table.get("node-name", "")))


def _checked(key: str, value: Any) -> Any:
    if key == "cluster-size":
        return check_cluster_size(parse_size(value) if isinstance(value, str) else int(value))
    if key in ("workers", "slots"):
        if type(value) is not int or value < 1:
            raise ValueError(f"{value!r} is not a number above 0")
        return value
    if key == "detach-jobs":
        if type(value) is not bool:
            raise ValueError(f"{value!r} is neither true nor false")
        return value
    if key == "nbd-tls":
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"{value!r} is not a certificate and a key")
        return tuple(map(str, value))
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    if key == "log-level" and value not in LOG_LEVELS:
        raise ValueError(f"{value!r} is none of {', '.join(LOG_LEVELS)}")
    return value
