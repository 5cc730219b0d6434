"""Use of several machines, here several processes that call their host by different names."""

import time
from typing import Any

import pytest

from bdh_mlflow.distributed import Group, Report
from bdh_mlflow.training import nodes
from tests.groups import in_group


@pytest.mark.parametrize(
    ("hosts", "groups"),
    [
        (("one", "one", "one"), {"system"}),
        (("one", "two.example", "two.example"), {"system/one", "system/two.example"}),
        (("one", "two", "a/b"), {"system/one", "system/two", "system/a_b"}),
    ],
)
def test_every_machine_is_sampled_once_under_its_name(hosts: tuple[str, ...], groups: set[str]) -> None:
    def body(world: Group) -> Any:
        world.hosts = hosts
        logged: list[dict[str, float]] = []
        samples = nodes.sampled(world, lambda values, step: logged.append(values), time.time()) if world.leads_node() else None
        if world.rank and samples:
            samples.close()
        world.exchange(Report())  # the others have posted
        if samples and not world.rank:
            samples.close()
        return logged

    logged, *others = in_group(3, body)
    assert others == [[], []]
    assert {key.removesuffix("/cpu_utilization_percentage") for key in logged[-1] if key.endswith("/cpu_utilization_percentage")} == groups
