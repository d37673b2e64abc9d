"""Annotated images -> Parquet shards and dataset.json, through Ray Data.

1. `plan.read_source`  every annotation file, streamed (coco); names resolved to files (image_names)
2. `_examine`          every listed file: checksums, size, depth, unreadable ones (Ray Data, samples.examine)
3. `defects.apply_rules`     the stated rule for each defect of an image; `set_intensity`: the set's one intensity rule
4. `plan.plan_shards`  images sorted by name, 64 a shard; a shard's outlines wait in OUT/.prepare-FINGERPRINT/
5. `_draw`             shards not yet whole are drawn and written (Ray Data, samples.write_part), each with its account
6. dataset.json, the mark of a whole dataset, is written last; then the working folder goes

Killed at any moment and started again, it ends with the same bytes: every file is a function of the source and the
settings, is written atomically, and an account is written only after its shard.
"""

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import ray.data

from raylivecell.annotations import categories
from raylivecell.core import console, storage
from raylivecell.core.errors import UserError
from raylivecell.data import defect_table, defects, description, draw, plan, set_intensity, shards
from raylivecell.data.defects import Defect, DefectRules, ImageInfo
from raylivecell.data.plan import PrepareConfig
from raylivecell.images.intensity import Intensity
from raylivecell.runtime import session
from raylivecell.runtime.data_settings import data_settings, quiet_data
from raylivecell.runtime.ray_errors import as_user_errors, explain

EXAMINE_TOGETHER = 64
"""Image files a task examines: about 0.5 s of work."""


def prepare(
    source: str,
    out: str,
    config: PrepareConfig | None = None,
    strict: bool = False,
    read_rule: Callable[[str], Intensity] = shards.intensity,
) -> dict[str, Any]:
    """Write the dataset at URI `out` from the annotated images in the folder or URI `source`.

    Args:
        source: a LIVECell-shaped folder, or any folder with COCO JSON and images.
        out: where the dataset goes. A dataset made of the same source and settings is left as it is.
        config: settings; default: `PrepareConfig()`.
        strict: raise UserError, after listing them, where there are defects; nothing is left at `out` then.
        read_rule: reads the intensity rule at the URI `config.intensity_from`; default: that of a dataset.

    Returns:
        What dataset.json holds.
    """
    with as_user_errors():
        return _prepare(storage.absolute(source), storage.absolute(out), config or PrepareConfig(), strict, read_rule)


def _prepare(
    source: str, out: str, config: PrepareConfig, strict: bool, read_rule: Callable[[str], Intensity]
) -> dict[str, Any]:
    head = plan.heading(source, config)
    old = _existing(out, head, config)
    read = plan.read_source(source, config)
    session.connect()
    facts = _examine(read)
    kept, found = defects.apply_rules(read.entries, facts, lambda entry: plan.covered_pixels(read, entry), config)
    if config.intensity_from:
        rule = read_rule(config.intensity_from)
    else:
        rule = set_intensity.rule_of_set(kept, facts)
    kept, unusual = set_intensity.judge_levels(kept, facts, rule, config)
    found = [*read.found, *found, *unusual, *plan.unlisted(read, config)]
    if notice := categories.notice(read.categories, config.categories):
        _say(notice)
    with _listing(found):
        _refuse(found, strict)
        _require(read, Counter(entry.split for entry in kept), found)
    _tell_empty_files(read)
    jobs = plan.plan_shards(read, kept, facts, out, config, rule)
    head |= {"categories": read.categories, "intensity": rule.model_dump(mode="json")}
    head |= description.legal(*plan.statements(read)) | {"source": head["source"] | plan.provenance(read, jobs, head)}
    if old is not None and old["source"] == head["source"] and _is_whole(out, old):
        _clean(out, jobs)
        console.console.print(f"nothing to do: {out} is this dataset already", markup=False, soft_wrap=True)
        return old
    if old is not None and old["source"] != head["source"] and not config.overwrite:
        raise UserError(f"{out} holds a dataset of another state of {source}; set --overwrite to replace it")
    if old is not None and strict:  # some defects show only while drawing, when the old shards are gone
        raise UserError(f"--strict may stop half-way and would lose the dataset at {out}; choose another --out")
    try:
        return _write(read, jobs, head, found, out, config, strict)
    except UserError:
        _clean(out, [])
        raise


def _existing(out: str, head: dict[str, Any], config: PrepareConfig) -> dict[str, Any] | None:
    """The description of the dataset that `out` holds, if any; UserError where it was made from something else."""
    if not storage.exists(storage.join(out, "dataset.json")):
        return None
    old: dict[str, Any] = storage.read_json(storage.join(out, "dataset.json"))
    with storage.validating(storage.join(out, "dataset.json"), "choose another --out, or delete it"):
        source = {key: old.get("source", {}).get(key) for key in head["source"]}
    same = [source, old.get("targets"), old.get("rules")] == [head["source"], head["targets"], head["rules"]]
    if not same and not config.overwrite:
        raise UserError(
            f"{out} holds a dataset made from {source['uri']} or with other settings; "
            "choose another --out or set --overwrite"
        )
    return old


