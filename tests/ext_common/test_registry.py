import dataclasses
import importlib.util
import sys
from dataclasses import dataclass, field
from typing import List, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_common.cli import UserError
from ext_common.registry import Registry, UnknownName


@dataclass
class Options:
    heads: int = field(default=2, metadata={"help": "number of heads"})
    rate: float = field(default=0.5, metadata={"help": "dropout, 0 to 1"})
    norm: str = field(default="layer", metadata={"help": "norm", "choices": ["layer", "batch"]})
    bias: bool = field(default=True, metadata={"help": "add a bias"})
    sizes: List[int] = field(default_factory=lambda: [1, 2], metadata={"help": "widths"})
    limit: Optional[float] = field(default=None, metadata={"help": "limit in dB"})


@pytest.fixture
def poolings():
    registry = Registry("pooling")

    @registry.register("attentive", options=Options)
    def attentive(dim, extra=None, **options):
        """Weights from a query.

        More.
        """
        return dim, extra, options

    @registry.register("mean")
    class Mean:
        """Mean over time."""

        def __init__(self, dim):
            self.dim = dim

    return registry


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, ValueError)  # for those who do not know our cli
    return str(caught.value)


def test_names_get_and_contains(poolings):
    assert poolings.names() == ("attentive", "mean")
    assert "mean" in poolings and "max" not in poolings
    assert poolings.get("mean")(3).dim == 3


def test_unknown_name_lists_known_and_nearest(poolings):
    assert message(poolings.get, "atentive") == (
        "unknown pooling 'atentive': did you mean 'attentive'? known: attentive, mean"
    )
    assert message(poolings.build, "xyz") == "unknown pooling 'xyz'; known: attentive, mean"
    assert message(Registry("sampler").get, "x") == "unknown sampler 'x'; known: none"
    with pytest.raises(UnknownName):
        poolings.options("xyz")


def test_duplicate_name_raises_and_keeps_the_first(poolings):
    first = poolings.get("mean")
    with pytest.raises(ValueError, match="pooling 'mean' is already registered, by .*Mean"):
        poolings.register("mean")(lambda: None)
    assert poolings.get("mean") is first


def test_field_without_help_raises_at_registration(poolings):
    @dataclass
    class Silent:
        heads: int = 1

    with pytest.raises(ValueError, match="Silent.heads has no help"):
        poolings.register("silent", options=Silent)
    assert "silent" not in poolings
    with pytest.raises(TypeError, match="dataclass"):
        poolings.register("silent", options=dict)


def test_build_passes_defaults_options_and_arguments(poolings):
    defaults = dataclasses.asdict(Options())
    assert poolings.build("attentive", 80) == (80, None, defaults)
    text = "heads=4, sizes=3,4,5,rate=1e-1,bias=no,limit=-3,norm=batch"
    typed = dict(heads=4, sizes=[3, 4, 5], rate=0.1, bias=False, limit=-3.0, norm="batch")
    assert poolings.build("attentive", 80, options=text, extra=1) == (80, 1, typed)
    assert poolings.build("attentive", 80, options=typed) == (80, None, typed)
    assert poolings.build("attentive", 80, options=Options(heads=7))[2]["heads"] == 7
    assert poolings.build("mean", 5).dim == 5


def test_bind_reads_name_and_options_from_one_text(poolings):
    for text, options in (
        ("attentive", None),
        (" attentive :heads=4,sizes=3,5", "heads=4,sizes=3,5"),
    ):
        assert poolings.bind(text)(7, extra=1) == poolings.build(
            "attentive", 7, extra=1, options=options
        )
    assert "unknown pooling 'mea': did you mean 'mean'?" in message(poolings.bind, "mea:heads=2")
    assert "unknown option 'head'" in message(poolings.bind, "attentive:head=2")
    for name in ("a:b", "a,b", "a=b", ""):
        with pytest.raises(ValueError, match="needs a name without"):
            poolings.register(name)


def test_lists_of_two_builds_are_not_shared(poolings):
    poolings.build("attentive", 1)[2]["sizes"].append(9)
    assert poolings.build("attentive", 1)[2]["sizes"] == [1, 2]


