"""A manifest with a typo or a gap, and who notices it: each field of each kept manifest is misspelt, and dropped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from job.jobs.backends.kubernetes_manifests import manifest
from tests.job.jobs.kubernetes_jobs import CASES, GOLDEN
from tests.job.jobs.kubernetes_jobs import judged as judged_by

Path = tuple[Any, ...]

ONE = ("1.34",)
"""One version of Kubernetes is enough here, and takes a third of the time."""
FREE = ("labels", "annotations", "nodeSelector")
"""Maps whose keys are anybody's."""
OPTIONAL = {
    "affinity",
    "nodeAffinity",
    "requiredDuringSchedulingIgnoredDuringExecution",
    "matchExpressions",
    "values",
    "annotations",
    "podReplacementPolicy",
    "enableServiceLinks",
    "nodeSelector",
    "tolerations",
    "key",
    "operator",
    "value",
    "effect",
    "nvidia.com/gpu",
    "onJobFailureMessagePatterns",
}
"""Fields that another right manifest may lack, so that only the kept file says that this one has them."""


def judged(made: dict[str, Any]) -> list[str]:
    return judged_by(made, ONE)


def fields(thing: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of all keys of all maps."""
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield (*path, key)
            yield from fields(value, (*path, key))
    elif isinstance(thing, list):
        for index, value in enumerate(thing):
            yield from fields(value, (*path, index))


def parent_of(thing: Any, path: Path) -> dict[str, Any]:
    for key in path[:-1]:
        thing = thing[key]
    return thing


def misspelt(made: dict[str, Any], path: Path) -> dict[str, Any]:
    changed = copy.deepcopy(made)
    parent = parent_of(changed, path)
    parent[path[-1] + "s"] = parent.pop(path[-1])
    return changed


def dropped(made: dict[str, Any], path: Path) -> dict[str, Any]:
    changed = copy.deepcopy(made)
    del parent_of(changed, path)[path[-1]]
    return changed


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture
def kept(case):
    return yaml.safe_load((GOLDEN / f"{case}.yaml").read_text())


def test_a_misspelt_field_is_noticed_by_schemas_or_rules(kept):
    unnoticed = [path for path in fields(kept) if not judged(misspelt(kept, path))]
    assert [path for path in unnoticed if not set(path[:-1]) & set(FREE)] == []


def test_a_field_that_is_gone_is_noticed_by_schemas_or_rules_unless_it_may_be(kept):
    unnoticed = [path for path in fields(kept) if not judged(dropped(kept, path))]
    assert {path[-1] for path in unnoticed if not set(path[:-1]) & set(FREE)} <= OPTIONAL


@pytest.mark.parametrize("mutated", [misspelt, dropped])
def test_the_kept_file_notices_all_of_them(kept, case, mutated):
    made = manifest(*CASES[case])
    assert made == kept
    assert all(mutated(kept, path) != made for path in fields(kept))


def test_a_value_of_another_type_is_noticed(kept):
    wrong = {str: 5, int: "five", bool: "yes"}
    for path in fields(kept):
        value = parent_of(kept, path)[path[-1]]
        if type(value) not in wrong or set(path[:-1]) & {*FREE, "metadata"}:
            continue
        changed = copy.deepcopy(kept)
        parent_of(changed, path)[path[-1]] = wrong[type(value)]
        assert noticed(changed), path


def noticed(made: dict[str, Any]) -> bool:
    try:
        return bool(judged(made))
    except (TypeError, AttributeError):
        # Rules look at manifests whose types are right: a wrong one has been noticed when they fall over it.
        return True
