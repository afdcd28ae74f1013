"""Published weights: from the local cache where they are, else from the network, else one clear line within seconds.

The Hugging Face client retries an unreachable hub five times per file (23 s without a network); here one short request
decides first whether anything answers. `HF_HUB_OFFLINE=1` forbids every download, also those that do not come from the
hub.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from models import ModelError
from models.weights import first_line

PROBE_SECONDS = 4.0
LOCAL_WAYS = (
    "local ways: open_clip:ARCH/FILE, torchvision:ARCH/FILE, timm:ARCH/FILE (absolute: ARCH//...), local-dir:FOLDER"
)


def hub_file(repository: str, file_names: Sequence[str], wanted_by: str) -> Path:
    """Path of the first of `file_names` that the hub's `repository` holds; cached files need no network.

    Raises ModelError naming `wanted_by`, the model a user asked for: offline, no such repository, none of the files.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    try:
        for file_name in file_names:
            cached = try_to_load_from_cache(repository, file_name)
            if isinstance(cached, str):
                return Path(cached)
        _require_network(constants.ENDPOINT, wanted_by)
        for file_name in file_names:
            try:
                return Path(hf_hub_download(repository, file_name))
            except RemoteEntryNotFoundError:  # the hub answered that this repository lacks this file
                continue
    except HFValidationError as error:
        raise ModelError(f"{wanted_by}: {repository!r} is no hub repository (ORG/NAME): {first_line(error)}") from None
    except OSError as error:  # the hub's own errors derive from it
        raise ModelError(
            f"{wanted_by}: cannot fetch from hub repository {repository}: {first_line(error)}; {LOCAL_WAYS}"
        ) from None
    raise ModelError(f"{wanted_by}: hub repository {repository} has none of {', '.join(file_names)}")


def torchvision_file(url: str, wanted_by: str) -> Path:
    """Path of torchvision's weight file for `url` in torch's own cache, downloaded and hash-checked where it is absent.

    Raises ModelError naming `wanted_by`: offline, unreachable, hash mismatch.
    """
    import torch

    name = Path(urlsplit(url).path).name
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file():
        return file
    _require_network(url, wanted_by)
    digits = re.search(r"-([0-9a-f]{8,})\.", name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=digits.group(1) if digits else None)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's hash mismatch
        raise ModelError(f"{wanted_by}: cannot fetch {url}: {first_line(error)}; {LOCAL_WAYS}") from None
    return file


def _require_network(url: str, wanted_by: str) -> None:
    """Raise ModelError unless downloads are allowed and the host of `url` answers, through a proxy if one is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{wanted_by}: not in the local cache, and HF_HUB_OFFLINE is set; {LOCAL_WAYS}")
    host = urlsplit(url)
    try:
        request = urllib.request.Request(f"{host.scheme}://{host.netloc}/", method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # the host answered; whether the file is there, the download itself will tell
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ModelError(
            f"{wanted_by}: not in the local cache, and {host.netloc} does not answer ({reason}); {LOCAL_WAYS}"
        ) from None
