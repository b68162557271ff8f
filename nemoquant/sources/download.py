"""A model fetched from the hub into its cache: only the files that are used, by the hub's own library.

1. The list of the model's files, with their sizes and the commit.
2. The settings. A config that is no Nemotron-H's, or a plan that can't be made, ends it here.
3. Room on the disk for the rest, or nothing of it is fetched.
4. The rest, file by file, all of that commit. A connection that breaks is taken up again within a file; what
   an ended run left of a file that was not whole is fetched anew, whole files stay.
"""

import errno
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemoquant.checkpoint.folder import MARGIN, nearest_folder
from nemoquant.checkpoint.modules import python_modules
from nemoquant.checkpoint.side_files import SERVING, is_side_file
from nemoquant.errors import HubError, Interrupted, listing
from nemoquant.files import plain_name, read_json
from nemoquant.layouts.modelopt import LEGACY
from nemoquant.model.parse import load_config
from nemoquant.progress import Count, Progress
from nemoquant.sources.hub import COMMIT, HubName, Wanted
from nemoquant.sources.hub_cache import CONFIG, INDEX, SINGLE, folder_of, shards_of
from nemoquant.units import size

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

SETTINGS = (CONFIG, LEGACY, INDEX)
RECORDS = ("nemoquant.json", "nemoquant_converted.json")  # each lists the files that it was made with
CARD = "README.md"  # its head has the licence
ANSWER = 30.0  # seconds that the list of a model's files may take to begin


def fetch(name: HubName, cache: Path, wanted: Wanted, progress: Progress) -> Path:
    """Fetch a model into a cache; returns the folder of its snapshot.

    Raises:
        HubError: the hub has no such model or revision, does not give it, can't be reached, or the disk has
            no room. CheckpointError: it is no model that we read. Interrupted: what is whole stays.
    """
    from huggingface_hub import HfApi

    with _explained(name, cache), _understood(name):
        api = HfApi()
        info = api.model_info(name.model, revision=name.revision, files_metadata=True, timeout=ANSWER)
        begun = _Download(name, cache, info, progress)
    return begun.run(wanted)


class _Download:
    """The download of one commit.

    Attributes:
        sizes: bytes of the model's files by name, those in folders aside.
        blobs: the names of their contents in the cache, which commits share.
    """

    def __init__(self, name: HubName, cache: Path, info: "ModelInfo", progress: Progress) -> None:
        self.name, self.cache, self.progress = name, cache, progress
        self.commit = str(info.sha)
        if not COMMIT.fullmatch(self.commit):
            raise HubError(f"{name}: the hub names no commit of it; expected one, check HF_ENDPOINT")
        files = [file for file in info.siblings or [] if plain_name(file.rfilename)]
        self.sizes = {file.rfilename: max(0, int(file.size or 0)) for file in files}
        self.blobs = {f.rfilename: str(f.lfs.sha256 if f.lfs else f.blob_id) for f in files}
        self.root = folder_of(cache, name.model)
        self.snapshot = self.root / "snapshots" / self.commit
        self._done = self._total = 0

    def run(self, wanted: Wanted) -> Path:
        if CONFIG not in self.sizes:
            raise HubError(
                f"{self.name} has no {CONFIG} on the hub, but {listing(list(self.sizes)) or 'no files'}; "
                f"expected a checkpoint of a Nemotron-H model"
            )
        if missing := [file for file in wanted.also if file not in self.sizes]:
            raise HubError(
                f"{self.name} has no file {missing[0]} on the hub; expected one of its files, such as "
                f"{listing(list(self.sizes))}"
            )
        records = RECORDS if wanted.weights else ()
        self._get_all("settings", [file for file in (*SETTINGS, *records) if file in self.sizes])
        load_config(self.snapshot / CONFIG)  # refuses what is no model of ours
        wanted.admit(self.snapshot / CONFIG)
        if wanted.weights:
            files = self._weights() + self._others(wanted.also)
            rest = [file for file in files if self._lacks(file)]
            self._check_room(rest)
            self._get_all("download", rest)
            while code := [file for file in self._modules() if file in self.sizes and self._lacks(file)]:
                self._get_all("settings", code)  # what a file imports stands in it
        return self.snapshot

    def _weights(self) -> list[str]:
        """Names of the files with weights: what the index names, or the only one where there is no index."""
        named = shards_of(self.snapshot / INDEX) if INDEX in self.sizes else [SINGLE]
        missing = [file for file in named if file not in self.sizes]
        if missing or not named:
            raise HubError(
                f"{self.name} has no {listing(missing) or f'file that its {INDEX} names'} on the hub; "
                f"expected a checkpoint in safetensors format: name another model or revision"
            )
        return named

    def _others(self, also: Collection[str]) -> list[str]:
        """Names of the other files that are used: tokenizer, templates, licences, code that is named."""
        modules = self._modules()
        listed: set[str] = set()
        for record in RECORDS:
            files = _object(self.snapshot / record).get("files") if record in self.sizes else None
            listed |= files.keys() if isinstance(files, dict) else set()
        return [
            file
            for file in self.sizes
            if file in (CARD, *also)
            or file in listed
            or is_side_file(file, modules)
            or SERVING.fullmatch(file)
        ]

    def _modules(self) -> list[str]:
        """Python files that configs name, and those that the files that are there import."""
        return sorted(python_modules(self.snapshot, _object(self.snapshot / CONFIG)))

    def _lacks(self, file: str) -> bool:
        return not (self.snapshot / file).exists()

    def _check_room(self, files: Collection[str]) -> None:
        shared = [
            plain_name(blob) and (self.root / "blobs" / blob).exists()
            for blob in (self.blobs[file] for file in files)
        ]
        needed = sum(self.sizes[file] for file, is_there in zip(files, shared, strict=True) if not is_there)
        free = shutil.disk_usage(nearest_folder(self.cache)).free
        if needed and free < needed + MARGIN:
            raise HubError(
                f"{self.name}: {size(needed)} to fetch, {size(free)} free on the disk of {self.cache}; make "
                f"room, or set HF_HUB_CACHE to a folder of another disk"
            )

    def _get_all(self, stage: str, files: Collection[str]) -> None:
        self._done, self._total = 0, sum(self.sizes[file] for file in files)
        for file in files:
            self._get(stage, file)
        if files:
            self.progress(stage, self._total, self._total, "")

    def _get(self, stage: str, file: str) -> None:
        """Fetch a file. The first one leaves the name of the revision in the cache, as ``refs/main``."""
        from huggingface_hub import constants, hf_hub_download

        before = self._done

        def counted(nbytes: int) -> None:
            self._done = max(before, min(self._done + nbytes, before + self.sizes[file]))
            self.progress(stage, min(self._done, self._total - 1), self._total, file)

        with _explained(self.name, self.cache):
            got = hf_hub_download(
                self.name.model,
                file,
                revision=(self.name.revision or "main") if file == CONFIG else self.commit,
                cache_dir=self.cache,
                endpoint=constants.ENDPOINT,
                tqdm_class=_counting(counted),
            )
        if Path(got).parent != self.snapshot:
            raise HubError(f"{self.name} changed on the hub while it was fetched; run it again")
        self._done = before + self.sizes[file]


