"""How scorers are found by name, checked without weights, and guarded."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.hub import is_hub_id
from scoring.scorers.registry import (
    BUILTINS,
    ScorerSource,
    Spec,
    UnknownScorer,
    check_scorer,
    known_scorers,
    load_scorer,
    parse_spec,
)
from scoring.scorers.scorer import ScorerInfo, ScoringError, score_images
from scoring.scorers.sources import PINNED, fingerprint

PLUGIN = '''
import numpy as np
from types import SimpleNamespace

class Brightness:
    """A plug-in as a stranger writes it: it knows nothing of this project."""

    def __init__(self, source=None, device="cpu", **options):
        self.asked = {"source": source, "device": device, **options}
        self.info = SimpleNamespace(name="brightness", version="1", unit="level", higher_is_better=True,
                                    source="code", fingerprint="0")

    def score(self, images, prompts):
        return np.array([image.mean() for image in images], dtype=np.float32)

    def close(self):
        pass

class Careless:
    def __init__(self, source=None, device="cpu"):
        self.info = SimpleNamespace(name="careless", version="1")
'''
IMAGES = [np.full((2, 3, 3), level, dtype=np.uint8) for level in (10, 20, 30)]
PROMPTS = ["a", "b", "a cat"]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package: a module and the dist-info that announces it."""
    (tmp_path / "brightness_plugin.py").write_text(PLUGIN)
    info = tmp_path / "brightness_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlaif.scorers]\nbrightness = brightness_plugin:Brightness\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "brightness_plugin", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("brightness_plugin:Brightness", {}),
        ("brightness", {}),
        ("light", {"light": ScorerSource(factory="brightness_plugin:Brightness")}),
        ("pickscore", {"pickscore": ScorerSource(factory="brightness_plugin:Brightness")}),
    ],
    ids=["dotted path", "entry point", "factory of a source", "factory in place of a built-in"],
)
def test_plugins_are_found(plugin: Path, name: str, sources: dict[str, ScorerSource]) -> None:
    check_scorer(name, sources)
    scorer = load_scorer(name, sources)
    assert scorer.info.name == "brightness"
    assert score_images(scorer, IMAGES, PROMPTS).tolist() == [10, 20, 30]


def test_plugins_get_their_source_and_only_what_is_set(plugin: Path) -> None:
    bound = {"brightness": ScorerSource("some/where")}
    scorer: Any = load_scorer("brightness", bound, "cuda:1")
    assert scorer.asked == {"source": "some/where", "device": "cuda:1"}
    bound = {"brightness": replace(bound["brightness"], variant="dim", revision="abc")}
    scorer = load_scorer("brightness", bound)
    assert scorer.asked == {"source": "some/where", "device": "cpu", "variant": "dim", "revision": "abc"}


def test_known_scorers(plugin: Path) -> None:
    names = known_scorers({"mine": ScorerSource(factory="brightness_plugin:Brightness")})
    assert names == sorted(names) and {"brightness", "hpsv2", "mine", "pickscore"} <= set(names)


@pytest.mark.parametrize("use", [check_scorer, load_scorer])
def test_unknown_scorer_lists_the_names(plugin: Path, use: Any) -> None:
    names = ", ".join(sorted({*BUILTINS, "brightness"}))
    with pytest.raises(UnknownScorer, match=f"'hpsv3' is not known; known scorers: {names}, or"):
        use("hpsv3", {})
    with pytest.raises(UnknownScorer, match="'mine' has a source but no factory"):
        use("mine", {"mine": ScorerSource("some/where")})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Class", "'no_such_module:Class' does not import: No module named 'no_such_module'"),
        ("brightness_plugin:Missing", "does not import: .*Missing"),
        ("brightness_plugin:", r"not of the form name\[:variant\]"),
        (":Brightness", r"not of the form name\[:variant\]"),
        ("light", 'not of the form "package.module:Class"'),
    ],
)
def test_dotted_paths_that_do_not_import(plugin: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_scorer(name, {"light": ScorerSource(factory="brightness_plugin")})


def test_plugin_without_proper_info_is_refused(plugin: Path) -> None:
    """What `ScorerInfo` has a default for may be left out."""
    with pytest.raises(ScoringError, match=r"'Careless' lacks in its info: unit$"):
        load_scorer("brightness_plugin:Careless", {})


@pytest.mark.parametrize(
    ("name", "files", "lacks"),
    [
        ("hpsv2", [], r"HPS_v2.1_compressed.safetensors or HPS_v2.1_compressed.pt; it holds nothing"),
        ("hpsv2", ["HPS_v2_compressed.pt"], r".*v2.1_compressed.pt; it holds HPS_v2_compressed.pt"),
        (
            "hpsv2",
            ["open_clip_config.json"],
            "open_clip_model.safetensors or .*; it holds open_clip_config.json",
        ),
        ("pickscore", ["model.safetensors"], "config.json"),
        ("pickscore", ["config.json"], "model.safetensors or "),
    ],
)
def test_incomplete_folders_are_refused(name: str, files: list[str], lacks: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).touch()
    for use in (check_scorer, load_scorer):
        with pytest.raises(ValueError, match=f"scorer '{name}': folder .* lacks {lacks}"):
            use(name, {name: ScorerSource(str(tmp_path))})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hpsv2", "scorer 'hpsv2': unknown variant 'v9', not v2.0 or v2.1"),
        ("pickscore", "scorer 'pickscore' takes no 'variant'; it takes revision, batch_size"),
    ],
)
def test_missing_folder_and_wrong_variant_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"scorer '{name}': no folder"):
        check_scorer(name, {name: ScorerSource(str(tmp_path / "missing"))})
    with pytest.raises(ValueError, match=message):
        check_scorer(name, {name: ScorerSource(variant="v9")})


