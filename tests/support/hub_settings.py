"""Settings of huggingface_hub in this process, which reads its variables when it is loaded."""

from pathlib import Path

import pytest
from huggingface_hub import constants


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Makes a folder the hub's cache, with no token and not offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Makes a server the hub."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