def _object(path: Path) -> Mapping[str, Any]:
    """A JSON file's object; what is none has no keys, and says so when it is used."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _counting(count: Count) -> Any:
    """A class that stands in for the library's progress bar: it shows nothing and counts bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **(options | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on their way to the disk. A class without this would get a second bar for them."""

    return Bar


@contextmanager
def _explained(name: HubName, cache: Path) -> Iterator[None]:
    """Errors of the hub and of its library, each in one line that says what to do."""
    import httpx
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name.model}"
    signing = "set HF_TOKEN or run `hf auth login`"
    try:
        yield
    except KeyboardInterrupt:
        ended = Interrupted()
        ended.kept = f"files that are whole are kept in {cache}: the same command goes on"
        raise ended from None
    except errors.GatedRepoError:
        raise HubError(
            f"{name} is gated: accept its terms at {page} with your account, then {signing} with its token"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{name}: {constants.ENDPOINT} has no such model, or does not show it to you, and there is no "
            f"file or folder of that name here; check the name, and if it is private {signing}"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(
            f"{name.model} has no revision {name.revision} on the hub; expected a branch, a tag or a commit: "
            f"see {page}/commits/main"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError) as error:
        answer = error.response if isinstance(error, errors.HfHubHTTPError) else None
        if answer is not None and answer.status_code == httpx.codes.UNAUTHORIZED:
            raise HubError(f"{name}: {constants.ENDPOINT} does not take the token; {signing}") from None
        raise HubError(
            f"{name} can't be fetched from {constants.ENDPOINT}: {_reason(error)}; run it again to go on, or "
            f"without --download to use what the cache has"
        ) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way = "make room, or set HF_HUB_CACHE to a folder of another disk" if full else "see to it"
        raise HubError(f"{name}: {error.filename or cache}: {error.strerror or error}; {way}") from None
    except ValueError as error:  # an answer that is no JSON, an address that is none
        raise HubError(
            f"{name} can't be fetched from {constants.ENDPOINT}: {_reason(error)}; check HF_ENDPOINT"
        ) from None


@contextmanager
def _understood(name: HubName) -> Iterator[None]:
    """An answer that is JSON, but not that of a hub, surprises the library in these ways."""
    try:
        yield
    except (TypeError, KeyError, AttributeError):
        raise HubError(f"{name}: the answer is no list of a model's files; check HF_ENDPOINT") from None


def _reason(error: Exception) -> str:
    """What happened, in a line: of errors that only say that a file is not there, the cause."""
    from huggingface_hub import errors

    is_vague = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if is_vague and error.__cause__ is not None else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(cause).__name__
