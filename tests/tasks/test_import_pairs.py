"""Human preference data become shards: which rows are taken, how pictures are fitted, and what a kill leaves."""

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data.export import PICKAPIC, export_pickapic
from data.hub import HubTable
from data.human import HumanData, human_data, read_pair
from data.manifest import read_manifest, verify
from data.schema import read_metadata
from data.shards import ShardError, read_shard
from tasks.import_pairs import Import, import_pairs, plan_import
from tasks.record.recipe import ParameterError, resolve
from tests.data.human_world import ROWS, row, save
from tests.families import FamilyBases
from training.loop.dataset import PreferencePairs

GIVEN = ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "are_different", "model_0", "model_1")


@pytest.fixture
def job(tiny_preset: Path, tmp_path: Path) -> Import:
    """24 rows in two files, of which 19 are pairs; 8 rows a shard."""
    save(tmp_path / "0.parquet", ROWS[:10])
    save(tmp_path / "1.parquet", ROWS[10:])
    return planned(tiny_preset, tmp_path)


def planned(
    preset: Path, folder: Path, source: Path | None = None, rows: int = 8, max_pairs: int | None = None
) -> Import:
    recipe = resolve(str(preset), 0, {}, {})
    return plan_import(str(source or folder), recipe, max_pairs, folder / "imports", rows)


def table_of(folder: Path) -> pa.Table:
    return pa.concat_tables([read_shard(folder / shard.file) for shard in read_manifest(folder).shards])


def test_rows_that_decide_something_become_shards(job: Import) -> None:
    folder = import_pairs.fn(job)
    verify(folder, "deep")
    table = table_of(folder)
    taken = [index for index in range(24) if index not in (3, 4, 9, 10, 15)]
    assert table["caption"].to_pylist() == [ROWS[index]["caption"] for index in taken]
    for name in ("label_0", "label_1", "model_0", "model_1"):
        assert table[name].to_pylist() == [ROWS[index][name] for index in taken]
    assert [image["bytes"] for image in table["image_1"].to_pylist()] == [ROWS[index]["jpg_1"] for index in taken]
    card = (folder / "README.md").read_text()
    assert "19 pairs of 24 rows; left out: 2 (8.3 %) ties, 1 (4.2 %) without a decision" in card
    assert "1 (4.2 %) of identical images, 1 (4.2 %) broken" in card and "not from people" not in card
    metadata = read_metadata(table.schema)
    assert metadata["base_model"]["id"] == str(job.model.base) and metadata["pictures"]["height"] == 32
    assert len(PreferencePairs(folder)) == 19


