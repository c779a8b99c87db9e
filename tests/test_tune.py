"""tune: laws of its parts, what it promises of what it finds, and one sentence for every mistake."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tome_fx
from tests.models import Spec, build
from tome_fx import Loss, Speed, Tuned, cli, explain, tune, tuning
from tome_fx.cli import subjects
from tome_fx.config import config_from
from tome_fx.explain import Source, rewritten_module
from tome_fx.tuning import final, search
from tome_fx.tuning.costs import Costs, sites_of, walk
from tome_fx.tuning.judge import Batch, Judge, batches_of, distance, floats, level, parted, rising, rows_of, value
from tome_fx.tuning.surrogate import Goal, Surrogate
from tome_fx.tuning.targets import parse, spelled

HERE = "tests.test_tune"
INPUT = ["--input", "2,3,24,24"]
MEAN = Spec(depth=4, readout="mean")


def tiny_vit() -> nn.Module:
    """37 tokens, four blocks whose merges are all read."""
    return build(MEAN)[0]


def convolution() -> nn.Module:
    """Nothing to merge."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def batches(count: int = 4) -> list[Tensor]:
    """Random pictures, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 24, 24, generator=generator) for _ in range(count)]


def labelled() -> list[tuple[Tensor, Tensor]]:
    """With the class that the unmerged model gives."""
    model = tiny_vit()
    with torch.no_grad():
        return [(x, model(x).argmax(-1)) for x in batches()]


def right(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).float()


def raising(outputs: Tensor, targets: Tensor) -> Tensor:
    raise KeyError("no such class")


@functools.cache
def source_of_tiny() -> Source:
    """One capture for all tests."""
    with torch.no_grad():
        return Source(tiny_vit(), (batches()[0],))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few timed rounds and proposals, and one capture: the tests ask for no time."""
    traced = tuning._source
    tiny = type(tiny_vit())
    kept = lambda *given: source_of_tiny() if type(given[0]) is tiny else traced(*given)  # noqa: E731
    monkeypatch.setattr(tuning, "_source", kept)
    monkeypatch.setattr(final, "SECONDS", 0.0)
    monkeypatch.setattr(final, "ROUNDS", 1)
    monkeypatch.setattr("tome_fx.tuning.costs.ROUNDS", 1)
    monkeypatch.setattr("tome_fx.tuning.costs.MOST_ROUNDS", 2)
    monkeypatch.setattr(search, "STALE", 1)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that a model's ops take by their number of tokens alone: what is found does not depend on the machine."""

    def clocked(gm: Any, batch: Batch) -> list[float]:
        values = [node.meta.get("val") for node in gm.graph.nodes]
        return [v.numel() * 1e-6 if isinstance(v, Tensor) else 0.0 for v in values]

    monkeypatch.setattr("tome_fx.tuning.costs.clocked", clocked)


# -- one capture, many schedules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [{"r": 4, "placement": "branch"}, {"r": [8, 0, 2, 1], "method": "pitome"}])
def test_a_schedule_from_a_kept_capture_is_that_of_a_new_one(first: dict[str, Any]) -> None:
    """Whatever was rewritten from it before."""
    model, x = tiny_vit(), batches()[0]
    source = source_of_tiny()
    source.rewritten(first)
    for options in ({"r": [5, 0, 3, 2]}, {"r": 3, "metric": "token"}, first):
        again, result = source.rewritten(options)
        fresh, report = rewritten_module(model, (x,), None, options)
        assert again.code == fresh.code
        assert result.report.sites == report.sites
        with torch.no_grad():
            torch.testing.assert_close(again(x), fresh(x), rtol=0, atol=0)


