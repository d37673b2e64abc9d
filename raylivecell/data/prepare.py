"""Annotated images -> Parquet shards and dataset.json, on Ray Data.

1. `sources.read_source`   every COCO file, streamed; listed images matched with files. Files per image: paired by name
2. `_examine`              every listed file: checksum, size, depth, errors (Ray Data, `draw.examine`); then annotation
                           files per image (Ray Data, `paired_source.examine`)
3. `_check_images`        the rule for each defect of an image; the intensity rule of the dataset
4. `plan.plan_shards`      images sorted by name, 64 per shard
5. `_draw`                 missing or incomplete shards are drawn (Ray Data, `draw.draw_shard`), each with its account;
                           encoded cells and accounts are in OUT/.prepare-FINGERPRINT/
6. dataset.json, which marks a complete dataset, is written last; then the working folder is deleted

If killed at any moment and started again, it writes the same bytes: every file depends only on the source and the
settings and is written atomically, and an account is written only after its shard.
"""

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import ray.data

from raylivecell.annotations import categories
from raylivecell.core import console, storage
from raylivecell.core.errors import UserError
from raylivecell.data import description, draw, plan, shards, splitting
from raylivecell.data.config import PrepareConfig
from raylivecell.data.defects import (
    Defect,
    Entry,
    ImageInfo,
    apply_rules,
    check_intensity,
    intensity_rule,
    print_table,
    summary,
)
from raylivecell.data.description import ShardAccount
from raylivecell.data.paired_source import PairedSource, examine, to_info
from raylivecell.data.plan import ShardTask
from raylivecell.data.sources import Source, read_source
from raylivecell.images.intensity import Intensity
from raylivecell.images.planes import Choice
from raylivecell.images.scale import Scale
from raylivecell.runtime import session
from raylivecell.runtime.data_settings import data_settings, quiet_data
from raylivecell.runtime.ray_errors import as_user_errors, explain

IMAGES_PER_TASK = 64
"""Image files that one task examines: about 0.5 s of work."""


def prepare(
    source: str,
    out: str,
    config: PrepareConfig | None = None,
    strict: bool = False,
    read_rule: Callable[[str], Intensity] = shards.intensity,
    read_scale: Callable[[str], Scale] = shards.scale,
) -> dict[str, Any]:
    """Write the dataset at URI `out` from the annotated images in the folder or URI `source`.

    Args:
        source: a LIVECell-shaped folder, or any folder with images and annotations in a format of `config.format`.
        out: where to write the dataset. A dataset created from the same source and settings is not changed.
        config: settings; default: `PrepareConfig()`.
        strict: if there are defects, list them, raise UserError and leave nothing at `out`.
        read_rule: reads the intensity rule at the URI `config.intensity_from`; default: that of a dataset.
        read_scale: reads the scale at the URI `config.diameter_from`; default: that of a dataset.

    Returns:
        The content of dataset.json.
    """
    with as_user_errors():
        return _prepare(
            storage.absolute(source), storage.absolute(out), config or PrepareConfig(), strict, read_rule, read_scale
        )


def _prepare(
    source_uri: str,
    out: str,
    config: PrepareConfig,
    strict: bool,
    read_rule: Callable[[str], Intensity],
    read_scale: Callable[[str], Scale],
) -> dict[str, Any]:
    splitting.check_settings(config)
    settings = plan.requested_settings(source_uri, config)
    previous = _previous_dataset(out, settings, config)
    target_scale = read_scale(config.diameter_from) if config.diameter_from else None  # fails before images are read
    source = read_source(source_uri, config)
    session.connect()
    infos = _examine(source, config.choice)
    if isinstance(source, PairedSource):
        _examine_annotations(source, infos)
    entries, defects, rule = _check_images(source, infos, config, read_rule)
    if notice := categories.notice(source.categories, config.categories):
        _print(notice)
    with _listing(defects):
        _check_rules(defects, strict)
        _check_splits(source, Counter(entry.split for entry in entries), defects)
    for path in source.empty_files():
        _print(f"warning: {path} lists no image")
    pixel_scale = config.pixel_scale
    if target_scale is not None:
        pixel_scale = plan.pixel_scale_to(target_scale, source, entries, infos, config)
        _print(f"pixel scale: {pixel_scale:g}, from the cell size of {config.diameter_from}")
    plans = plan.plan_shards(source, entries, infos, config, pixel_scale)
    head = plan.dataset_head(settings, source, plans, rule, pixel_scale, config)
    if previous is not None and previous["source"] == head["source"] and _is_complete(out, previous):
        _delete_all_but(out, {shard.file for shard in plans})
        console.console.print(f"nothing to do: {out} already contains this dataset", markup=False, soft_wrap=True)
        return previous
    if previous is not None and previous["source"] != head["source"] and not config.overwrite:
        raise UserError(
            f"{source_uri}, or how it is read, changed since the dataset at {out} was created; set --overwrite to "
            "replace it"
        )
    if previous is not None and strict:  # some defects are found only while drawing, after the old shards are deleted
        raise UserError(f"--strict may stop half-way and would lose the dataset at {out}; choose another --out")
    work = storage.join(out, f".prepare-{head['source']['fingerprint'][:16]}")
    tasks = plan.shard_tasks(source, out, work, rule, plans, config)
    try:
        return _write(source, tasks, head, defects, strict)
    except UserError:
        _delete_all_but(out, set())
        raise


