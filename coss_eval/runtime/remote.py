"""Addresses and names on hubs: nothing is fetched from there, and the message says how to."""

from __future__ import annotations

import re

from coss_eval.errors import UsageError

_ADDRESS = re.compile(r"(https?|s3|gs|ftp|file|hf)://|https?:/[^/]|(timm:)?(hf-hub|hf_hub|hf|huggingface):")
_HUB = re.compile(r"(?:hf[-_]hub|hf|huggingface):/*([^@]+)|huggingface\.co/([^/]+/[^/?#]+(?:/[^/?#]+)?)")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def refuse_remote(source: str) -> None:
    """UsageError for an address ("https://...") or a name on a hub ("hf-hub:timm/resnet18"), with how to get it."""
    if not _ADDRESS.match(source):
        return
    hub = _HUB.search(source)
    name = next((found for found in hub.groups() if found), None) if hub else None
    how = _download(name) if name else "curl -LO or a browser"
    what = "the folder" if name else "the file"
    raise UsageError(f"{source} is not fetched from here: download it ({how}) and give {what} that it is saved as")


def perhaps_remote(source: str, *, data: bool = False) -> str:
    """The end of a message about a file or folder that is not there: how to get it, if it is a name on the hub.

    ``data``: of a data set, not of a network.
    """
    if not _NAME.fullmatch(source) or source.startswith("."):
        return ""
    how = _download(f"datasets/{source}" if data else source)
    return f"; if it is a name on the Hugging Face hub, download it first ({how}) and give the folder"


def _download(name: str) -> str:
    """The command that gets a repository of the hub; a data set's begins with "datasets/"."""
    kind = "--repo-type dataset " if name.startswith("datasets/") else ""
    plain = "/".join(name.removeprefix("datasets/").split("/")[:2])
    return f"hf download {kind}{plain} --local-dir FOLDER"
