"""What a run leaves, before anything is saved: its line, its figures."""

import io
import json
import re

import matplotlib
import pytest
from matplotlib.figure import Figure
from small import sets, trained

import entangle_fast as ef
from entangle_fast import report
from entangle_fast.figures.run import write_figures
from entangle_fast.storage import CheckpointError

SMALL = dict(remote_batch1=16, forget_batch1=8, adjacent_batch2=8, forget_batch2=8, remote_batch2=12, epochs1=0.4, epochs2=0.7)
DRAWN = ["loss_distributions", "accuracy_over_time", "angle", "frontier"]  # no class has a name


@pytest.fixture(scope="module")
def result():
    return ef.unlearn(trained(), **sets(), method=ef.Entangled(**SMALL), eval_every=1, progress=False)


def test_it_is_one_line(result):
    assert re.fullmatch(r"Result\(entangled, \d+\.\d s: forget \d+\.\d -> \d+\.\d %, adjacent \d+\.\d -> \d+\.\d %, "
                        r"remote \d+\.\d -> \d+\.\d %\)", repr(result)), repr(result)  # fmt: skip
    assert f"{result.before['forget']:.1f} -> {result.after['forget']:.1f}" in str(result)
    empty = ef.Result(None, "mine", None, 0, {}, {"forget": None, "adjacent": float("nan")}, 0.0, 0.0, [], {})
    assert repr(empty) == "Result(mine, 0.0 s: forget - -> - %, adjacent - -> - %, remote - -> - %)"


def test_figures_of_what_is_not_saved(result):
    with matplotlib.rc_context({"axes.grid": False, "xtick.labelcolor": "red", "figure.facecolor": "red"}):
        found = result.plot()
        shown = {name: io.BytesIO() for name in found}
        for name, figure in found.items():
            figure.savefig(shown[name], format="png")
    assert list(found) == DRAWN and all(isinstance(f, Figure) for f in found.values())
    for name, figure in found.items():
        ax = figure.axes[-1]
        assert ax.get_xticklabels()[0].get_color() == "#222222" and figure.get_facecolor() == (1, 1, 1, 1), name  # ours, not the user's
        assert shown[name].getvalue()[:4] == b"\x89PNG"


def test_figures_in_a_folder_are_those_of_the_saved_run(result, tmp_path):
    drawn = result.plot(tmp_path / "alone")
    assert [p.name for p in drawn] == [f"{name}.png" for name in DRAWN] and [*(tmp_path / "alone").glob("*.json")] == []
    result.save(tmp_path / "run")
    (tmp_path / "run" / "per_class.png").write_bytes(b"of an earlier run")
    saved = (tmp_path / "run" / report.REPORT).read_bytes()
    assert result.plot(tmp_path / "run") == [tmp_path / "run" / p.name for p in drawn]
    assert (tmp_path / "run" / report.REPORT).read_bytes() == saved and not (tmp_path / "run" / "per_class.png").exists()
    assert json.loads(saved)["figures"] == [p.name for p in drawn]
    from_files = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.png")}
    assert [p.read_bytes() for p in write_figures(tmp_path / "run")] == [from_files[p.name] for p in drawn]
    assert [p.read_bytes() for p in drawn] == [from_files[p.name] for p in drawn]


def test_a_folder_that_cannot_be_written(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        result.plot(tmp_path / "file")
    for call in (result.plot, result.save):
        with pytest.raises(TypeError, match="folder: got int; needs a path"):
            call(3)


def test_a_run_without_steps_of_stage_2_has_no_angle():
    found = ef.unlearn(trained(), **sets(), method=ef.FineTune(epochs=1), progress=False).plot()
    assert list(found) == ["loss_distributions", "accuracy_over_time", "frontier"]


def test_the_summary_is_text(result, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = result.summary()
    lines = text.splitlines()
    assert capsys.readouterr() == ("", "") and text == text.strip() and "\x1b" not in text
    assert lines[0] == "Accuracy of the training samples, %" and any(line.startswith("entangled ") for line in lines)


def test_another_run_is_not_written_over(result, tmp_path):
    result.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="folder: .* holds a finished run; give another folder, or overwrite=True to write over it"):
        result.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / report.REPORT).unlink()
    (tmp_path / report.CHECKPOINT).write_bytes(b"of a run that died")
    with pytest.raises(ValueError, match="folder: .* holds a run that is not finished; give another folder, or overwrite=True"):
        result.save(tmp_path)
    result.save(tmp_path, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == before.keys()  # without the checkpoint: it was another run's