def _previous_dataset(out: str, settings: Mapping[str, Any], config: PrepareConfig) -> dict[str, Any] | None:
    """Return the description of the dataset at `out`, if any; UserError if it has another source or settings."""
    if not storage.exists(storage.join(out, "dataset.json")):
        return None
    previous: dict[str, Any] = storage.read_json(storage.join(out, "dataset.json"))
    with storage.validating(storage.join(out, "dataset.json"), "choose another --out, or delete it"):
        source = {key: previous.get("source", {}).get(key) for key in settings["source"]}
        rule, scale = Intensity.model_validate(previous["intensity"]), Scale.model_validate(previous.get("scale", {}))
    same = {"source": source, "targets": previous.get("targets"), "rules": previous.get("rules")} == settings
    same = same and (config.intensity_from is not None or rule.rule == (config.intensity or "robust"))
    same = same and (config.diameter_from is not None or scale.pixel_scale == config.pixel_scale)
    if not same and not config.overwrite:
        raise UserError(
            f"{out} contains a dataset created from {source['uri']} or with other settings; "
            "choose another --out or set --overwrite"
        )
    return previous


def _examine(source: Source | PairedSource, choice: Choice) -> dict[str, ImageInfo]:
    """Return the content of every listed image file, by path."""
    paths = sorted({entry.path for entry in source.entries if entry.path})
    rows = [
        {"source": source.uri, "paths": paths[first : first + IMAGES_PER_TASK], "choice": choice}
        for first in range(0, len(paths), IMAGES_PER_TASK)
    ]
    results = (item for result in _on_ray(_examine_images, rows) for item in result["infos"].items())
    return {path: ImageInfo(**info) for path, info in console.track(results, "examining images", len(paths))}


def _examine_annotations(source: PairedSource, images: Mapping[str, ImageInfo]) -> None:
    """Read all annotation files of a source with files per image."""
    rows = source.requests(images)
    results = (item for result in _on_ray(examine, rows) for item in result["infos"].items())
    count = sum(len(row["items"]) for row in rows)
    infos = {name: to_info(info) for name, info in console.track(results, "reading annotation files", count)}
    source.complete(infos, images)


