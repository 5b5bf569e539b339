import pytest

from cluster.config.readapt import SearchConfig
from readapt.fusion.points import COPY, UNDO, Point, Space, groups, module_groups, point_of

MODULES = [f"model.layers.{i}.{m}" for i in range(6) for m in ("self_attn.q_proj", "mlp.down_proj")]


def test_groups_go_from_the_module_to_its_kind_and_third() -> None:
    found = module_groups([*MODULES, "lm_head", "model.embed_tokens"])
    assert found[MODULES[0]] == (MODULES[0], "attention.early", "attention", "early")
    assert found[MODULES[5]] == (MODULES[5], "mlp.middle", "mlp", "middle")
    assert found[MODULES[11]][1:] == ("mlp.late", "mlp", "late")
    assert found["lm_head"][1:] == ("vocabulary.late", "vocabulary", "late")
    assert found["model.embed_tokens"][1:] == ("vocabulary.early", "vocabulary", "early")
    thirds = [found[name][3] for name in MODULES]
    assert [thirds.count(third) for third in ("early", "middle", "late")] == [4, 4, 4]


def test_a_model_with_one_layer_has_only_one_third() -> None:
    assert groups(["model.layers.0.mlp.up_proj"], "kind+depth") == ("mlp.early",)


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        ("all", ()),
        ("kind", ("attention", "mlp")),
        ("depth", ("early", "late", "middle")),
    ],
)
def test_only_groups_of_the_adapter_exist(grouping, expected: tuple[str, ...]) -> None:
    assert groups(MODULES, grouping) == expected


def test_the_most_specific_pair_wins() -> None:
    point = Point(1.0, 0.0, (("mlp", 0.5, 0.5), ("mlp.late", 0.1, 0.2)))
    of = {name: point.of(found) for name, found in module_groups(MODULES).items()}
    assert of[MODULES[0]] == (1.0, 0.0)
    assert of[MODULES[1]] == (0.5, 0.5)
    assert of[MODULES[11]] == (0.1, 0.2)


def test_the_box_has_the_configured_bounds_for_each_group() -> None:
    config = SearchConfig(alpha_max=1.2, beta_min=-0.8, beta_max=0.4)
    assert Space(config).bounds() == {"alpha": (0.0, 1.2), "beta": (-0.8, 0.4)}
    finer = Space(config, ("attention", "mlp")).bounds()
    assert list(finer) == ["alpha.attention", "beta.attention", "alpha.mlp", "beta.mlp"]
    assert finer["beta.mlp"] == (-0.8, 0.4)


def test_coordinates_and_points_convert_both_ways() -> None:
    space = Space(SearchConfig(), ("attention", "mlp"))
    point = Point(0.75, -0.5, (("attention", 0.5, 0.0), ("mlp", 1.0, -1.0)))
    assert space.point(space.coordinates(point)) == point
    assert space.point(space.coordinates(UNDO)) == UNDO, "equal pairs become one pair"
    assert Space(SearchConfig()).coordinates(COPY) == {"alpha": 1.0, "beta": 0.0}


def test_the_global_pair_of_a_finer_point_is_the_mean() -> None:
    assert point_of(["a", "b"], [(1.0, -1.0), (0.0, 0.0)]) == Point(0.5, -0.5, (("a", 1.0, -1.0), ("b", 0.0, 0.0)))
