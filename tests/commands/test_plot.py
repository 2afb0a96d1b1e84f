"""Pictures of runs, from the lines that they log."""

import json
import math

import numpy as np
import pytest

from galore_jax import plot
from galore_jax.errors import UserError


def write_run(folder, *, steps=40, end=5.0, lines=()):
    folder.mkdir(parents=True, exist_ok=True)
    made = [{"step": 0, "eval_loss": 9.0, "eval_perplexity": 8103.0, "eval_tokens": 10}]
    for step in range(1, steps + 1):
        loss = end + 4 * math.exp(-step / 5)
        made.append(
            {
                **{"step": step, "loss": loss, "learning_rate": 0.01 * step / steps},
                **{"tokens": 1024 * step, "tokens_per_second": 2e3},
            }
        )
    made.append({"step": steps, "eval_loss": end, "eval_perplexity": 1.0, "eval_tokens": 10})
    text = "".join(json.dumps(line) + "\n" for line in [*made, *lines])
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_curves_are_what_was_logged(tmp_path):
    run = plot.read_curves(write_run(tmp_path / "run"), "run")
    assert run.tokens.tolist() == [1024.0 * step for step in range(1, 41)]
    assert run.eval_tokens.tolist() == [0.0, 40 * 1024.0]
    assert run.eval_loss.tolist() == [9.0, 5.0]
    assert run.speed.tolist() == [2e3] * 40


def test_what_is_not_finite_is_a_gap(tmp_path):
    line = {"step": 41, "loss": "NaN", "learning_rate": 0.1, "tokens": 41 * 1024}
    run = plot.read_curves(write_run(tmp_path / "run", lines=[line]), "run")
    assert math.isnan(run.loss[-1])
    assert math.isnan(run.speed[-1])  # not logged at all
    plot.plot([run], tmp_path / "run.png")


def test_running_mean_has_no_bias_and_skips_gaps():
    values = np.array([1.0, np.nan, 3.0, 2.0])
    means = plot.running_mean(values, 2.0)
    # Weights halve from value to value: (1 * 1/2 + 3) / (1/2 + 1), and so on.
    np.testing.assert_allclose(means, [1.0, np.nan, 3.5 / 1.5, (1.75 + 2) / 1.75])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_several_runs_in_one_picture(tmp_path, suffix, capsys):
    runs = [str(write_run(tmp_path / f"lr{i}" / "run", end=5 + i / 10)) for i in range(10)]
    out = tmp_path / f"runs.{suffix}"
    assert plot.main(["plot", *runs, f"--out={out}"]) == 0
    assert out.stat().st_size > 10_000
    assert str(out) in capsys.readouterr().out
    if suffix == "svg":  # text is drawn as paths, after comments that spell it
        assert "lr3/run: 5.300" in out.read_text()


def test_the_first_fall_does_not_set_the_scale(tmp_path):
    low, high = plot._loss_limits([plot.read_curves(write_run(tmp_path / "run"), "run")])
    assert low < 5.0
    assert high < 8.5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run"], "give one RUN or more, and --out=FILE.png"),
        (["run", "--otu=run.png"], "--otu"),
        (["run", "--out=run.gif"], "--out=run.gif must end in .png or .svg"),
        (["run", "--out=none/run.png"], "there is no folder none"),
        (["nothing", "--out=run.png"], "nothing is no run: it has no metrics.jsonl"),
        (["fresh", "--out=run.png"], "fresh has not logged an update yet"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    write_run(tmp_path / "fresh", steps=0)
    assert plot.main(["plot", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_names_are_as_short_as_they_can_be(tmp_path):
    assert plot.names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert plot.names([tmp_path / "a"] * 2) == ["a", "a"]
    with pytest.raises(UserError, match="is no run"):
        plot.read_curves(tmp_path, "none")
