"""Sites: one address, every other tool's name for it, and no off-by-one between them."""

from __future__ import annotations

import pytest

from sgworkbench.analysis import SITE_KINDS, Site, all_sites, parse_layers
from sgworkbench.errors import WorkbenchError

N = 12


@pytest.mark.parametrize("kind", SITE_KINDS)
@pytest.mark.parametrize("layer", [0, 1, 7, 11])
def test_names_can_be_read_back(layer: int, kind: str) -> None:
    site = Site(layer, kind)  # type: ignore[arg-type]
    assert str(site) == f"{kind}[{layer}]"
    assert site.hook_name == f"blocks.{layer}.hook_{kind}"
    assert Site.parse(str(site)) == Site.parse(site.hook_name) == Site.parse(f"  {site} ") == site
    assert hash(Site.parse(str(site))) == hash(site)


def test_a_bare_number_is_the_output_of_that_block() -> None:
    assert Site.parse("5") == Site(5) == Site(5, "resid_post")


@pytest.mark.parametrize(
    "text", ["", "resid_post", "resid_post[]", "resid_post[-1]", "-1", "1.5", "blocks.1", "[3]", "x3"]
)
def test_other_text_is_no_site(text: str) -> None:
    with pytest.raises(
        WorkbenchError, match=r"Expected a site such as resid_post\[12\] or blocks\.12\.hook_resid_post"
    ):
        Site.parse(text)


def test_unknown_kinds_get_the_nearest_name() -> None:
    with pytest.raises(WorkbenchError, match=r"Unknown site kind 'resid_pst'\. Did you mean 'resid_post'\?"):
        Site.parse("resid_pst[3]")
    with pytest.raises(WorkbenchError, match="Unknown site kind 'mlp_out'"):
        Site.parse("blocks.3.hook_mlp_out")


def test_negative_layers_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="counts from 0; found -1"):
        Site(-1)


# What hidden_states[i] of a model with 12 layers holds: written out, not computed.
HIDDEN = {0: "resid_pre[0]", 1: "resid_post[0]", 2: "resid_post[1]", 11: "resid_post[10]"}


@pytest.mark.parametrize(("index", "name"), HIDDEN.items())
def test_hidden_states(index: int, name: str) -> None:
    site = Site.from_hidden_states_index(index, N)
    assert str(site) == name
    assert site.hidden_states_index(N) == index


@pytest.mark.parametrize("index", range(1, N))
def test_the_input_of_a_block_is_the_same_hidden_state_as_the_output_before_it(index: int) -> None:
    assert Site(index, "resid_pre").hidden_states_index(N) == Site(index - 1).hidden_states_index(N) == index


@pytest.mark.parametrize("index", [-1, 12, 13])
def test_hidden_states_outside_the_residual_stream(index: int) -> None:
    with pytest.raises(
        WorkbenchError, match=rf"hidden_states\[{index}\] of a model with 12 layers .* expected 0 to 11"
    ):
        Site.from_hidden_states_index(index, N)


def test_sites_that_hidden_states_lack() -> None:
    with pytest.raises(WorkbenchError, match=r"resid_mid\[3\] is not among transformers' hidden_states"):
        Site(3, "resid_mid").hidden_states_index(N)
    with pytest.raises(WorkbenchError, match=r"hidden_states\[12\] is after the final norm"):
        Site(11).hidden_states_index(N)
    with pytest.raises(WorkbenchError, match=r"Layer 12 is outside the model, which has 12 layers \(0 to 11\)"):
        Site(12).hidden_states_index(N)


@pytest.mark.parametrize("layer", range(N - 1))
def test_svec_keys_are_block_outputs_by_block(layer: int) -> None:
    assert Site(layer).svec_key(N) == str(layer)
    assert Site.from_svec_key(str(layer), N) == Site(layer)


def test_svec_keys_that_are_no_site() -> None:
    with pytest.raises(WorkbenchError, match="key 11 was taken after the final norm"):
        Site.from_svec_key("11", N)
    for key in ("12", "-1", "x", "", "1.0"):
        with pytest.raises(WorkbenchError, match=r"Expected a \.svec key from 0 to 11"):
            Site.from_svec_key(key, N)
    for site in (Site(11), Site(3, "resid_pre"), Site(3, "resid_mid")):
        with pytest.raises(WorkbenchError, match=r"cannot be a \.svec key"):
            site.svec_key(N)
    with pytest.raises(WorkbenchError, match="Layer 12 is outside"):
        Site(12).svec_key(N)


@pytest.mark.parametrize("layer", range(1, N))
def test_gguf_directions_act_on_block_outputs_from_block_one(layer: int) -> None:
    assert Site.from_gguf_layer(layer) == Site(layer)
    assert Site(layer).gguf_layer() == layer
    if layer + 1 < N:
        assert Site(layer + 1, "resid_pre").gguf_layer() == layer


def test_sites_that_gguf_lacks() -> None:
    for site in (Site(0), Site(0, "resid_pre"), Site(1, "resid_pre"), Site(4, "resid_mid")):
        with pytest.raises(WorkbenchError, match="only outputs of blocks >= 1 can"):
            site.gguf_layer()
    with pytest.raises(WorkbenchError, match=r"start at direction\.1, found direction\.0"):
        Site.from_gguf_layer(0)


def test_the_same_point_under_two_names() -> None:
    assert Site(4, "resid_pre").same_point(Site(3))
    assert Site(3).same_point(Site(4, "resid_pre"))
    assert not Site(4, "resid_pre").same_point(Site(4))
    assert not Site(0, "resid_pre").same_point(Site(0))
    assert not Site(3, "resid_mid").same_point(Site(3))


def test_sites_sort_in_the_order_of_computation() -> None:
    order = [Site(layer, kind) for layer in range(3) for kind in ("resid_pre", "resid_mid", "resid_post")]  # type: ignore[arg-type]
    turned = order[::-1]
    assert sorted(turned) == order


def test_all_sites() -> None:
    assert all_sites(2) == (Site(0), Site(1))
    assert all_sites(2, "resid_pre") == (Site(0, "resid_pre"), Site(1, "resid_pre"))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("5", (5,)),
        ("7,8,9", (7, 8, 9)),
        ("2-4,11", (2, 3, 4, 11)),
        (" 3 - 3 , 1,1 ", (1, 3)),
        ("0-11", tuple(range(12))),
    ],
)
def test_layer_lists(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, N) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expected layers such as 20 or 10-14,20; found ''"),
        ("3,", "Expected layers such as"),
        ("all", "found 'all'"),
        ("-1", "Expected layers such as"),
        ("4-2", "The layer range '4-2' runs backwards"),
        ("12", r"Layer 12 is outside the model, which has 12 layers \(0 to 11\)"),
        ("0-999999999999", "Layer 999999999999 is outside"),
    ],
)
def test_bad_layer_lists(text: str, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        parse_layers(text, N)