def test_windows_with_masks_are_read_anew_for_each_schedule() -> None:
    """What a mask parts was noted while blocks were found, so that a second look found another graph."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.swin_transformer.SwinTransformer([4, 4], 16, [2], [2], [4, 4]).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        source = Source(model, (x,))
        first, second = (source.rewritten({"r": 2, "placement": "branch"})[1].report for _ in range(2))
    assert first.sites == second.sites
    assert first.merged_sites


# -- the walk and the curves -------------------------------------------------------------------------------------------


def test_the_walk_gives_the_tokens_of_the_plan() -> None:
    """Caps, blocks that merge nothing, and blocks that come after all is merged."""
    source = source_of_tiny()
    sites = sites_of(source.rewritten({"r": 2})[1], config_from({"r": 1}))
    lists = np.array([[4, 6, 0, 2], [0, 8, 3, 4], [30, 5, 5, 5], [18, 9, 30, 9], [9, 0, 9, 4]])
    before, after = walk(sites, lists)
    for r, start, end in zip(lists.tolist(), before.tolist(), after.tolist(), strict=True):
        merged = {site.name: site.tokens for site in source.rewritten({"r": r})[1].report.sites if site.merged}
        assert merged
        walked = {site.name: (a, b) for site, a, b in zip(sites, start, end, strict=True) if a != b}
        assert walked == merged


def test_costs_follow_the_plan(steady: None) -> None:
    """FLOPs as planned, seconds that fall as more merges, and those of the unmerged model where nothing does."""
    source = source_of_tiny()
    costs = Costs(source, {}, config_from({"r": 1}), Batch((batches()[0],)))
    lists = np.array([[0, 0, 0, 0], [2, 2, 2, 2], [6, 6, 6, 6], [12, 4, 0, 4], [18, 9, 4, 2]])
    seconds, flops = costs.of(lists)
    assert (seconds[0], flops[0]) == (costs.plain, 1.0)
    assert (np.diff(seconds[1:3]) < 0).all()
    planned = [source.rewritten({"r": r})[1].plan.share for r in lists[1:].tolist()]
    np.testing.assert_allclose(flops[1:], planned, rtol=0.03)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_the_distance_is_of_each_sample_alone() -> None:
    a = {"x": torch.randn(3, 5, 2), "y": [torch.randn(3), torch.zeros(3, 4)]}
    b = {"x": torch.randn(3, 5, 2), "y": [torch.randn(3), torch.zeros(3, 4)]}
    found = distance(floats(a, 3), floats(b, 3), 3)
    assert found.shape == (3,)
    np.testing.assert_allclose(distance(floats(a, 3), floats(a, 3), 3), 0, atol=1e-12)
    of_x = torch.cosine_similarity(a["x"][1].flatten(), b["x"][1].flatten(), 0)
    cosines = [of_x, (a["y"][0][1] * b["y"][0][1]).sign(), 1]
    np.testing.assert_allclose(found[1], np.mean([1 - float(c) for c in cosines]), rtol=1e-5)
    other = {**a, "x": torch.cat([a["x"][:2], torch.randn(1, 5, 2)])}
    np.testing.assert_array_equal(distance(floats(other, 3), floats(b, 3), 3)[:2], found[:2])


def test_outputs_without_a_row_for_each_sample_count_as_one() -> None:
    assert [x.shape for x in floats((torch.ones(7), torch.tensor(2.0), torch.arange(3)), 3)] == [(1, 7), (1, 1)]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_isotonic_regression(ys: list[float]) -> None:
    """Rising, of the same mean, and what rises already is kept."""
    xs, fitted = rising(list(range(len(ys))), ys)
    assert (np.diff(fitted) >= -1e-9).all()
    assert fitted.mean() == pytest.approx(np.mean(ys), abs=1e-9)
    np.testing.assert_allclose(rising(xs.tolist(), sorted(ys))[1], sorted(ys))


def test_the_level_of_distance_is_where_the_loss_is_what_is_allowed() -> None:
    assert level([1.0, 2.0, 4.0], [0.0, 1.0, 3.0], 2.0) == pytest.approx(3.0)
    assert level([1.0, 2.0], [0.0, 0.1], 2.0) == 2.0  # beyond what was tried it is not known
    assert level([1.0, 2.0, 3.0], [1.0, -1.0, 3.0], 0.5) == pytest.approx(2.0 + 0.5 / 3)  # 1 and -1 are noise about 0


def test_a_metric_may_give_shares_of_a_sum() -> None:
    """Words: errors over all words, not the mean of each sample's share."""
    batch = Batch((torch.zeros(2, 1),), {}, None)
    rows = rows_of(lambda *_: [[9, 10], [0, 2]], None, batch)
    assert value(rows) == pytest.approx(9 / 12)
    assert value(rows_of(lambda *_: torch.tensor([True, False]), None, batch)) == 0.5
    assert value(rows_of(lambda *_: 0.25, None, batch)) == 0.25


def test_losses_of_a_metric_are_points_with_a_paired_interval() -> None:
    held, _ = batches_of(tiny_vit(), labelled(), True)
    judge = Judge(lambda batch: nn.functional.one_hot(batch.target, 10).float(), held, right)
    wrong = iter([1, 0, 0, 0, 0, 0, 0, 0])  # one of eight samples

    def run(batch: Batch) -> Tensor:
        shift = torch.tensor([next(wrong) for _ in batch.target])
        return nn.functional.one_hot((batch.target + shift) % 10, 10).float()

    judged = judge.judge(run)
    assert judge.loss(judged) == pytest.approx(12.5)
    low, high = judge.interval(judged, 0)
    assert 0 <= low < 12.5 < high < 60


