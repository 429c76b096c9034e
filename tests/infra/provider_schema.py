"""The schema of Terraform's google provider: which arguments and blocks each resource has, of which type.

Terraform's registry is not asked: the bindings of CDK Terrain, a wheel on PyPI, hold what their generator read from the
provider. They write names in camelCase and put arguments and nested blocks into interfaces called `…Config` and so on.

    python -m tests.infra.provider_schema FOLDER    # downloads the wheel, keeps a small schema
"""

from __future__ import annotations

import gzip
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
_SMALL = "google-8.7.json"
_META = {"count", "for_each", "depends_on", "provider", "lifecycle", "provisioner", "connection"}


@cache
def schema() -> dict[str, Any]:
    """What `prepare` left, in Terraform's own names.

    `resource`, `data` and `provider` name the struct of each such thing; `structs` have its arguments by name, each
    `[required, type]`; `attributes` are what an expression may ask of `"resource NAME"` or `"data NAME"`. A type is
    `string`, `number`, `bool`, `any`, `["list", T]`, `["map", T]` or `["block", STRUCT, whether many]`.
    """
    path = FOLDER / _SMALL
    assert path.exists(), f"{path} is not there: run `make test-infra`, which prepares it"
    return dict(json.loads(path.read_text()))


def prepare(folder: Path) -> None:
    """Downloads the bindings and leaves the small schema; does nothing where it is there."""
    if (folder / _SMALL).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(download, check=True)
    [wheel] = folder.glob("cdktn_provider_google-*.whl")
    temporary = folder / f"{_SMALL}.part"
    temporary.write_text(json.dumps(_reduced(_jsii(wheel))))
    temporary.replace(folder / _SMALL)
    wheel.unlink()


def _jsii(wheel: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".jsii.tgz")]
        with archive.open(name) as file, tarfile.open(fileobj=file, mode="r|gz") as tar:
            for member in tar:
                if member.name in ("package/.jsii", "package/.jsii.gz"):
                    content = tar.extractfile(member)
                    data = content.read()
                    return dict(json.loads(gzip.decompress(data) if member.name.endswith(".gz") else data))
    raise AssertionError(f"{wheel} has no description of its types")


def _reduced(jsii: dict[str, Any]) -> dict[str, Any]:
    structs: dict[str, dict[str, Any]] = {}
    small: dict[str, Any] = {"resource": {}, "data": {}, "provider": {}, "attributes": {}, "structs": structs}
    types = jsii["types"]
    for fqn, described in types.items():
        _, module, name = fqn.split(".")
        if described["kind"] == "interface" and described.get("datatype"):
            structs[fqn] = {
                _snake(p["name"]): [not p.get("optional", False), _type(p["type"], types)]
                for p in described.get("properties", ())
            }
        if name == f"{module[0].upper()}{module[1:]}Config" or name == "GoogleProviderConfig":
            kind, terraform_name = _terraform_name(module)
            small[kind][terraform_name] = fqn
            properties = types.get(fqn.removesuffix("Config"), {}).get("properties", ())
            small["attributes"][f"{kind} {terraform_name}"] = sorted({"id"} | {_snake(p["name"]) for p in properties})
    for kind in ("resource", "data"):
        for struct in small[kind].values():
            for name in _META:
                structs[struct].setdefault(name, [False, "any"])
    return small


def _terraform_name(module: str) -> tuple[str, str]:
    if module == "provider":
        return "provider", "google"
    if module.startswith("dataGoogle"):
        return "data", _snake(module).removeprefix("data_")
    return "resource", f"google_{_snake(module)}"


def _type(described: dict[str, Any], types: dict[str, Any]) -> Any:
    if "primitive" in described:
        return {"boolean": "bool"}.get(described["primitive"], described["primitive"])
    if "fqn" in described:
        known = types.get(described["fqn"], {})
        return ["block", described["fqn"], False] if known.get("datatype") else "any"
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
