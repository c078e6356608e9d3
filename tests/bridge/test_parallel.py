"""How a model is spread over ranks: every part is somewhere, under the right name, and joins to the same tensor."""

import itertools
from collections import defaultdict
from typing import Any

import pytest
import torch
from canonical_models import EMBEDDING, tiny_model
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.parallel import (
    LOCAL_CUTS,
    NO_CUTS,
    Cuts,
    Layout,
    Model,
    Rank,
    check_layout,
    cut_of,
    join,
    joined_shape,
    model_of,
    padded_rows,
    part_count,
    pieces,
    shift,
)
from finebridge.bridge.sections import sections_of
from hypothesis import given, settings
from hypothesis import strategies as st

LAYER = "decoder.layers.{}."
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
DENSE = Model(4, 0, 0, tied=False)


@st.composite
def layouts(draw: st.DrawFn, layers: int = 4) -> Layout:
    tp, pp, ep = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    etp = draw(st.sampled_from([None, *(size for size in (1, 2, 4) if tp % size == 0)]))
    vpp = draw(st.sampled_from([None, 2])) if pp > 1 else None
    places = pp * (vpp or 1)
    if layers % places or draw(st.booleans()):
        marks = sorted(draw(st.lists(st.integers(0, layers), min_size=places - 1, max_size=places - 1)))
        counts = [stop - start for start, stop in itertools.pairwise([0, *marks, layers])]
        return Layout(tp, pp, vpp, ep, etp, tuple(counts))
    return Layout(tp, pp, vpp, ep, etp)