@pytest.mark.parametrize(
    ("given_options", "said"),
    [
        ("head=4", "unknown option 'head': did you mean 'heads'? known: heads, rate"),
        ({"zzz": 1}, "unknown option 'zzz'; known: heads, rate"),
        ("heads=four", "bad value 'four' for heads: expected int"),
        ("heads=4.5", "bad value '4.5' for heads: expected int"),
        ({"heads": 4.5}, "bad value '4.5' for heads: expected int"),
        ({"heads": True}, "bad value 'true' for heads: expected int"),
        ({"heads": None}, "bad value 'none' for heads: expected int"),
        ({"norm": 3}, "bad value '3' for norm: expected str"),
        ("rate=nan", "bad value 'nan' for rate: expected float"),
        ("bias=maybe", "bad value 'maybe' for bias: expected true or false"),
        ("sizes=1,x", "bad value '1,x' for sizes: expected int,..."),
        ("limit=loud", "bad value 'loud' for limit: expected float or none"),
        ("norm=bach", "bad value 'bach' for norm: did you mean 'batch'? (known: layer, batch)"),
        ("heads=1,2", "expected key=value, got '2'"),
        ("heads=1,heads=2", "option 'heads' is given twice"),
        (17, "options must be 'key=value,...' or a mapping"),
    ],
)
def test_wrong_options_are_named(poolings, given_options, said):
    text = message(poolings.options, "attentive", given_options)
    assert text.startswith("pooling 'attentive': " + said)


def test_entry_without_options_refuses_some(poolings):
    assert poolings.options("mean", "") is None
    assert message(poolings.options, "mean", "heads=2") == (
        "pooling 'mean': unknown option 'heads'; it has no options"
    )


def test_what_the_dataclass_refuses_and_what_is_missing(poolings):
    @dataclass
    class Strict:
        width: int = field(metadata={"help": "frames"})

        def __post_init__(self):
            if self.width < 1:
                raise ValueError("width must be positive")

    poolings.register("strict", options=Strict)(lambda width: width)
    assert poolings.build("strict", options="width=3") == 3
    assert message(poolings.options, "strict") == (
        "pooling 'strict': option 'width' is missing (frames)"
    )
    assert message(poolings.options, "strict", "width=0") == (
        "pooling 'strict': width must be positive"
    )
    assert "width: frames (required)" in poolings.describe()


def test_describe_shows_first_line_options_and_defaults(poolings):
    assert poolings.describe().splitlines() == [
        "  attentive: Weights from a query.",
        "      heads: number of heads (default: 2)",
        "      rate: dropout, 0 to 1 (default: 0.5)",
        "      norm: norm (default: layer)",
        "      bias: add a bias (default: true)",
        "      sizes: widths (default: 1,2)",
        "      limit: limit in dB (default: none)",
        "  mean: Mean over time.",
    ]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "heads": st.integers(),
            "rate": st.floats(allow_nan=False),
            "norm": st.sampled_from(["layer", "batch"]),
            "bias": st.booleans(),
            "sizes": st.lists(st.integers()),
            "limit": st.none() | st.floats(allow_nan=False),
        },
    )
)
def test_text_and_mapping_mean_the_same(chosen):
    registry = Registry("kind")
    registry.register("entry", options=Options)(lambda **options: options)

    def typed(value):
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    text = ",".join(f"{key}={typed(value)}" for key, value in chosen.items())
    expected = dataclasses.replace(Options(), **chosen)
    assert registry.options("entry", chosen) == expected
    assert registry.options("entry", text) == expected


def test_someone_elses_file_adds_an_entry(tmp_path, monkeypatch):
    """As a --user-dir does: one decorator in a file we have never seen."""
    home = tmp_path / "house_of_kinds.py"
    home.write_text("from ext_common.registry import Registry\nKINDS = Registry('kind')\n")
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from house_of_kinds import KINDS\n"
        "@KINDS.register('own')\n"
        "def own(x):\n    'Doubles.'\n    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location("plugin", plugin)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    kinds = sys.modules.pop("house_of_kinds").KINDS
    assert kinds.names() == ("own",) and kinds.build("own", 4) == 8
