"""The schema of Terraform's google provider: which arguments and blocks each resource has, of which type.

Terraform's registry is not asked: the bindings of CDK Terrain, a wheel on PyPI, hold what their generator read from the
provider. They write names in camelCase and put arguments and nested blocks into interfaces called `…Config` and so on.

    python -m tests.infra.provider_schema FOLDER    # downloads the wheel, keeps a small schema
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

WHEEL = "cdktn-provider-google==21.1.0"
FOLDER = Path(__file__).parents[2] / ".venv/provider-schema"
_SMALL = "google-8.7-structs.json"


@cache
def structs() -> dict[str, Any]:
    """What `prepare` left: arguments and attributes by name, in Terraform's words, each `[required, type]`.

    A type is `string`, `number`, `bool`, `any`, `["list", T]`, `["map", T]` or `["block", STRUCT, whether many]`.
    """
    path = FOLDER / _SMALL
    assert path.exists(), f"{path} is not there: run `make test-infra`, which prepares it"
    return dict(json.loads(path.read_text()))


def struct_of(kind: str, name: str = "") -> str:
    """The struct of the arguments of a resource, of data or of a provider; that of its attributes lacks `Config`."""
    if kind == "provider":
        return "provider.GoogleProviderConfig"
    module = name.removeprefix("google_") if kind == "resource" else f"data_{name}"
    module = re.sub(r"_(.)", lambda match: match[1].upper(), module)
    return f"{module}.{module[0].upper()}{module[1:]}Config"


def prepare(folder: Path) -> None:
    """Downloads the bindings and leaves the small schema; does nothing where it is there."""
    if (folder / _SMALL).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(download, check=True)
    [wheel] = folder.glob("cdktn_provider_google-*.whl")
    types, small = _types(wheel), {}
    for fqn, described in types.items():
        _, module, name = fqn.split(".")
        if described.get("datatype") or name.lower() == module.lower():
            properties = [
                p for p in described.get("properties", ()) if described.get("datatype") or "Input" not in p["name"]
            ]
            small[f"{module}.{name}"] = {
                _snake(p["name"]): [not p.get("optional"), _type(p["type"], types)] for p in properties
            }
    (folder / f"{_SMALL}.part").write_text(json.dumps(small))
    (folder / f"{_SMALL}.part").replace(folder / _SMALL)
    wheel.unlink()


def _types(wheel: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".jsii.tgz")]
        with archive.open(name) as file, tarfile.open(fileobj=file, mode="r|gz") as tar:
            [data] = [tar.extractfile(member).read() for member in tar if member.name == "package/.jsii"]
    return dict(json.loads(data)["types"])


def _type(described: dict[str, Any], types: dict[str, Any]) -> Any:
    if "primitive" in described:
        return {"boolean": "bool"}.get(described["primitive"], described["primitive"])
    if "fqn" in described:
        is_block = types.get(described["fqn"], {}).get("datatype")
        return ["block", described["fqn"].partition(".")[2], False] if is_block else "any"
    if "collection" in described:
        element = _type(described["collection"]["elementtype"], types)
        if described["collection"]["kind"] == "array" and element[0] == "block":
            return ["block", element[1], True]
        return ["list" if described["collection"]["kind"] == "array" else "map", element]
    # A union of the real type and of what stands for a value that is not known yet.
    choices = [_type(choice, types) for choice in described["union"]["types"]]
    return next((choice for choice in choices if choice != "any"), "any")


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda match: f"_{match[0].lower()}", name)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