@settings(max_examples=60, deadline=None)
@given(
    layout=layouts(), tied=st.booleans(), experts=st.sampled_from([0, 4]), mla=st.booleans(), mtp=st.integers(0, 2),
    cuts=st.sampled_from([NO_CUTS, LOCAL_CUTS]),
)  # fmt: skip
def test_the_parts_on_all_ranks_join_to_the_same_model(
    layout: Layout, tied: bool, experts: int, mla: bool, mtp: int, cuts: Cuts
) -> None:
    whole = tiny_model(vocab=16, tied=tied, bias=True, experts=experts, mla=mla, mtp=mtp, q_lora=not cuts)
    whole = {name: tensor for name, tensor in whole.items() if not (cuts and "linear_kv_down" in name)}
    model = model_of(whole)
    assert model == Model(4, experts, mtp, tied)
    held: dict[tuple[Rank, int], dict[str, torch.Tensor]] = defaultdict(dict)
    back: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for name, tensor in whole.items():
        for piece in pieces(name, tensor.shape, layout, model, cuts=cuts):
            part = torch.cat(piece.views(tensor), piece.axis or 0)
            assert tuple(part.shape) == piece.shape(tensor.shape)
            assert piece.name not in held[piece.rank, piece.chunk]
            held[piece.rank, piece.chunk][piece.name] = part
            back[name][piece.rank.tp % part_count(name, layout, cuts=cuts)] = part
    assert {rank for rank, _ in held} <= set(layout.ranks())
    for name, tensor in whole.items():
        parts = [back[name][number] for number in range(part_count(name, layout, cuts=cuts))]
        assert torch.equal(join(name, parts, cuts=cuts), tensor), name
        assert joined_shape(name, parts[0].shape, layout, cuts=cuts) == tuple(tensor.shape)
    for part in held.values():
        here = model_of(part)  # raises when a rank's own counting has a gap
        assert here.experts in (0, experts // layout.ep)
    counts = layout.layers(4)
    for (rank, chunk), part in held.items():
        assert model_of(part).layers == len(counts[rank.pp][chunk])


@given(
    layers=st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any),
    pp=st.sampled_from([2, 4]),
)  # fmt: skip
def test_every_layer_is_on_one_stage_in_order(layers: list[int], pp: int) -> None:
    layout = Layout(pp=pp, vpp=4 // pp, layer_list=tuple(layers))
    spans = layout.layers(sum(layers))
    in_order = [layer for chunk in range(4 // pp) for stage in range(pp) for layer in spans[stage][chunk]]
    assert in_order == list(range(sum(layers)))
    assert [len(spans[stage][chunk]) for chunk in range(4 // pp) for stage in range(pp)] == layers


def test_layers_go_where_megatron_puts_them() -> None:
    """The examples in a comment of ``get_num_layers_to_build`` in megatron-core."""
    assert [[list(chunk) for chunk in stage] for stage in Layout(pp=2, vpp=4).layers(8)] == [
        [[0], [2], [4], [6]],
        [[1], [3], [5], [7]],
    ]
    assert [[list(chunk) for chunk in stage] for stage in Layout(pp=2, vpp=2).layers(8)] == [
        [[0, 1], [4, 5]],
        [[2, 3], [6, 7]],
    ]
    assert [[list(chunk) for chunk in stage] for stage in Layout(pp=2, vpp=2, layer_list=(2, 4)).layers(6)] == [
        [[0], [3]],
        [[1, 2], [4, 5]],
    ]


def test_gate_and_up_are_cut_by_themselves() -> None:
    found = pieces(FC1, (48, 16), Layout(tp=2), DENSE)
    assert [(piece.rank.tp, piece.axis, piece.ranges) for piece in found] == [
        (0, 0, ((0, 12), (24, 36))),
        (1, 0, ((12, 24), (36, 48))),
    ]


def test_rows_columns_and_whole_tensors() -> None:
    layout = Layout(tp=2)
    at = LAYER.format(1)
    rows, columns, whole = [((0, 4),), ((4, 8),)], [((0, 3),), ((3, 6),)], [(), ()]
    for name, shape, wanted in [
        ("self_attention.linear_qkv.weight", (8, 6), rows),
        ("self_attention.linear_qkv.bias", (8,), rows),
        ("self_attention.linear_q_proj.weight", (8, 6), rows),
        ("self_attention.linear_q_up_proj.weight", (8, 6), rows),
        ("self_attention.linear_kv_up_proj.weight", (8, 6), rows),
        ("self_attention.linear_proj.weight", (8, 6), columns),
        ("mlp.linear_fc2.weight", (8, 6), columns),
        ("mlp.shared_experts.linear_fc2.weight", (8, 6), columns),
        ("self_attention.linear_q_down_proj.weight", (8, 6), whole),
        ("self_attention.linear_kv_down_proj.weight", (8, 6), whole),
        ("self_attention.linear_qkv.layer_norm_weight", (8,), whole),
        ("self_attention.linear_proj.bias", (8,), whole),
        ("mlp.router.weight", (8, 6), whole),
        ("mlp.router.expert_bias", (8,), whole),
        ("mlp.shared_experts.gate_weight", (1, 6), whole),
    ]:
        assert [piece.ranges for piece in pieces(at + name, shape, layout, DENSE)] == wanted, name
    for name in (EMBEDDING, "output_layer.weight", "mtp.layers.0.eh_proj.weight"):
        assert [piece.ranges for piece in pieces(name, (8, 6), layout, DENSE)] == rows, name
    for name in ("linear_q_down_proj", "linear_kv_down_proj"):  # megatron's own layers have no replicated linear layer
        name = f"{at}self_attention.{name}.weight"  # noqa: PLW2901
        assert [piece.ranges for piece in pieces(name, (8, 6), layout, DENSE, cuts=LOCAL_CUTS)] == rows, name


def test_copies_of_the_embedding_are_where_megatron_has_them() -> None:
    def places(model: Model, layout: Layout, name: str = EMBEDDING) -> list[tuple[int, int, str]]:
        return [(piece.rank.pp, piece.chunk, piece.name) for piece in pieces(name, (8, 4), layout, model)]

    first, last = (0, 0, EMBEDDING), (1, 0, "output_layer.weight")
    assert places(Model(4, 0, 0, tied=True), Layout()) == [first]
    assert places(Model(4, 0, 0, tied=True), Layout(pp=2)) == [first, last]
    assert places(Model(4, 0, 0, tied=False), Layout(pp=2)) == [first]
    assert places(Model(4, 0, 1, tied=False), Layout(pp=2)) == [first, (1, 0, EMBEDDING)]
    assert places(Model(4, 0, 1, tied=False), Layout()) == [first]
    assert places(Model(4, 0, 1, tied=True), Layout(pp=2, vpp=2)) == [
        first,
        (1, 1, EMBEDDING),
        (1, 1, "output_layer.weight"),
    ]
    assert places(Model(4, 0, 0, tied=False), Layout(pp=2, vpp=2), "output_layer.weight") == [
        (1, 1, "output_layer.weight")
    ]


def test_experts_count_from_0_on_every_expert_rank() -> None:
    name = "decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight"
    found = pieces(name, (16, 4), Layout(tp=2, pp=2, ep=4, etp=1), Model(4, 8, 0, tied=False))
    assert found == [
        (Rank(0, 1, 2), 0, "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight", None, ()),
    ]
    both = pieces(name, (16, 4), Layout(tp=2, ep=2), Model(4, 8, 0, tied=False))
    assert [(piece.rank, piece.ranges) for piece in both] == [
        (Rank(0, 0, 1), ((0, 4), (8, 12))),
        (Rank(1, 0, 1), ((4, 8), (12, 16))),
    ]
    assert shift(shift(name, -2, -4), 2, 4) == name


def test_ranks_are_those_that_megatron_has() -> None:
    """With etp below tp, expert and tensor numbers go up together: see ``RankGenerator`` in megatron-core."""
    assert [(rank.tp, rank.ep) for rank in Layout(tp=2, ep=2).ranks()] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [(rank.tp, rank.ep) for rank in Layout(tp=2, ep=2, etp=1).ranks()] == [(0, 0), (1, 1)]
    assert [(rank.tp, rank.ep) for rank in Layout(tp=2, ep=4, etp=1).ranks()] == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert len(Layout(tp=4, pp=3, ep=2).ranks()) == 24


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"tp": 0}, "--tp 0: at least 1"),
        ({"vpp": 2}, "--vpp 2 needs --pp of at least 2"),
        ({"pp": 2, "layer_list": (1, 2, 1)}, "--num_layer_list 1,2,1: 2 numbers"),
        ({"pp": 2, "vpp": 2, "layer_list": (1, 2, 1)}, "2 or 4 numbers .* --pp 2 --vpp 2"),
        ({"pp": 2, "layer_list": (5, -1)}, "--num_layer_list 5,-1"),
    ],
)
def test_a_wrong_layout_names_its_flag(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(BridgeError, match=said):
        Layout(**sizes)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"pp": 3}, "4 layers cannot be spread evenly over --pp 3; give --num_layer_list"),
        ({"pp": 2, "vpp": 4}, "--pp 2 x --vpp 4"),
        ({"pp": 2, "layer_list": (1, 2)}, "makes 3 layers, the model has 4"),
        ({"pp": 2, "vpp": 2, "layer_list": (1, 3)}, "not divisible by --vpp 2; give all 4"),
        ({"tp": 8}, "--tp 8: 12 attention heads"),
        ({"tp": 6}, "--tp 6: the model has 4 query groups .* cannot be split .* divisor of 4"),
        ({"ep": 4}, "--ep 4: 6 experts"),
        ({"tp": 4}, "--tp 4: ffn_hidden_size 6"),
        ({"tp": 2, "etp": 1}, None),
        ({"tp": 1, "etp": 2}, "--etp 2: moe_ffn_hidden_size 5"),
        ({"pp": 2, "ep": 3}, None),
    ],
)
def test_a_model_that_cannot_be_spread_so_names_the_flag(sizes: dict[str, Any], said: str | None) -> None:
    args = {
        "num_layers": 4, "num_attention_heads": 12, "num_query_groups": 4, "num_experts": 6, "ffn_hidden_size": 6,
        "moe_ffn_hidden_size": 5,
    }  # fmt: skip
    if said is None:
        check_layout(Layout(**sizes), args)
        return
    with pytest.raises(BridgeError, match=said):
        check_layout(Layout(**sizes), args)