SAID = ("variant", "revision")
WORD = st.text(st.characters(codec="utf-8", exclude_characters=" :@?,()&="), min_size=1).filter(
    lambda text: not any(letter.isspace() for letter in text)
)
VALUES = st.one_of(st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False), WORD)


@given(
    WORD,
    st.none() | WORD,
    st.none() | WORD,
    st.dictionaries(st.from_regex(r"[a-z_]\w*", fullmatch=True).filter(str.isidentifier), VALUES, max_size=3),
)
def test_a_spec_reads_back_as_it_is_written(
    name: str, variant: str | None, revision: str | None, options: dict[str, Any]
) -> None:
    """Any spec that can be read; its text may change once (1e2 becomes 100.0), its meaning never."""
    read = parse_spec(str(Spec(name, variant, revision, {k: v for k, v in options.items() if k not in SAID})))
    assert (read.name, read.variant, read.revision) == (name, variant, revision)
    assert parse_spec(str(read)) == read and str(parse_spec(str(read))) == str(read)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("hpsv2", Spec("hpsv2")),
        ("hpsv2:v2.0@0a1b?antialias=0&batch_size=8", Spec("hpsv2", "v2.0", "0a1b", {"antialias": 0, "batch_size": 8})),
        ("clip:owner/name@main", Spec("clip", "owner/name", "main")),
        ("x?a=true&b=null&c=-1.5e3", Spec("x", options={"a": True, "b": None, "c": -1500.0})),
        ('x?a=NaN&b=1e999&c=[1]&d="1"&e=', Spec("x", options=dict(a="NaN", b="1e999", c="[1]", d='"1"', e=""))),
        ("x?revision=12345e7&source=007", Spec("x", options={"revision": "12345e7", "source": "007"})),
    ],
)
def test_specs_are_read(text: str, spec: Spec) -> None:
    read = parse_spec(text)
    assert read == spec and [type(v) for v in read.options.values()] == [type(v) for v in spec.options.values()]


@pytest.mark.parametrize("text", ["", "a b", "mean(x,y)", "x?", "x:", "x@", "x?a", "x?=1", "x?a=1&", "x?1=2"])
def test_what_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not of the form"):
        parse_spec(text)


@pytest.mark.parametrize("text", ["x?a=1&a=1", "x:v1?variant=v2", "x@1?revision=2"])
def test_what_is_said_twice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is given twice"):
        parse_spec(text)


def test_the_spec_wins_over_the_source(plugin: Path) -> None:
    """Of options only those that are named; None leaves what the source says."""
    bound = {"brightness": ScorerSource("a", variant="dim", revision="1", options={"x": 1, "y": 2})}
    scorer: Any = load_scorer("brightness:bright@2?x=3&source=b", bound)
    expected = {"source": "b", "device": "cpu", "variant": "bright", "revision": "2", "x": 3, "y": 2}
    assert scorer.asked == expected
    scorer = load_scorer("brightness?variant=bright&revision=2&x=3&source=b", bound)
    assert scorer.asked == expected
    scorer = load_scorer("brightness_plugin:Brightness@2?x=3", {})
    assert scorer.asked == {"source": None, "device": "cpu", "revision": "2", "x": 3}