def test_batches_are_parted_once_and_for_all() -> None:
    held, notes = batches_of(tiny_vit(), [*batches(5), torch.randn(1, 3, 24, 24)], False)
    assert "1 of 6 batches left out" in notes[0]
    ours, theirs = parted(held, 0.5, 3)
    assert sorted(map(id, ours + theirs)) == sorted(map(id, held))
    assert [*map(id, parted(held, 0.5, 3)[0])] == [*map(id, ours)] != [*map(id, parted(held, 0.5, 4)[0])]


# -- the guess ---------------------------------------------------------------------------------------------------------


def test_the_guess_finds_a_planted_optimum(steady: None) -> None:
    """Where one block loses a hundred times what others do, it merges nothing and the others keep the goal."""
    costs = Costs(source_of_tiny(), {}, config_from({"r": 1}), Batch((batches()[0],)))
    guess = Surrogate(costs, np.array([1.0, 100.0, 1.0, 1.0]), 1.0)
    for goal in (Goal("seconds", 0.5, False), Goal("flops", 0.75, True)):
        r = guess.best(goal, [4, 4, 4, 4])
        assert r[1] == 0 < r[0]
        _, flops = costs.of(np.array([r]))
        assert flops[0] <= 0.75 if goal.cost else guess.loss(np.array([r]))[0] <= 0.5


def test_the_guess_learns_from_what_was_evaluated(steady: None) -> None:
    """Weights that are wrong by their prior come near those by which the losses were made."""
    costs = Costs(source_of_tiny(), {}, config_from({"r": 1}), Batch((batches()[0],)))
    truth, guess = (Surrogate(costs, np.array(w), 1.0) for w in ([4.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]))
    lists = np.random.default_rng(0).integers(0, 9, (30, 4))
    losses = truth.loss(lists)
    before = np.abs(np.log(guess.loss(lists) / losses)).mean()
    guess.fit(lists.tolist(), losses.tolist(), float(np.median(losses)))
    assert np.abs(np.log(guess.loss(lists) / losses)).mean() < before / 4


# -- what is found -----------------------------------------------------------------------------------------------------


def found_by(**options: Any) -> Tuned:
    return tune(tiny_vit(), batches(), **{"target": "flops=0.75", "inner": "eager", "budget": 30, **options})


def test_a_target_of_flops(steady: None, tmp_path: Path) -> None:
    """Kept, no worse than the families, the same again by its seed, and the same after a file."""
    found = found_by(resume=tmp_path / "kept.json")
    assert found.reached and found.family is not None
    assert found.tuned_loss <= found.family["tuned_loss"]
    report = explain(tiny_vit(), (batches()[0],), **found.options)
    assert report.flops_after / report.flops_before == pytest.approx(found.flops)
    assert found.flops <= 0.75
    assert found.low <= found.loss <= found.high
    assert "reached" in str(found) and "blocks.0.attn" in str(found)
    found.save(tmp_path / "tune.json")
    assert Tuned.load(tmp_path / "tune.json") == found
    model, x = tiny_vit(), batches()[0]
    gm = tome_fx.rewrite(model, (x,), plain=False, **found.options)
    with torch.no_grad():  # the backend computes what was judged
        torch.testing.assert_close(torch.compile(model, backend=found.backend(inner="eager"))(x), gm(x))
    found.plot(tmp_path / "tune.png")
    assert (tmp_path / "tune.png").stat().st_size > 5000
    evaluated = len(json.loads((tmp_path / "kept.json").read_text())["points"])
    again = found_by(resume=tmp_path / "kept.json")
    assert len(json.loads((tmp_path / "kept.json").read_text())["points"]) == evaluated
    assert again.options == found.options


def test_a_target_of_loss(steady: None) -> None:
    """Kept on the batches tuned on, and at least as fast as the families, as predicted."""
    found = found_by(target=Loss(0.002))
    assert found.reached and 0 < found.tuned_loss <= 0.002
    assert found.family is not None and found.predicted >= found.family["predicted"]
    assert len(found.front) == len({point.speed for point in found.front})
    assert [p.distance for p in found.front] == sorted((p.distance for p in found.front), reverse=True)


def test_a_metric_and_options(steady: None) -> None:
    found = tune(tiny_vit(), labelled(), target=Loss(30.0), metric=right, search=("similarity", "prop_attn"),
                 inner="eager", budget=30)  # fmt: skip
    assert found.unit == "points" and found.reached
    assert found.tuned_loss <= 30
    assert set(found.options) <= {"r", "prop_attn", "similarity"}
    tried = [point.options for point in found.tried]
    assert any(options.get("prop_attn") is False for options in tried)
    assert {"similarity": "dot"} in tried