def test_experts_are_needed_for_expert_ranks() -> None:
    with pytest.raises(BridgeError, match="--ep 2: the model has no experts"):
        check_layout(Layout(ep=2), {"num_experts": None})
    check_layout(Layout(ep=2), {})


def test_latent_attention_has_no_query_groups() -> None:
    args = {"num_attention_heads": 4, "num_query_groups": 1}
    check_layout(Layout(tp=4), args | {"multi_latent_attention": True})
    with pytest.raises(BridgeError, match="1 query groups"):
        check_layout(Layout(tp=4), args)


def test_a_tensor_that_cannot_be_cut_is_named() -> None:
    with pytest.raises(
        BridgeError, match=r"--tp 2: tensor decoder.layers.0.mlp.linear_fc1.weight \(6, 4\) .* dimension 0"
    ):
        pieces(FC1, (6, 4), Layout(tp=2), DENSE)
    name = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight"
    with pytest.raises(BridgeError, match=r"--etp 2: .* dimension 1"):
        pieces(name, (4, 3), Layout(tp=2, etp=2), Model(1, 2, 0, tied=False))
    with pytest.raises(BridgeError, match="--ep 2: 3 experts"):
        pieces(name, (4, 3), Layout(ep=2), Model(1, 3, 0, tied=False))
    with pytest.raises(BridgeError, match="--etp 2 does not divide --tp 1"):
        pieces(name, (4, 4), Layout(etp=2), Model(1, 2, 0, tied=False))