def test_options_reach_a_built_in_and_others_are_refused(hpsv2_folder: Path) -> None:
    bound = {"hpsv2": ScorerSource(str(hpsv2_folder))}
    off = load_scorer("hpsv2?antialias=0", bound)
    assert "no-antialias" in off.info.preprocessing
    assert off.info.fingerprint != load_scorer("hpsv2", bound).info.fingerprint
    assert off.info.weights == load_scorer("hpsv2?antialias=true", bound).info.weights
    for use in (check_scorer, load_scorer):
        with pytest.raises(ValueError, match="takes no 'antialais'; it takes revision, variant, antialias, batch_size"):
            use("hpsv2?antialais=0", bound)
        with pytest.raises(ValueError, match="antialias must be 0 or 1, got 'off'"):
            use("hpsv2?antialias=off", bound)


def test_a_built_in_under_another_name(pickscore_folder: Path) -> None:
    """Any folder in PickScore's format, tuned by someone else, beside the published one."""
    sources = {"mine": ScorerSource(str(pickscore_folder), factory="pickscore")}
    check_scorer("mine", sources)
    assert load_scorer("mine", sources).info.source == str(pickscore_folder)
    with pytest.raises(ValueError, match="'pickscore': no folder"):
        check_scorer("mine?source=/no/such/folder", sources)


def test_the_preference_scale_can_be_replaced(plugin: Path, pickscore_folder: Path) -> None:
    """Of a built-in and of a plug-in that has none; nothing else of the info changes."""
    sources = {"pickscore": ScorerSource(str(pickscore_folder), preference_scale=0.5)}
    own = load_scorer("pickscore", {"pickscore": ScorerSource(str(pickscore_folder))}).info
    assert load_scorer("pickscore", sources).info == replace(own, preference_scale=0.5) != own
    assert load_scorer("pickscore?preference_scale=2", sources).info.preference_scale == 2
    assert load_scorer("brightness?preference_scale=2", {}).info.preference_scale == 2
    assert load_scorer("pickscore?preference_scale=null", sources).info.preference_scale == 0.5
    with pytest.raises(ValueError, match="preference_scale=-1 would prefer the worse image"):
        load_scorer("pickscore?preference_scale=-1", sources)
    for wrong in ("much", "0", "1e999"):
        with pytest.raises(ValueError, match="preference_scale must be a finite number other than 0"):
            check_scorer(f"pickscore?preference_scale={wrong}", sources)


def test_complete_folders_pass(hpsv2_folder: Path, pickscore_folder: Path) -> None:
    for name, folder in (("hpsv2", hpsv2_folder), ("pickscore", pickscore_folder)):
        check_scorer(name, {name: ScorerSource(str(folder))})


def test_hub_ids_pass_online_and_need_the_cache_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = {
        "hpsv2": ScorerSource("nobody/no-such-repository"),
        "pickscore": ScorerSource("nobody/no-such-repository"),
    }
    for name in bound:
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set and 'nobody/no-such-repository' is not"):
            check_scorer(name, bound)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in bound:
        check_scorer(name, bound)


def test_hub_ids_and_folders_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below an existing folder "weights", "weights/typo" is a mistyped folder and no user's repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "here").mkdir(parents=True)
    assert is_hub_id("xswu/HPSv2")
    for folder in (
        "weights/here",
        "weights/typo",
        "/xswu/HPSv2",
        "./xswu",
        "~/HPSv2",
        "a/b/c",
        "name",
        "../x",
    ):
        assert not is_hub_id(folder), folder


INFO = ScorerInfo("dummy", "1", "level", True, "code", "0")