def test_latents_and_embeddings_are_the_base_models_own(job: Import) -> None:
    """Computed here with diffusers and transformers alone, one picture at a time."""
    from diffusers import StableDiffusionPipeline

    first = read_shard(import_pairs.fn(job) / "00000.arrow").slice(0, 3).to_pylist()
    pipeline = StableDiffusionPipeline.from_pretrained(job.model.base)
    for given, kept in zip(ROWS[:3], first, strict=True):
        for side, (tall, wide) in enumerate([(38, 32), (32, 57)]):  # the shorter side becomes 32
            picture = (
                Image.open(io.BytesIO(given[f"jpg_{side}"]))
                .convert("RGB")
                .resize((wide, tall), Image.Resampling.LANCZOS)
            )
            top, left = (tall - 32) // 2, (wide - 32) // 2
            pixels = np.asarray(picture)[top : top + 32, left : left + 32].astype(np.float32) / 127.5 - 1
            with torch.no_grad():
                posterior = pipeline.vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist
            expected = posterior.mean * pipeline.vae.config.scaling_factor
            np.testing.assert_allclose(kept[f"latent_{side}"], expected.flatten(), rtol=2e-3, atol=2e-3)
        tokens = pipeline.tokenizer(given["caption"], padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            expected = pipeline.text_encoder(tokens.input_ids).last_hidden_state
        np.testing.assert_allclose(kept["prompt_embedding"], expected.flatten(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["sdxl", "sd3-no-t5", "flux-dev"])
def test_encoders_without_their_network_encode_as_the_whole_pipeline(tmp_path: Path, family: str) -> None:
    from training.model.families import family_for
    from training.model.loading import load_encoders, load_pipeline
    from training.model.pair_encoder import PairEncoder
    from training.model.reference import ModelRef
    from training.model.sampling import embed_prompts

    ref = ModelRef(str(FamilyBases(tmp_path).folder(family)))
    encoder, whole = PairEncoder(load_encoders(ref), 32, 48, 2, False), load_pipeline(ref)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    with torch.no_grad():
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        latents = family_for(ref).encode(whole, pixels)
    np.testing.assert_allclose(encoder.latents(pictures), latents, rtol=2e-3, atol=2e-3)
    ours, expected = encoder.embed(["a", "b c"]), embed_prompts(whole, ["a", "b c"])
    assert torch.equal(ours.tokens, expected.tokens) and torch.equal(ours.pooled, expected.pooled)
    sizes = encoder.schema({})
    assert sizes.field("latent_0").type.list_size == latents[0].numel()
    assert sizes.field("pooled_embedding").type.list_size == expected.pooled.shape[1]


def test_swapped_labels_swap_winner_and_loser(job: Import, tiny_preset: Path, tmp_path: Path) -> None:
    swapped = [{**each, "label_0": each["label_1"], "label_1": each["label_0"]} for each in ROWS]
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / "all.parquet", swapped)
    ours = PreferencePairs(import_pairs.fn(job)).read([(0, index) for index in range(19)])
    other = planned(tiny_preset, tmp_path, tmp_path / "other")
    theirs = PreferencePairs(import_pairs.fn(other)).read([(0, index) for index in range(19)])
    assert torch.equal(ours.winner, theirs.loser) and torch.equal(ours.loser, theirs.winner)
    assert not torch.equal(ours.winner, theirs.winner)
    assert torch.equal(ours.prompts.tokens, theirs.prompts.tokens)


class Killed(RuntimeError):
    pass


@pytest.mark.parametrize("last", ["counts/00001.json", "00001.arrow"])
def test_a_killed_import_goes_on_where_it_stopped(job: Import, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    """Killed in its second shard, before the counts or the shard get their names; the result is as if nothing had
    been."""
    whole = import_pairs.fn(replace(job, target=job.target.parent / "whole"))
    rename = os.replace

    def kill(old: str, new: str) -> None:
        if str(new).endswith(last):
            raise Killed
        rename(old, new)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("data.shards.os.replace", kill)
        import_pairs.fn(job)
    assert [path.name for path in sorted(job.folder.glob("*.arrow"))] == ["00000.arrow"]
    when = job.shard(0).stat().st_mtime_ns
    import_pairs.fn(job)
    assert job.shard(0).stat().st_mtime_ns == when, "a shard that was there has been written again"
    assert read_manifest(job.folder).dataset_id == read_manifest(whole).dataset_id
    stamps = {path: path.stat().st_mtime_ns for path in job.folder.rglob("*")}
    import_pairs.fn(job)
    assert stamps == {path: path.stat().st_mtime_ns for path in job.folder.rglob("*")}


def test_the_first_so_many_pairs(job: Import, tiny_preset: Path, tmp_path: Path) -> None:
    few = planned(tiny_preset, tmp_path, max_pairs=10)
    assert few.folder != job.folder
    captions = table_of(import_pairs.fn(few))["caption"].to_pylist()
    assert captions == table_of(import_pairs.fn(job))["caption"].to_pylist()[:10]


def test_any_source_gives_the_same_rows(job: Import, tmp_path: Path) -> None:
    """Parquet, both Arrow formats, `datasets` pictures, and a stream as from the hub; from any row on."""

    def seen(rows: Any) -> list[tuple[object, ...]]:
        return [tuple(each[name] for name in GIVEN) for each in rows]

    expected = seen(ROWS)
    table = pa.Table.from_pylist(ROWS, schema=PICKAPIC)
    (tmp_path / "arrow").mkdir()
    for name, writer in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        with writer(tmp_path / f"arrow/{name}.arrow", table.schema) as out:
            out.write_table(table)
    (tmp_path / "hub").mkdir()
    for path in job.data.source.files:
        shutil.copy(path, tmp_path / "hub" / f"train-{path.name}")
    stream = HumanData(HubTable(str(tmp_path / "hub"), "train"))
    assert stream.source.columns == table.column_names
    for start in (0, 5, 7, 10, 13, 23, 24, 30):
        assert seen(job.data.rows(start)) == expected[start:]
        assert seen(stream.rows(start)) == expected[start:]
        for name in ("file", "stream"):
            data = human_data(str(tmp_path / f"arrow/{name}.arrow"))
            assert data.count() == 24 and seen(data.rows(start)) == expected[start:]
    as_struct = row(0, jpg_0={"bytes": ROWS[0]["jpg_0"], "path": None})
    pair, plain = read_pair(as_struct, 0, 32, 32), read_pair(ROWS[0], 0, 32, 32)
    assert pair is not None and plain is not None and pair.files == plain.files


def test_what_we_export_can_be_imported(job: Import, tiny_preset: Path, tmp_path: Path) -> None:
    folder = import_pairs.fn(job)
    source = export_pickapic(folder, tmp_path / "export" / "all.parquet")
    again = table_of(import_pairs.fn(planned(tiny_preset, tmp_path, source)))
    names = ["caption", "image_0_uid", "image_1_uid", "label_0", "latent_0", "latent_1", "prompt_embedding"]
    assert again.select(names).to_pylist() == table_of(folder).select(names).to_pylist()


def test_bad_sources_are_refused_before_a_model_is_loaded(
    tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            planned(tiny_preset, tmp_path, Path(source))

    monkeypatch.setattr("tasks.import_pairs.load_encoders", None)
    lacking = pa.schema([field for field in PICKAPIC if field.name not in ("jpg_1", "label_0")])
    save(tmp_path / "bad.parquet", [{"caption": "a"}], lacking)
    refused(
        str(tmp_path / "bad.parquet"), r"pairs=.*bad\.parquet: no column jpg_1, label_0; .* there are caption, jpg_0"
    )
    (tmp_path / "text.parquet").write_text("no parquet")
    refused(str(tmp_path / "text.parquet"), r"pairs=.*text\.parquet")
    refused(str(tmp_path / "nowhere.parquet"), r"pairs=.*nowhere\.parquet")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), r"pairs=.*neither sealed preference shards .* nor a \.parquet")
    refused("no such thing", r"pairs='no such thing': no such folder or file, and no hub data set 'owner/name'")
    refused(
        "nobody/nothing", r"pairs='nobody/nothing': no such folder or file, and as a hub data set it cannot be read"
    )


def test_our_own_unfinished_shards_are_not_taken_for_human_data(job: Import, tiny_preset: Path, tmp_path: Path) -> None:
    folder = import_pairs.fn(job)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"a preference shard of ours without its manifest\.json"):
        planned(tiny_preset, tmp_path, folder)