def test_a_name_of_which_nothing_is_known_is_refused() -> None:
    with pytest.raises(BridgeError, match="conv1d.weight: how Megatron-Core spreads it"):
        cut_of("decoder.layers.0.mixer.conv1d.weight")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["decoder.layers.0.a", "decoder.layers.2.a"], "decoder.layers.1 is missing, decoder.layers.2 is there"),
        (["decoder.layers.1.a"], "decoder.layers.0 is missing"),
        (
            [f"decoder.layers.{layer}.mlp.experts.local_experts.{e}.x" for layer, e in ((0, 0), (0, 1), (1, 0))],
            r"different numbers of experts: \[1, 2\]",
        ),
        (["decoder.layers.0.mlp.experts.local_experts.1.x"], "local_experts.0 is missing"),
    ],
)
def test_missing_numbers_are_told(names: list[str], said: str) -> None:
    with pytest.raises(BridgeError, match=said):
        model_of(names)


def test_the_vocabulary_is_padded_as_megatron_pads_it() -> None:
    assert padded_rows(151936, 128, 1) == 151936
    assert padded_rows(151936, 128, 8) == 152576
    assert padded_rows(1, 128, 2) == 256


def test_an_uneven_list_is_written_as_megatron_reads_it() -> None:
    assert Layout(pp=2).megatron_layout(4, 0) is None
    assert Layout(pp=2, layer_list=(1, 3)).megatron_layout(4, 1) == "Et*1|t*3mL"
    assert Layout(pp=2, vpp=2, layer_list=(1, 2, 1, 0)).megatron_layout(4, 0) == "Et*1|t*2|t*1|L"


DELTA_NET = {
    "decoder.layers.0.self_attention.in_proj.weight": (88, 32), "decoder.layers.0.self_attention.conv1d.weight": (56, 1, 4),
    "decoder.layers.0.self_attention.A_log": (4,), "decoder.layers.0.self_attention.out_proj.weight": (32, 24),
}  # fmt: skip


def test_each_tensor_that_a_delta_net_joins_is_cut_by_itself() -> None:
    sections = sections_of(DELTA_NET)
    name, mixed = list(DELTA_NET)[:2]
    assert sections == {name: (16, 16, 24, 24, 4, 4), mixed: (16, 16, 24)}
    whole, model = torch.arange(88)[:, None], Model(1, 0, 0, tied=True, sections=sections)
    found = pieces(name, (88, 1), Layout(tp=2), model)
    parts = [torch.cat(piece.views(whole)) for piece in found]
    assert parts[1][:, 0].tolist() == [*range(8, 16), *range(24, 32), *range(44, 56), *range(68, 80), 82, 83, 86, 87]
    assert torch.equal(join(name, parts, sections[name]), whole)
    with pytest.raises(BridgeError, match="--tp 3: tensor .*in_proj.weight"):
        pieces(name, (88, 1), Layout(tp=3), model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder.layers.0.self_attention.A_log": (5,)}, "88 rows do not fit to 5 heads"),
        ({"decoder.layers.0.self_attention.conv1d.weight": (57, 1, 4)}, "57 convolved"),
        ({"decoder.layers.0.self_attention.A_log": ()}, "missing or misshapen"),
    ],
)
def test_sections_that_do_not_fit_together(changes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(BridgeError, match=said):
        sections_of(DELTA_NET | changes)


def test_key_heads_of_delta_nets_limit_tp() -> None:
    args = {"num_attention_heads": 4, "experimental_attention_variant": "gated_delta_net", "linear_num_key_heads": 2}
    check_layout(Layout(tp=2), args)
    with pytest.raises(BridgeError, match="--tp 4: 2 linear key heads cannot be spread evenly"):
        check_layout(Layout(tp=4), args)
