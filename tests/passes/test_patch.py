"""Patches: edits of one model that are switched as one, in any subset, and leave nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llmopt.errors import InputError
from llmopt.passes import PASSES, QuantizeGptq, choose
from llmopt.passes.base import Applied, Pass, PassContext, Patch, Phase, Swap, Verdict


class Config:
    """An object with a property, as transformers' configs have."""

    def __init__(self) -> None:
        self._kind = "given"

    @property
    def kind(self) -> str:
        return self._kind

    @kind.setter
    def kind(self, value: str) -> None:
        self._kind = value


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.register_buffer("table", torch.zeros(2))
        self.config = Config()
        self.note = "given"


def state(host: Host) -> tuple[Any, ...]:
    return (
        list(host._modules), list(host._parameters), list(host._buffers), host.first, host.second, host.first.weight,
        host.table, host.note, host.config.kind, dict(vars(host.config)), host.forward.__func__,
        "forward" in vars(host),
    )  # fmt: skip


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x is y or (not isinstance(x, torch.Tensor) and x == y) for x, y in zip(a, b, strict=True))


def every_kind_of_swap(host: Host) -> list[Swap]:
    return [
        Swap(host, "first", nn.Linear(2, 2)),
        Swap(host, "table", torch.ones(2)),
        Swap(host.second, "weight", nn.Parameter(torch.ones(2, 2))),
        Swap(host, "note", "changed"),
        Swap(host, "forward", lambda: "changed"),
        Swap(host, "added", 1),
        Swap(host.config, "kind", "changed"),
    ]


def test_a_patch_starts_switched_off_and_leaves_nothing_behind() -> None:
    host = Host()
    before = state(host)
    patch = Patch(every_kind_of_swap(host))
    assert not patch.enabled
    assert same(state(host), before)
    for _ in range(2):
        patch.enable()
        assert patch.enabled
        assert host.forward() == "changed"
        assert host.config.kind == "changed"
        assert host.table.sum() == 2
        assert host.second.weight.sum() == 4
        assert host.added == 1
        patch.disable()
        assert not patch.enabled
        assert same(state(host), before)
        assert not hasattr(host, "added")


def test_replaced_modules_keep_their_place_in_the_order() -> None:
    host = Host()
    patch = Patch([Swap(host, "first", nn.Identity())])
    patch.enable()
    assert [name for name, _ in host.named_children()] == ["first", "second"]


def test_switching_twice_is_switching_once() -> None:
    host = Host()
    before = state(host)
    patch = Patch(every_kind_of_swap(host))
    patch.enable()
    patch.enable()
    patch.disable()
    patch.disable()
    assert same(state(host), before)


def test_edits_of_one_attribute_stack_and_come_off_in_reverse() -> None:
    host = Host()
    given = host.first
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    one, two = Patch([Swap(host, "first", a)]), Patch([Swap(host, "first", b)])
    one.enable()
    two.enable()
    assert host.first is b
    two.disable()
    assert host.first is a
    one.disable()
    two.enable()
    assert host.first is b
    two.disable()
    assert host.first is given


def test_within_one_patch_the_last_edit_wins_and_the_first_value_comes_back() -> None:
    host = Host()
    patch = Patch([Swap(host, "note", "one"), Swap(host, "note", "two")])
    patch.enable()
    assert host.note == "two"
    patch.disable()
    assert host.note == "given"


@pytest.mark.parametrize("at", range(7))
def test_an_edit_that_fails_takes_the_others_back(at: int) -> None:
    host = Host()
    before = state(host)
    swaps = every_kind_of_swap(host)
    # a registered parameter takes no plain tensor: torch raises
    swaps.insert(at, Swap(host.second, "bias", torch.ones(2)))
    patch = Patch(swaps)
    with pytest.raises(TypeError, match="bias"):
        patch.enable()
    assert not patch.enabled
    assert same(state(host), before)


def test_a_hook_that_fails_takes_the_edits_back() -> None:
    host = Host()
    before = state(host)

    def fail() -> None:
        raise KeyboardInterrupt

    patch = Patch(every_kind_of_swap(host), on_enable=fail)
    with pytest.raises(KeyboardInterrupt):
        patch.enable()
    assert not patch.enabled
    assert same(state(host), before)


def test_the_hook_runs_at_each_switching_on() -> None:
    calls: list[int] = []
    patch = Patch(on_enable=lambda: calls.append(1))
    patch.enable()
    patch.enable()
    patch.disable()
    patch.enable()
    assert len(calls) == 2


def test_class_attributes_are_shadowed_not_changed() -> None:
    class Owner:
        kind = "of the class"

    owner, other = Owner(), Owner()
    patch = Patch([Swap(owner, "kind", "own")])
    patch.enable()
    assert (owner.kind, other.kind) == ("own", "of the class")
    patch.disable()
    assert "kind" not in vars(owner)


def test_a_model_under_a_patch_can_be_copied() -> None:
    host = Host()
    patch = Patch([Swap(host, "first", nn.Identity())])
    patch.enable()
    twin = copy.deepcopy(host)
    patch.disable()
    assert isinstance(twin.first, nn.Identity)
    assert isinstance(host.first, nn.Linear)


# ---- choosing


class _Own(Pass):
    name = "own_pass"
    phase = Phase.RUNTIME

    def check(self, ctx: PassContext) -> Verdict:
        return Verdict(True)

    def apply(self, ctx: PassContext) -> Applied:
        raise AssertionError


def test_none_means_all_and_order_follows_the_phase() -> None:
    chosen = choose(None)
    assert sorted(p.name for p in chosen) == sorted(PASSES)
    assert [p.phase for p in chosen] == sorted(p.phase for p in chosen)
    assert [p.name for p in choose([_Own(), "quantize_gptq"])] == ["quantize_gptq", "own_pass"]
    assert choose([]) == []


def test_one_name_or_pass_needs_no_list() -> None:
    assert [p.name for p in choose("quantize_gptq")] == ["quantize_gptq"]
    own = _Own()
    assert choose(own) == [own]


def test_options_given_with_the_object_are_kept() -> None:
    assert choose([QuantizeGptq(group_size=32)]) == [QuantizeGptq(group_size=32)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["quantise_gptq"], "nearest: quantize_gptq"),
        (["quantize-gptq"], "nearest: quantize_gptq"),
        (["zzz"], "expected names among"),
        ([3], "got 3"),
        ([None], "got None"),
        ([QuantizeGptq], "Pass objects"),
        (["quantize_gptq", QuantizeGptq()], "'quantize_gptq' 2 times"),
    ],
    ids=["misspelt", "dash", "unknown", "number", "none", "class", "twice"],
)
def test_what_is_no_pass_is_refused(given: list[Any], says: str) -> None:
    with pytest.raises(InputError, match=r"^passes: ") as caught:
        choose(given)
    assert says in str(caught.value)
    if says == "expected names among":
        assert "nearest" not in str(caught.value)