def test_too_many_broken_pictures_are_refused_with_the_rows(tiny_preset: Path, tmp_path: Path) -> None:
    rows = [row(index, **({"jpg_0": b"x"} if index in (9, 13) else {})) for index in range(24)]
    job = planned(tiny_preset, tmp_path, save(tmp_path / "a.parquet", rows))
    for _ in range(2):  # a second attempt comes to the same end
        with pytest.raises(ParameterError, match=r"rows 8 to 15: 2 of 16 labelled pairs have .* more than 5%"):
            import_pairs.fn(job)
    strange = save(tmp_path / "b.parquet", [row(0, label_0=0.7, label_1=0.3)])
    with pytest.raises(ParameterError, match=r"label_0 is 0\.7, expected 0, 0\.5 or 1"):
        import_pairs.fn(planned(tiny_preset, tmp_path, strange))
    ties = save(tmp_path / "c.parquet", [row(0, label_0=0.5, label_1=0.5)])
    with pytest.raises(ParameterError, match=r"no pair remains; 0 pairs of 1 rows; left out: 1 \(100\.0 %\) ties"):
        import_pairs.fn(planned(tiny_preset, tmp_path, ties))


def test_a_shard_of_another_import_is_not_adopted(job: Import) -> None:
    import_pairs.fn(job)
    other = replace(job, digest="another")
    shutil.copytree(job.folder, other.folder)
    (other.folder / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"base_model\.digest"):
        import_pairs.fn(other)