def _is_whole(out: str, old: dict[str, Any]) -> bool:
    """Whether every shard that dataset.json names is there."""
    names = {split: set(storage.list_names(storage.join(out, split))) for split in shards.SPLITS}
    with storage.validating(storage.join(out, "dataset.json"), "choose another --out, or delete it"):
        return all(
            shard["file"].rsplit("/", 1)[-1] in names[split]
            for split in shards.SPLITS
            for shard in old["splits"][split]["shards"]
        )


def _examine(read: plan.Source) -> dict[str, ImageInfo]:
    """What every listed image file holds, by path."""
    paths = sorted({entry.path for entry in read.entries if entry.path})
    jobs = [
        {"source": read.uri, "paths": paths[first : first + EXAMINE_TOGETHER]}
        for first in range(0, len(paths), EXAMINE_TOGETHER)
    ]
    facts = {}
    done = (one for result in _on_ray(_examine_some, jobs) for one in result["facts"].items())
    for path, fact in console.track(done, "examining images", len(paths)):
        facts[path] = ImageInfo(**fact)
    return facts


def _write(
    read: plan.Source,
    jobs: list[dict[str, Any]],
    head: dict[str, Any],
    found: list[Defect],
    out: str,
    config: PrepareConfig,
    strict: bool,
) -> dict[str, Any]:
    """Write the shards that are not whole yet, then dataset.json."""
    storage.delete(storage.join(out, "dataset.json"))
    work = storage.join(out, f".prepare-{head['source']['fingerprint'][:16]}")
    _clean(out, jobs, keep=work)
    accounts = {}
    for job in jobs:
        name = job["file"].replace("/", "-").removesuffix(".parquet")
        job |= {"cells": storage.join(work, f"{name}.cells"), "account": storage.join(work, f"{name}.json")}
        if account := _finished(job):
            accounts[job["file"]] = account
    pending = [job for job in jobs if job["file"] not in accounts]
    accounts |= _draw(read, pending, config)
    ordered = [accounts[job["file"]] | {"split": job["split"]} for job in jobs]
    told = description.describe(ordered, head, [asdict(one) for one in found], read.listed())
    everything = [Defect(**one) for one in told["defects"]["found"]]
    with _listing(everything):
        _check_end(told, read, everything, strict)
    defect_table.show(everything, "Defects (all are named in dataset.json)")
    storage.write_json(storage.join(out, "dataset.json"), told)
    _clean(out, jobs)
    for line in _remaining(told):
        _say(line)
    counts = ", ".join(f"{name} {split['images']}" for name, split in told["splits"].items())
    console.console.print(f"written: {out}/dataset.json and shards; images: {counts}", markup=False, soft_wrap=True)
    return told


def _finished(job: dict[str, Any]) -> dict[str, Any] | None:
    """The account of a shard that an earlier run finished, if its file is there whole."""
    if not storage.exists(job["account"]):
        return None
    account: dict[str, Any] = storage.read_json(job["account"])
    with storage.validating(job["account"], "delete it, and its shard is drawn again"):
        if not account["rows"]:
            return account
        uri = storage.join(job["out"], job["file"])
        whole = storage.exists(uri) and hashlib.sha256(storage.read_bytes(uri)).hexdigest() == account["sha256"]
    return account if whole else None


def _draw(read: plan.Source, jobs: list[dict[str, Any]], config: PrepareConfig) -> dict[str, dict[str, Any]]:
    """Write the shards of `jobs`; their accounts by file."""
    entries = {(entry.split, entry.annotation, entry.image.id): entry for entry in read.entries}
    for job in console.track(jobs, "sorting outlines", len(jobs)):
        payloads = [read.payload(entries[job["split"], one["annotation"], one["id"]]) for one in job["images"]]
        job["images"] = [one | {"cells_bytes": len(data)} for one, data in zip(job["images"], payloads)]
        storage.write_bytes(job["cells"], b"".join(payloads))
    rules = config.model_dump(include=set(DefectRules.model_fields))
    accounts = {}

    def images() -> Iterator[None]:
        for account in _on_ray(_draw_some, [job | {"rules": rules} for job in jobs]):
            accounts[account["file"]] = account
            yield from [None] * sizes[account["file"]]

    sizes = {job["file"]: len(job["images"]) for job in jobs}
    for _ in console.track(images(), "drawing images", sum(sizes.values())):
        pass
    return accounts


def _examine_some(job: dict[str, Any]) -> dict[str, Any]:
    return {"facts": {path: asdict(draw.examine(storage.join(job["source"], path))) for path in job["paths"]}}


def _draw_some(job: dict[str, Any]) -> dict[str, Any]:
    return draw.write_part(job, DefectRules(**job["rules"]))


