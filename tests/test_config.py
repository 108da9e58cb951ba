import math
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from entangle_fast.config import ModelConfig, RunConfig, RunOptions, TaskConfig
from entangle_fast.config_reading import ConfigError, from_dict, from_toml, to_dict
from entangle_fast.storage import save_toml


@dataclass
class Inner:
    lr: float = 0.1
    steps: int = 3


@dataclass
class Outer:
    needed: str
    alpha: float = 0.5
    clip: float = 10.0
    limit: float = math.inf
    sign: Literal["paper", "code"] = "paper"
    k: int | None = 4
    flag: bool = False
    names: list[str] = field(default_factory=list)
    pair: tuple[int, float] = (1, 2.0)
    sizes: tuple[int, ...] = ()
    either: int | str = 1
    extra: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: got {self.alpha}, needs 0..1")


@dataclass
class Plain:
    step: float = 1.0


@pytest.fixture
def methods(monkeypatch):
    table = {"entangled": Outer, "plain": Plain}
    monkeypatch.setitem(sys.modules, "entangle_fast.methods", SimpleNamespace(METHODS=table))
    return table


def test_values_pass():
    got = from_dict(
        Outer,
        {
            "needed": "x",
            "alpha": 1,
            "clip": math.inf,
            "limit": math.inf,
            "sign": "code",
            "k": "none",
            "names": ["a"],
            "pair": [3, 4],
            "sizes": [1, 2, 3],
            "either": "z",
            "extra": {"q": [1]},
            "inner": {"lr": 2},
        },
    )
    assert got == Outer(
        "x", 1.0, math.inf, math.inf, "code", None, False, ["a"], (3, 4.0), (1, 2, 3), "z", {"q": [1]}, Inner(2.0)
    )
    assert isinstance(got.alpha, float) and isinstance(got.pair, tuple)
    assert from_dict(Outer, to_dict(got)) == got


@pytest.mark.parametrize(
    "data, message",
    [
        ({"alpah": 0.1}, r"job: alpah: unknown key; did you mean 'alpha'\?"),
        ({"zzz": 0.1}, r"zzz: unknown key; needs one of 'needed', 'alpha'"),
        ({"inner": {"stepz": 1}}, r"inner.stepz: unknown key; did you mean 'steps'"),
        ({"inner": 3}, r"inner: got 3 \(int\), needs a table"),
        ({"alpha": "x"}, r"alpha: got 'x' \(str\), needs a number"),
        ({"alpha": True}, "alpha: got True"),
        ({"alpha": math.nan}, "alpha: got nan"),
        ({"alpha": math.inf}, "alpha: got inf.*finite"),
        ({"clip": math.nan}, "clip: got nan"),
        ({"alpha": 10**400}, "alpha: got 1000.*finite"),
        ({"alpha": 3}, "job: alpha: got 3.0, needs 0..1"),
        ({"inner": {"steps": True}}, r"inner.steps: got True \(bool\), needs an integer"),
        ({"inner": {"steps": 1.0}}, "steps: got 1.0"),
        ({"flag": 1}, "flag: got 1.*true or false"),
        ({"sign": "papr"}, r"sign: got 'papr' \(str\), needs one of 'paper', 'code'; did you mean 'paper'\?"),
        ({"k": "x"}, "k: got 'x'.*needs an integer"),
        ({"names": "Shirt"}, r'names: got .*needs a list of a string; write \["Shirt"\]'),
        ({"names": [1]}, r"names.\[0\]: got 1"),
        ({"pair": [1]}, "pair: got"),
        ({"either": 1.5}, "either: got 1.5.*an integer or a string"),
        ({"extra": 1}, "extra: got 1.*a table"),
        ({"needed": None}, "needed: got None.*a string"),
    ],
)
def test_errors_name_key_and_mend(data, message):
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict(Outer, {"needed": "x", **data}, "job")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_missing_key():
    with pytest.raises(ConfigError, match="needed: missing; needs a string"):
        from_dict(Outer, {})
    with pytest.raises(ConfigError, match="needs a table"):
        from_dict(Outer, [1])


GOOD = """
[task]
forget = ["Sneaker"]
[model]
factory = "package.module:build"
kwargs = {width = 3}
[method]
name = "entangled"
needed = "x"
alpha = 0.7
[method.inner]
lr = 3
[run]
out = "runs/x"
"""


def test_run_config(methods, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(GOOD)
    config = from_toml(path, RunConfig)
    assert isinstance(config, RunConfig) and config.method == Outer("x", 0.7, inner=Inner(3.0))
    assert config.task == TaskConfig(forget=["Sneaker"]) and config.run == RunOptions(out="runs/x")
    assert config.model.kwargs == {"width": 3}
    config.method.k = None
    assert to_dict(config)["method"]["name"] == "entangled"
    again = from_toml(save_toml(tmp_path / "saved.toml", to_dict(config)), RunConfig)
    assert again == config


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("alpha = 0.7", "alpah = 0.7", r"job\.toml:10: method\.alpah: unknown key; did you mean 'alpha'"),
        ("alpha = 0.7", "alpha = 7", r"job\.toml:10: method\.alpha: got 7"),
        ("lr = 3", 'lr = "3"', r"job\.toml:12: method\.inner\.lr"),
        (
            'name = "entangled"',
            'name = "entangeld"',
            r"job\.toml:8: method\.name: got 'entangeld'.*did you mean 'entangled'",
        ),
        ('name = "entangled"', "", r"job\.toml:7: method\.name: missing; needs one of 'entangled', 'plain'"),
        ("{width = 3}", "3", r"job\.toml:6: model\.kwargs"),
        ("package.module:build", "package.module", r"job\.toml:5: model\.factory: .*needs package\.module:callable"),
        ('["Sneaker"]', "[]", r"job\.toml:3: task\.forget: got no class"),
        ('["Sneaker"]', '["a"]\ndataset = "cifar10"', r"job\.toml:2: task\.path: missing; cifar10 needs the folder"),
        ('out = "runs/x"', "seed = -1", r"job\.toml:14: run\.seed: got -1"),
        ("[run]", "[run", r"job\.toml: not valid TOML"),
        ("[task]", "[taks]", r"job\.toml:2: taks: unknown key; did you mean 'task'"),
    ],
)
def test_run_config_errors(methods, tmp_path, old, new, message):
    path = tmp_path / "job.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        from_toml(path, RunConfig)


def test_hostile_files(tmp_path):
    path = tmp_path / "x.toml"
    for content in (b"\xff\xfe", b"a = " + b"[" * 50_000, b"a" * 1000):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="x.toml"):
            from_toml(path, RunConfig)
    with pytest.raises(FileNotFoundError, match="none.toml"):
        from_toml(tmp_path / "none.toml", RunConfig)


def test_method_without_a_name_in_the_table(methods):
    config = RunConfig(task=TaskConfig(forget=["a"]), model=ModelConfig(factory="a:b"), method=Inner())
    with pytest.raises(ConfigError, match="Inner"):
        to_dict(config)