def test_what_cannot_be_reached_is_said(steady: None) -> None:
    found = found_by(target=Speed(50.0))
    assert not found.reached
    assert "cannot be reached" in str(found) and "nearest" in str(found)
    assert found.flops < 0.7  # not some timid schedule


@pytest.mark.slow
def test_compiled_code_that_is_slower_than_predicted_is_searched_again(
    steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, for as much more as it fell short of."""
    given = iter([1.0, 2.0])

    def measured(self: final.Final, *points: Any) -> Any:
        speed = next(given)
        return {final._id(p): {"speed": speed, "point": p} for p in points if p is not None}

    monkeypatch.setattr(final.Final, "_measured", measured)
    found = found_by(target=Speed(1.1))
    assert found.predicted > 1.19
    assert (found.reached, found.speed) == (True, 2.0)


def test_ctrl_c_gives_what_was_found(steady: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the search, and once more in the report."""
    evaluate = search.Search.evaluate

    def stopped(self: search.Search, *given: Any, late: bool = False, **more: Any) -> search.Point:
        if len(self.points) == 5 and not late:
            raise KeyboardInterrupt
        return evaluate(self, *given, late=late, **more)

    monkeypatch.setattr(search.Search, "evaluate", stopped)
    monkeypatch.setattr(final.Final, "_hold_out", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    found = found_by()
    assert "the search was stopped by hand" in found.notes
    assert (found.loss, found.reached) == (None, True)
    assert "the report was stopped by hand" in str(found) and "not held out" in str(found)


def test_a_budget_that_ends_among_the_first_still_finds_what_they_reached(
    steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a level of distance was known nothing counted as reached, whatever it had lost."""
    evaluate = search.Search.evaluate

    def slow(self: search.Search, *given: Any, late: bool = False, **more: Any) -> search.Point:
        if self.points and not late:
            raise search.Enough
        return evaluate(self, *given, late=late, **more)

    monkeypatch.setattr(search.Search, "evaluate", slow)
    found = tune(tiny_vit(), labelled(), target=Loss(99), metric=right, inner="eager")
    assert found.reached and found.options["r"][0] == 4
    assert "the budget ended the search" in " ".join(found.notes)


@pytest.mark.slow
def test_the_budget_ends_a_search(steady: None) -> None:
    found = found_by(budget=1e-6)
    assert "the budget ended the search: a larger one may find more" in found.notes
    assert any(found.options["r"])


# -- mistakes ----------------------------------------------------------------------------------------------------------


def mistakes() -> list[tuple[Callable[[], Any], str]]:
    model, some = tiny_vit(), batches()
    return [
        (lambda: tune(model, some, target="loss=much"), "a target is loss=0.5, .* not 'loss=much'"),
        (lambda: tune(model, some, target=0.5), "target must be Loss, Speed or Flops"),  # type: ignore[arg-type]
        (lambda: Loss(0), "Loss must be a number above 0"),
        (lambda: Speed(0.5), "Speed must be a number above 1"),
        (lambda: tome_fx.Flops(60), "Flops must be a number between 0 and 1"),
        (lambda: tune(model, [], target="flops=0.7"), "there are no batches"),
        (lambda: tune(model, some[:1], target="flops=0.7"), "two batches"),
        (lambda: tune(convolution(), [(x, 0) for x in some], target="flops=0.7"), "a batch is inputs alone"),
        (lambda: tune(model, some, target="flops=0.7", metric=right), r"a pair \(inputs, targets\)"),
        (lambda: tune(model, labelled(), target="loss=1", metric=raising), "the metric raised KeyError"),
        (lambda: tune(model, labelled(), target="loss=1", metric=lambda *_: "good"), "the metric gave str"),
        (lambda: tune(convolution(), some, target="flops=0.7"), "nothing to tune: nothing merged"),
        (lambda: tune(build(MEAN)[0].train(), some, target="flops=0.7"), "training mode"),
        (lambda: tune(model, some, target="flops=0.7", search=("scheduel",)), "search must be a tuple of names"),
        (lambda: tune(model, some, target="flops=0.7", r=8), "r is what tune looks for"),
        (lambda: tune(model, some, target="flops=0.7", budget=0), "budget must be a number of seconds"),
        (lambda: tune(model, some, target="flops=0.7", protct=1), 'did you mean "protect"'),
        (lambda: tune(model, [x * float("nan") for x in some], target="flops=0.7"), "itself gives NaN"),
    ]  # fmt: skip


@pytest.mark.parametrize("which", range(len(mistakes())))
def test_a_mistake_is_one_sentence(which: int) -> None:
    make, sentence = mistakes()[which]
    with pytest.raises(ValueError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_search_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({"fingerprint": "another", "points": {}}))
    with pytest.raises(tome_fx.TuneFileError, match="another model, data"):
        found_by(resume=path)
    path.write_text("[]")
    with pytest.raises(tome_fx.TuneFileError, match="keeps no search"):
        found_by(resume=path)


@pytest.mark.parametrize("text", ["loss=0.5", "speed=1.5", "flops=0.6"])
def test_targets_as_text(text: str) -> None:
    assert spelled(parse(text)) == text


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight photos in two folders."""
    Image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "photos" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_a_newcomers_trial(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steady: None
) -> None:
    """One command: a table, a plot and a file that explain, bench and export take."""
    out = tmp_path / "tune.json"
    words = [f"{HERE}:tiny_vit", *INPUT, "--inner", "eager"]
    more = ["--data", str(photos), "--target", "flops=0.75", "-o", str(out), "--budget", "30"]
    assert cli.main(["tune", *words, *more]) == 0
    assert "reached" in capsys.readouterr().out
    assert out.with_suffix(".png").exists()
    r = json.loads(out.read_text())["options"]["r"]
    numbers = tmp_path / "explain.json"
    assert cli.main(["explain", *words, "--tune", str(out), "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text())["r"] == r
    for command in (["bench"], ["export", "-o", str(tmp_path / "merged.pt2")]):
        assert subjects.config_of(cli.make_parser().parse_args([*command, *words, "--tune", str(out)]))["r"] == r
    held = Tuned.load(out)
    replace(held, options={**held.options, "metric": "value"}).save(out)
    assert cli.main(["explain", *words, "--tune", str(out), "--metric", "token"]) == 2
    assert "leave --metric out" in capsys.readouterr().err


def test_top1_by_the_folders_of_photos(photos: Path) -> None:
    from tome_fx.tuning import data

    look = data.Look((2, 3, 24, 24), torch.device("cpu"), torch.float32)
    made = data.folder(photos, look, 6, 0, 2)
    assert [x.shape for x, _ in made] == [(2, 3, 24, 24)] * 3
    assert set(torch.cat([labels for _, labels in made]).tolist()) == {0, 1}
    files = [photos / "dogs" / "1.png", photos / "cats" / "0.png"]
    assert data.labels_of(photos, files, 2) == dict(zip(files, (1, 0), strict=True))
    with pytest.raises(data.DataError, match="2 folders and the model 10 classes"):
        data.folder(photos, look, 6, 0, 10)


def test_words_heard_right() -> None:
    from tome_fx.tuning import data

    pytest.importorskip("jiwer")
    model = nn.Identity()
    with pytest.raises(data.DataError, match="a method decode"):
        data.words(model)
    model.decode = lambda outputs: ["press one now", "bye"]  # type: ignore[assignment]
    assert data.words(model)(None, ["press two now", "good bye"]).tolist() == [[2, 3], [1, 2]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "nowhere", "--target", "flops=0.7"], "nowhere is not a folder"),
        (["--data", "EMPTY", "--target", "flops=0.7"], "holds 0 photos"),
        (["--data", f"{HERE}:batches", "--target", "flops=0.7", "--metric", "top5"], "--metric is one of feature"),
        (["--data", f"{HERE}:labelled", "--target", "loss=1", "--metric", f"{HERE}:raising"], "the metric raised"),
        (["--data", f"{HERE}:batches", "--target", "flops=0.7", "--metric", "wer"], "wer needs a model with a method"),
        (["--data", f"{HERE}:batches", "--target", "flops=0.7", "--search", "all"], "search must be a tuple of names"),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path) if word == "EMPTY" else word for word in words]
    assert cli.main(["tune", f"{HERE}:tiny_vit", *INPUT, *words, "-o", str(tmp_path / "tune.json")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_files_that_tune_did_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    for text, sentence in (("{}", "is no file of"), ('{"tome_fx_tune": 99}', "is of version 99"),
                           ('{"tome_fx_tune": 1, "blocks": []}', "is damaged")):  # fmt: skip
        path.write_text(text)
        assert cli.main(["explain", f"{HERE}:tiny_vit", *INPUT, "--tune", str(path)]) == 2
        assert sentence in capsys.readouterr().err
    assert cli.main(["explain", f"{HERE}:tiny_vit", *INPUT, "--tune", str(tmp_path / "missing.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