def _returns(value: Any) -> Any:
    return SimpleNamespace(info=INFO, score=lambda images, prompts: value, close=lambda: None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_scores_that_are_no_numbers_are_refused_by_name_and_prompt(bad: float) -> None:
    """1e300 is finite as a double and infinite as the float32 that is stored."""
    message = r"scorer 'dummy' returned .* for image 2 with prompt 'a cat' \(1 of 3 scores"
    with pytest.raises(ScoringError, match=message):
        score_images(_returns(np.array([1.0, 2.0, bad])), IMAGES, PROMPTS)


@pytest.mark.parametrize("bad", [np.zeros((3, 1)), np.zeros(2), 1.0, ["a", "b", "c"], np.zeros(3, dtype=bool)])
def test_results_of_another_shape_or_kind_are_refused(bad: Any) -> None:
    with pytest.raises(ScoringError, match=r"expected float32 of shape \(3,\)"):
        score_images(_returns(bad), IMAGES, PROMPTS)


def test_guard_converts_and_passes(recwarn: pytest.WarningsRecorder) -> None:
    scores = score_images(_returns([1, 2, 3]), IMAGES, PROMPTS)
    assert scores.dtype == np.float32 and scores.tolist() == [1, 2, 3]
    assert score_images(_returns(None), [], []).shape == (0,)
    with pytest.raises(ValueError, match="got 3 images and 1 prompts"):
        score_images(_returns([1, 2, 3]), IMAGES, ["a"])


def _breaks(at: str | None, batches: bool = False) -> Any:
    """A plug-in that raises for one prompt, or for more than one image at a time."""

    def score(images: Any, prompts: Any) -> list[float]:
        if at in prompts or (batches and len(images) > 1):
            raise KeyError("no such layer")
        return [0.0] * len(prompts)

    return SimpleNamespace(info=INFO, score=score, close=lambda: None)


def test_exceptions_of_a_plugin_name_it_and_the_image_that_fails() -> None:
    with pytest.raises(ScoringError, match="'dummy' failed at image 1 with prompt 'b': KeyError: 'no such") as caught:
        score_images(_breaks("b"), IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)
    message = "'dummy' failed on 3 images, first prompt 'a', but on none alone: KeyError"
    with pytest.raises(ScoringError, match=message):
        score_images(_breaks(None, batches=True), IMAGES, PROMPTS)


def test_a_plugin_gets_arrays_unless_it_takes_tensors() -> None:
    seen: list[Any] = []
    tensor = torch.from_numpy(np.stack(IMAGES)).permute(0, 3, 1, 2)
    scorer = SimpleNamespace(info=INFO, score=lambda images, prompts: seen.append(images) or [0.0] * 3)
    score_images(scorer, tensor, PROMPTS)
    np.testing.assert_array_equal(seen[0], IMAGES)
    scorer.takes_tensors = True
    score_images(scorer, tensor, PROMPTS)
    assert seen[1] is tensor


def test_errors_survive_a_process_boundary() -> None:
    import pickle

    for error in (UnknownScorer("x"), ScoringError("y")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error)


def test_fingerprint_separates_facts_from_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    base = fingerprint([tmp_path / "a"], name="x", dtype="float32")
    assert base == fingerprint([tmp_path / "a"], dtype="float32", name="x")
    assert len({base, fingerprint([tmp_path / "a"], name="x", dtype="float16"), fingerprint([], name="x")}) == 3


LIGHT = """
import sys
from pathlib import Path
import data.pictures, data.tables, scoring.scorers.scorer, scoring.labels.pairing, scoring.verdict.verdict
import scoring.scorers.images, scoring.scorers.model, scoring.scorers.cosine
import scoring.scorers.hpsv2, scoring.scorers.pickscore, scoring.tools.benchmark
from scoring.scorers.registry import ScorerSource, check_scorer, known_scorers
known_scorers({})
check_scorer("hpsv2", {"hpsv2": ScorerSource(sys.argv[1])})
check_scorer("pickscore", {"pickscore": ScorerSource(sys.argv[2])})
scoring.verdict.verdict.win_rate_interval(3, 2, 1)
if len(sys.argv) > 3:
    scoring.scorers.hpsv2.HPSv2(sys.argv[1]).load()
print(sorted({"torch", "transformers", "open_clip", "prefect", "scipy.stats"} & set(sys.modules)))
"""


def test_checking_a_scorer_loads_neither_torch_nor_weights(hpsv2_folder: Path, pickscore_folder: Path) -> None:
    command = [sys.executable, "-c", LIGHT, str(hpsv2_folder), str(pickscore_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.slow
def test_the_test_of_light_imports_can_fail(hpsv2_folder: Path, pickscore_folder: Path) -> None:
    command = [sys.executable, "-c", LIGHT, str(hpsv2_folder), str(pickscore_folder), "load"]
    assert "torch" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_default_repository_is_taken_at_its_pinned_commit(
    hpsv2_folder: Path,
    hpsv2_state: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The cache holds two commits of it; main is the other one. One that is asked for wins over the pinned one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, pinned, other = "xswu/HPSv2", PINNED["xswu/HPSv2"], "f" * 40
    folder = tmp_path / "models--xswu--HPSv2"
    for commit in (pinned, other):
        shutil.copytree(hpsv2_folder, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(other)
    for spec, expected in ((f"hpsv2?source={repository}", pinned), (f"hpsv2@{other}?source={repository}", other)):
        check_scorer(spec, {})
        info = load_scorer(spec, {}).info
        assert (info.revision, info.source) == (expected, f"{repository}@{expected}")
    assert "is not pinned" not in caplog.text
    monkeypatch.setattr("scoring.scorers.sources.PINNED", {})
    assert load_scorer("hpsv2", {}).info.revision == other and f"revision='{other}'" in caplog.text