def _run_job(batch: Any, function: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """One Ray Data task. A UserError travels as a value: raised here, Ray would log it with its own stack traces."""
    try:
        return {"result": [json.dumps(function(json.loads(batch["job"][0])))]}
    except (UserError, OSError, MemoryError) as error:
        return {"result": [json.dumps({"user_error": str(explain(error))})]}


def _on_ray(
    function: Callable[[dict[str, Any]], dict[str, Any]], jobs: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """`function` of each job, each in a Ray Data task of its own; results as they come."""
    if not jobs:
        return
    rows = [{"job": json.dumps(job)} for job in jobs]
    task = functools.partial(_run_job, function=function)
    with data_settings():
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    results = dataset.map_batches(task, batch_size=1)
    with as_user_errors(), quiet_data():
        for row in results.iter_rows():
            result = json.loads(row["result"])
            if "user_error" in result:
                raise UserError(result["user_error"])
            yield result


def _clean(out: str, jobs: list[dict[str, Any]], keep: str = "") -> None:
    """Delete what is no part of the dataset of `jobs` and was left by other or broken runs: ours, by name."""
    for name in storage.list_names(out):
        path = storage.join(out, name)
        partial = name.startswith(".dataset.json.") and storage.is_partial(name)
        if (name.startswith(".prepare-") and path != keep) or partial:
            storage.delete(path)
    wanted = {job["file"] for job in jobs}
    for split in shards.SPLITS:
        for name in storage.list_names(storage.join(out, split)):
            partial = name.startswith(".part-") and storage.is_partial(name)
            if (partial or re.fullmatch(r"part-\d{5}\.parquet", name)) and f"{split}/{name}" not in wanted:
                storage.delete(storage.join(out, split, name))


def _refuse(found: Sequence[Defect], strict: bool) -> None:
    """UserError for defects whose rule says so, and for all where `strict`, after listing them."""
    refused = [one for one in found if one.rule == "refuse" or strict]
    hint = "leave out --strict" if strict else "or change the rule"
    if refused:
        raise UserError(f"{defect_table.summary(refused)}; fix them, {hint}")


@contextmanager
def _listing(found: Sequence[Defect]) -> Iterator[None]:
    """Show the table of defects where the block raises UserError."""
    try:
        yield
    except UserError:
        defect_table.show(found, "Defects")
        raise


def _require(read: plan.Source, images: Mapping[str, int], found: Sequence[Defect]) -> None:
    """UserError where a split lists images and none is left."""
    listed = {split: counts["images"] for split, counts in read.listed().items()}
    if not any(listed.values()):
        files = ", ".join(path for _, path in read.files)
        raise UserError(f"the annotation files of {read.uri} list no image: {files}; export the images' records too")
    emptied = [split for split, count in listed.items() if count and not images[split]]
    if emptied:
        every = not any(images.values())
        where = read.uri if every else " and ".join(emptied)
        hint = "" if every else ", or choose other files with --annotations"
        reason = defect_table.summary([one for one in found if one.split in (*emptied, None)])
        raise UserError(f"no image of {where} can be used: {reason}; see the table above, and fix these{hint}")


def _check_end(told: Mapping[str, Any], read: plan.Source, found: Sequence[Defect], strict: bool) -> None:
    """UserError for defects where `strict`, for splits that lost all images and for a set without a cell."""
    if strict and found:
        raise UserError(f"{defect_table.summary(found)}; fix them or leave out --strict")
    _require(read, {split: counts["images"] for split, counts in told["splits"].items()}, found)
    _require_cells(told, read, found)


def _require_cells(told: Mapping[str, Any], read: plan.Source, found: Sequence[Defect]) -> None:
    """UserError where the set or its training images hold no cell; a line for other splits without one."""
    cells = {split: counts["cells"] for split, counts in told["splits"].items() if counts["images"]}
    if not any(cells.values()) or cells.get("train") == 0:
        where = "train" if any(cells.values()) else read.uri
        raise UserError(
            f"no cell of {where} can be used: {defect_table.summary(found)}; see the table above, and fix these"
        )
    for split, count in cells.items():
        if not count:
            _say(f"warning: {split} holds no cell: its images are all background")


def _remaining(told: Mapping[str, Any]) -> Iterator[str]:
    """A line for test, and for each split that lost images or cells."""
    for split, counts in told["splits"].items():
        listed = counts["listed"]
        lost = (counts["images"], counts["cells"]) != (listed["images"], listed["cells"])
        if listed["images"] and (lost or split == "test"):
            images, cells = (f"{counts[what]:,} of {listed[what]:,} {what}" for what in ("images", "cells"))
            yield f"{split}: {images} and {cells} that are listed remain"


def _tell_empty_files(read: plan.Source) -> None:
    for (_, path), annotations in read.files.items():
        if not annotations.images:
            _say(f"warning: {path} lists no image")


def _say(line: str) -> None:
    console.console.print(line, markup=False, highlight=False, soft_wrap=True)
