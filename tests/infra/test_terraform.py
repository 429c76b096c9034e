"""infra/terraform against the provider's schema and itself, as far as that goes without Terraform."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from job.jobs.spec import job_name
from tests.infra.configuration import FILES, FOLDER, IS_BLOCK, read
from tests.infra.provider_schema import schema
from tests.job.jobs.submitting import KINDS

pytestmark = pytest.mark.infra
REFERENCE = re.compile(r"(?<![\w.])(var|local|(?:data\.)?google_\w+)\.(\w+)(?:\[[^]]*\])?(?:\.(\w+))?")
LITERALS = ((bool, "bool"), (int, "number"), (list, "list"), (dict, "map"))


def problems(texts: Mapping[str, str] = FILES) -> list[str]:
    """What the provider's schema says against the blocks, and references that lead nowhere."""
    known, declared, found = schema(), set[tuple[str, str]](), []
    for kind, labels, body in read(texts):
        if kind in ("variable", "locals"):
            names = labels if kind == "variable" else body.keys() - {IS_BLOCK}
            declared |= {("var" if kind == "variable" else "local", name) for name in names}
        elif kind in ("resource", "data", "provider"):
            where = ".".join(labels)
            if struct := known[kind].get(labels[0]):
                found += [f"{where}{problem}" for problem in _against(body, known["structs"][struct])]
            else:
                found.append(f"{where}: the provider has no such {kind}")
            declared.add((f"data.{labels[0]}" if kind == "data" else labels[0], labels[-1]))
    references = [row for text in texts.values() for row in REFERENCE.findall(re.sub("#.*", "", text))]
    for root, name, attribute in references:
        if (root, name) not in declared:
            found.append(f"there is no {root}.{name}")
        elif attribute and root not in ("var", "local"):
            kind = "data" if root.startswith("data.") else "resource"
            if attribute not in known["attributes"][f"{kind} {root.removeprefix('data.')}"]:
                found.append(f"{root} has no {attribute}")
    used = {(root, name) for root, name, _ in references}
    return found + [f"nobody uses {'.'.join(row)}" for row in sorted(declared - used) if row[0] in ("var", "local")]


def _against(body: dict[str, Any], arguments: dict[str, Any]) -> Iterator[str]:
    given = {name: value for name, value in body.items() if name not in (IS_BLOCK, "dynamic", "lifecycle")}
    for dynamic in body.get("dynamic", []):
        given |= {name.strip('"'): made["content"] for name, made in dynamic.items()}
    yield from (f": {name} is missing" for name, (required, _) in arguments.items() if required and name not in given)
    for name, value in given.items():
        if name not in arguments:
            yield f": unknown {name}"
            continue
        wanted = arguments[name][1]
        kind, *inner = [wanted] if isinstance(wanted, str) else wanted
        blocks = [item for item in value if isinstance(item, dict) and IS_BLOCK in item] if type(value) is list else []
        literal = next((word for python, word in LITERALS if isinstance(value, python)), kind)
        if isinstance(value, str) and value.startswith('"'):
            literal = "string"
        if (kind == "block") != bool(blocks):
            yield (
                f": {name} is a block, not an argument" if kind == "block" else f": {name} is an argument, not a block"
            )
        elif not blocks and kind not in ("any", literal):
            yield f": {name} is a {literal} instead of a {kind}"
        elif len(blocks) > 1 and not inner[1]:
            yield f": there can be one {name} only"
        for block in blocks if kind == "block" else ():
            yield from (f".{name}{problem}" for problem in _against(block, schema()["structs"][inner[0]]))


def test_nothing_is_wrong():
    assert problems() == []


def test_planted_mistakes_are_noticed():
    for file, there, mistake, said in (
        ("storage", 'public_access_prevention    = "enforced"', 'public_acess_prevention = "enforced"', "unknown"),
        ("storage", "retention_duration_seconds = 0", 'retention_duration_seconds = "0"', "string instead of a number"),
        ("storage", 'action { type = "Delete" }', "", "lifecycle_rule: action is missing"),
        ("storage", 'action { type = "Delete" }', 'action = { type = "Delete" }', "action is a block, not"),
        ("storage", '"google_storage_bucket" "runs"', '"google_storage_buckets" "runs"', "the provider has no such"),
        ("versions", "  labels ", "  unused = 1\n  labels ", "nobody uses local.unused"),
        ("budget", "amount {", "amount {\n }\n amount {", "there can be one amount only"),
    ):  # fmt: skip
        assert there in FILES[f"{file}.tf"]
        found = problems({**FILES, f"{file}.tf": FILES[f"{file}.tf"].replace(there, mistake, 1)})
        assert any(said in problem for problem in found), (mistake, found)


def test_variables_are_validated():
    variables = {block.labels[0]: block.body for block in read() if block.kind == "variable"}
    assert [name for name, body in variables.items() if "validation" not in body and body["type"] != "bool"] == []
    text = (FOLDER / "terraform.tfvars.example").read_text().replace("# ", "")
    assert set(re.findall(r"^(\w+) += ", text, re.MULTILINE)) <= variables.keys()
    for name, fields in re.findall(r"^(\w+) += \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        known = set(re.findall(r"(\w+) = optional", variables[name]["type"]))
        assert set(re.findall(r"^ *(\w+) += ", fields, re.MULTILINE)) <= known


def test_jobs_may_do_little():
    roles = {block.labels[1]: block.body["role"].strip('"') for block in read() if "role" in block.body}
    assert {name: role for name, role in roles.items() if role.startswith("roles/")} == {
        "job_writes_runs": "roles/storage.objectUser",
        "job_reads_data": "roles/storage.objectViewer",
        "pull": "roles/artifactregistry.reader",
        "pods_act_as_job": "roles/iam.workloadIdentityUser",
        "nodes": "roles/container.defaultNodeServiceAccount",
    }
    text = FILES["identity.tf"]
    assert 'toset(["roles/logging.logWriter", "roles/batch.agentReporter"])' in text
    assert 'permissions = ["compute.instances.delete"]' in text
    # A VM deletes itself by its name, which begins with what it does.
    named = re.findall(r'"(\w+)"', re.search(r"for verb in \[([^]]*)\]", text)[1])
    assert sorted(named) == sorted(KINDS)
    assert all(job_name(verb, "celeba").startswith(f"{verb}-") for verb in named)


def test_buckets_outlive_terraform():
    text = FILES["storage.tf"]
    assert "force_destroy" not in text
    assert (
        "soft_delete_policy { retention_duration_seconds = 0 }" in text.partition('"google_storage_bucket" "runs"')[2]
    )