def _on_ray(
    function: Callable[[dict[str, Any]], dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield `function(row)` for each row of plain types, as the results arrive; one Ray Data task per row."""
    if not rows:
        return
    items = [{"row": json.dumps(row)} for row in rows]
    task = functools.partial(_run_task, function=function)
    with data_settings():
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
    results = dataset.map_batches(task, batch_size=1)
    with as_user_errors(), quiet_data():
        for item in results.iter_rows():
            result = json.loads(item["result"])
            if "user_error" in result:
                raise UserError(result["user_error"])
            yield result


def _run_task(batch: Any, function: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Run `function` on one row. A UserError is returned as a value: if raised, Ray would log its stack traces."""
    try:
        return {"result": [json.dumps(function(json.loads(batch["row"][0])))]}
    except (UserError, OSError, MemoryError) as error:
        return {"result": [json.dumps({"user_error": str(explain(error))})]}


def _examine_images(row: dict[str, Any]) -> dict[str, Any]:
    choice = Choice(*row["choice"])
    return {"infos": {path: asdict(draw.examine(storage.join(row["source"], path), choice)) for path in row["paths"]}}


def _check_images(
    source: Source | PairedSource,
    infos: Mapping[str, ImageInfo],
    config: PrepareConfig,
    read_rule: Callable[[str], Intensity],
) -> tuple[list[Entry], list[Defect], Intensity]:
    """Return the images to draw, the defects of files and images, and the intensity rule of the dataset."""
    rules = config.on_defect
    labelled = config.format != shards.UNLABELLED
    entries, image_defects = apply_rules(source.entries, infos, source.covered_pixels, rules, labelled)
    if config.intensity_from:
        intensity = read_rule(config.intensity_from)
    else:
        intensity = intensity_rule(entries, infos, config.intensity or "robust")
    entries, intensity_defects = check_intensity(entries, infos, intensity, rules)
    defects = [*source.defects, *image_defects, *intensity_defects, *source.unlisted_files()]
    return entries, defects, intensity


def _print(line: str) -> None:
    console.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _listing(defects: Sequence[Defect]) -> Iterator[None]:
    """Print the table of defects if the `with` block raises UserError."""
    try:
        yield
    except UserError:
        print_table(defects, "Defects")
        raise


def _check_rules(defects: Sequence[Defect], strict: bool) -> None:
    """UserError for defects with the rule `refuse`, and for all if `strict`."""
    refused = [defect for defect in defects if defect.rule == "refuse" or strict]
    hint = "leave out --strict" if strict else "or change the rule (--on-defect)"
    if refused:
        details = [defect.detail for defect in refused if defect.defect == "background_label"]
        raise UserError(f"{summary(refused)}; fix them, {hint}{': ' if details else ''}{''.join(details[:1])}")


def _check_splits(source: Source | PairedSource, images: Mapping[str, int], defects: Sequence[Defect]) -> None:
    """UserError if a split lists images but none remains."""
    listed = {split: counts["images"] for split, counts in source.listed_counts().items()}
    if not any(listed.values()):
        files = ", ".join(source.empty_files())
        raise UserError(f"the annotation files of {source.uri} list no images: {files}; export the image records too")
    empty = [split for split, count in listed.items() if count and not images[split]]
    if empty:
        all_empty = not any(images.values())
        place = source.uri if all_empty else " and ".join(empty)
        hint = "" if all_empty else ", or choose other files with --annotations"
        reason = summary([defect for defect in defects if defect.split in (*empty, None)])
        raise UserError(f"no image of {place} can be used: {reason}; see the table above, and fix these{hint}")


def _is_complete(out: str, dataset: Mapping[str, Any]) -> bool:
    """Whether every shard in dataset.json exists."""
    names = {split: set(storage.list_names(storage.join(out, split))) for split in shards.SPLITS}
    with storage.validating(storage.join(out, "dataset.json"), "choose another --out, or delete it"):
        return all(
            shard["file"].rsplit("/", 1)[-1] in names[split]
            for split in shards.SPLITS
            for shard in dataset["splits"][split]["shards"]
        )


def _delete_all_but(out: str, files: set[str], work: str = "") -> None:
    """Delete files of other or killed runs at `out`, recognised by name, except shards `files` and folder `work`."""
    for name in storage.list_names(out):
        path = storage.join(out, name)
        partial = name.startswith(".dataset.json.") and storage.is_partial(name)
        if (name.startswith(".prepare-") and path != work) or partial:
            storage.delete(path)
    for split in shards.SPLITS:
        for name in storage.list_names(storage.join(out, split)):
            partial = name.startswith(".part-") and storage.is_partial(name)
            if (partial or re.fullmatch(r"part-\d{5}\.parquet", name)) and f"{split}/{name}" not in files:
                storage.delete(storage.join(out, split, name))


def _write(
    source: Source | PairedSource,
    tasks: Sequence[ShardTask],
    head: Mapping[str, Any],
    defects: Sequence[Defect],
    strict: bool,
) -> dict[str, Any]:
    """Write the missing shards, then dataset.json; return its content."""
    out = tasks[0].out
    files = {task.plan.file for task in tasks}
    storage.delete(storage.join(out, "dataset.json"))
    _delete_all_but(out, files, work=tasks[0].work)
    accounts = {task.plan.file: account for task in tasks if (account := _finished(task))}
    accounts |= _draw(source, [task for task in tasks if task.plan.file not in accounts])
    dataset = description.describe([accounts[task.plan.file] for task in tasks], head, defects, source.listed_counts())
    every_defect = [Defect(**defect) for defect in dataset["defects"]["found"]]
    with _listing(every_defect):
        _check_result(dataset, source, every_defect, strict)
    print_table(every_defect, "Defects (dataset.json lists all)")
    storage.write_json(storage.join(out, "dataset.json"), dataset)
    _delete_all_but(out, files)
    for line in _remaining(dataset):
        _print(line)
    counts = ", ".join(f"{name} {split['images']}" for name, split in dataset["splits"].items())
    console.console.print(f"written: {out}/dataset.json and shards; images: {counts}", markup=False, soft_wrap=True)
    return dataset


def _finished(task: ShardTask) -> ShardAccount | None:
    """Return the account of a shard that an earlier run finished, if its file is complete."""
    if not storage.exists(task.account_uri):
        return None
    value = storage.read_json(task.account_uri)
    with storage.validating(task.account_uri, "delete it to draw its shard again"):
        account = ShardAccount.from_json(value)
        if not account.rows:
            return account
        uri = task.shard_uri
        complete = storage.exists(uri) and hashlib.sha256(storage.read_bytes(uri)).hexdigest() == account.sha256
    return account if complete else None


def _draw(source: Source | PairedSource, tasks: Sequence[ShardTask]) -> dict[str, ShardAccount]:
    """Draw and write the shards of `tasks`; return their accounts by file."""
    entries = {(entry.split, entry.annotation, entry.image.id): entry for entry in source.entries}
    rows = []
    for task in console.track(tasks, "sorting outlines", len(tasks)):
        cells = [source.encoded_cells(entries[i.split, i.annotation, i.id]) for i in task.plan.images]
        storage.write_bytes(task.cells_uri, b"".join(cells))
        rows.append(replace(task, cell_bytes=tuple(len(data) for data in cells)).to_row())
    accounts = {}

    def drawn_images() -> Iterator[None]:
        for result in _on_ray(_draw_shard, rows):
            account = ShardAccount.from_json(result)
            accounts[account.file] = account
            yield from [None] * images_per_file[account.file]

    images_per_file = {task.plan.file: len(task.plan.images) for task in tasks}
    for _ in console.track(drawn_images(), "drawing images", sum(images_per_file.values())):
        pass
    return accounts


def _draw_shard(row: dict[str, Any]) -> dict[str, Any]:
    return asdict(draw.draw_shard(ShardTask.from_row(row)))


def _check_result(
    dataset: Mapping[str, Any], source: Source | PairedSource, defects: Sequence[Defect], strict: bool
) -> None:
    """UserError for defects if `strict`, for splits without images, and for annotated datasets without cells."""
    if strict and defects:
        raise UserError(f"{summary(defects)}; fix them or leave out --strict")
    _check_splits(source, {split: counts["images"] for split, counts in dataset["splits"].items()}, defects)
    if dataset["source"]["format"] == shards.UNLABELLED:
        return
    cells = {split: counts["cells"] for split, counts in dataset["splits"].items() if counts["images"]}
    if not any(cells.values()) or cells.get("train") == 0:
        place = "train" if any(cells.values()) else source.uri
        raise UserError(f"no cell of {place} can be used: {summary(defects)}; see the table above, and fix these")
    for split, count in cells.items():
        if not count:
            _print(f"warning: {split} contains no cells: its images are all background")


def _remaining(dataset: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for test, for each other split that lost images or cells, and for those with ignored pixels."""
    for split, counts in dataset["splits"].items():
        listed = counts["listed"]
        lost = (counts["images"], counts["cells"]) != (listed["images"], listed["cells"])
        if listed["images"] and (lost or split == "test"):
            images, cells = (f"{counts[key]:,} of {listed[key]:,} {key}" for key in ("images", "cells"))
            yield f"{split}: {images} and {cells} remain"
        if ignored := counts.get("ignored"):
            yield f"{split}: {ignored['pixels']:,} pixels of {ignored['images']:,} images are ignored"
