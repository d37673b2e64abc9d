"""Annotated images -> Parquet shards and dataset.json, through Ray Data.

1. `_read`      every annotation file, streamed (coco), names resolved to files (sources)
2. `_examine`   every listed file: checksums, size, depth, unreadable ones (Ray Data, samples.examine)
3. `judge`      the stated rule for each defect of an image (defects)
4. `_plan`      images sorted by name, in shards of 64; each shard's outlines wait in OUT/.prepare-FINGERPRINT/
5. `_draw`      shards not yet whole are drawn and written (Ray Data, samples.write_part), each with its account
6. dataset.json, the mark of a whole dataset, is written last; then the working folder goes

Killed at any moment and started again, it ends with the same bytes: every file is a function of the source and the
settings, is written atomically, and an account is written only after its shard.
"""

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import ray.data
from pydantic import Field
from rich.table import Table

from raylivecell import __version__, coco, defects, description, outlines, progress, runtime, samples, shards, storage
from raylivecell.defects import DefectRules, Entry, Facts, Found
from raylivecell.errors import UserError
from raylivecell.sources import ImageFolder, find_annotations, find_images, is_safe_name, list_files
from raylivecell.targets import MAX_CELLS, TargetsConfig

EXAMINE_TOGETHER = 64
"""Image files a task examines: about 0.5 s of work."""


class PrepareConfig(DefectRules):
    """What to read, how to draw it, and what happens to each kind of defect."""

    annotations: dict[Literal["train", "val", "test"], str] = Field(default={})
    """Annotation file of each split, as a path inside the source or a pattern (`LIVECell_single_cells/*/train.json`);
    empty: found by name."""
    images: str | None = None
    """Folder of the images inside the source; default: `images` where there is one, else the whole source."""
    targets: TargetsConfig = TargetsConfig()
    """How targets are drawn."""
    shard_images: int = Field(default=64, ge=1)
    """Images a shard."""
    overwrite: bool = False
    """Replace a dataset that OUT already holds and that was made from something else."""


@dataclass(frozen=True)
class _Source:
    """A source, read."""

    uri: str
    folder: ImageFolder
    files: dict[tuple[str, str], coco.Annotations]
    """By (split, path)."""
    entries: list[Entry]
    found: list[Found]

    def payload(self, entry: Entry) -> bytes:
        return self.files[entry.split, entry.annotation].payload(entry.image.id)


def prepare(source: str, out: str, config: PrepareConfig | None = None, strict: bool = False) -> dict[str, Any]:
    """Write the dataset at URI `out` from the annotated images in the folder or URI `source`.

    Args:
        source: a LIVECell-shaped folder, or any folder with COCO JSON and images.
        out: where the dataset goes. A dataset made of the same source and settings is left as it is.
        config: settings; default: `PrepareConfig()`.
        strict: raise UserError, after listing them, where there are defects; nothing is left at `out` then.

    Returns:
        What dataset.json holds.
    """
    config = config or PrepareConfig()
    source, out = storage.absolute(source), storage.absolute(out)
    head = _head(source, config)
    old = _existing(out, head, config)
    runtime.connect()
    read = _read(source, config)
    facts = _examine(read)
    kept, found = defects.judge(read.entries, facts, lambda entry: _covered(read, entry), config)
    found = [*read.found, *found, *_unlisted(read, config)]
    _refuse(found, strict)
    if not kept:
        raise UserError(f"no image of {source} can be used: {_summary(found)}; see the table above")
    jobs = _plan(read, kept, facts, out, config)
    head |= description.legal(*_statements(read)) | {"source": head["source"] | _provenance(read, jobs, head)}
    if old is not None and old["source"] == head["source"]:
        _clean(out, jobs)
        return old
    if old is not None and not config.overwrite:
        raise UserError(f"{out} holds a dataset of an older state of {source}; set --overwrite to replace it")
    try:
        return _write(read, jobs, head, found, out, config, strict)
    except UserError:
        storage.delete(storage.join(out, "dataset.json"))
        for job in jobs:
            storage.delete(storage.join(out, job["file"]))
        _clean(out, [])
        raise


def _head(source: str, config: PrepareConfig) -> dict[str, Any]:
    """The part of dataset.json that is known before the source is read: a record of what was asked for."""
    plain = re.sub(r"//[^/@]*@", "//", source)  # keys in a URI stay out of the record
    rules = config.model_dump(include=set(DefectRules.model_fields))
    asked = config.model_dump(include={"annotations", "images", "shard_images"})
    return {
        "name": "",
        "licence": "",
        "citation": "",
        "source": {"uri": plain, **asked},
        "targets": config.targets.model_dump(),
        "rules": rules,
    }


def _existing(out: str, head: dict[str, Any], config: PrepareConfig) -> dict[str, Any] | None:
    """The description of the dataset that `out` holds, if any; UserError where it was made from something else."""
    if not storage.exists(storage.join(out, "dataset.json")):
        return None
    old: dict[str, Any] = storage.read_json(storage.join(out, "dataset.json"))
    asked = [head["source"] | old.get("source", {}), head["targets"], head["rules"]]
    same = asked == [old.get("source", {}) | head["source"], old.get("targets"), old.get("rules")]
    if not same and not config.overwrite:
        raise UserError(
            f"{out} holds a dataset made from {old.get('source', {}).get('uri')} or with other settings; "
            "choose another --out or set --overwrite"
        )
    return old


def _read(uri: str, config: PrepareConfig) -> _Source:
    """Read the annotation files and resolve their images' names."""
    listing = list_files(uri)
    chosen = find_annotations(listing, {str(split): path for split, path in config.annotations.items()}, uri)
    read = _Source(uri, find_images(listing, config.images), {}, [], [])
    paths = [(split, path) for split, several in chosen.items() for path in several]
    for split, path in progress.track(paths, "reading annotations", len(paths)):
        filesystem, full = storage.open_uri(storage.join(uri, path))
        with filesystem.open_input_stream(full) as stream:
            annotations = coco.read_annotations(stream, path)
        read.files[split, path] = annotations
        _add(read, split, annotations, config)
    return read


def _add(read: _Source, split: str, annotations: coco.Annotations, config: PrepareConfig) -> None:
    """Add one annotation file's entries and what is wrong with its records."""

    def note(defect: str, ids: list[int | str], detail: str, name: str = annotations.name) -> None:
        read.found.append(Found(defect, defects.rule_of(config, defect), name, split, ids, detail))

    counts = annotations.counts()
    gone: set[int | str | None] = set()
    if annotations.broken is not None:
        if config.truncated_json == "refuse" or not annotations.images:
            raise annotations.broken
        gone.add(annotations.last_image)
        note("truncated_json", [one for one in gone if one is not None], str(annotations.broken))
    reasons: dict[tuple[str, str], list[int | str]] = defaultdict(list)
    for section, identity, reason in annotations.bad:
        reasons[section, reason].append("?" if identity is None else identity)
    for (section, reason), ids in reasons.items():
        note("bad_record", ids, f"{section}: {reason}")
    seen: set[int | str] = set()
    for image in annotations.images:
        if image.id in seen or image.id in gone or not is_safe_name(image.file_name):
            if image.id not in gone:
                reason = "id of another image" if image.id in seen else "the file name leads out of the image folder"
                note("bad_record", [image.id], f"images: {reason}", image.file_name)
            continue
        seen.add(image.id)
        path, several = read.folder.find(image.file_name, split)
        if len(several) > 1:
            note("ambiguous_file", [image.id], f"{', '.join(several)}", image.file_name)
            path = path if config.ambiguous_file == "prefer_split_folder" else None
        kind = description.cell_type_of(image.file_name, annotations.category(image.id))
        read.entries.append(Entry(split, annotations.name, image, path, counts.get(image.id, 0), kind))
    known = {image.id for image in annotations.images}
    orphans = [identity for identity in counts if identity not in known]
    if orphans:
        note("orphan_annotation", orphans, f"{sum(counts[one] for one in orphans)} annotations of images not listed")


def _unlisted(read: _Source, config: PrepareConfig) -> list[Found]:
    """Image files that no annotation file may mean."""
    listed = {path for entry in read.entries for path in read.folder.candidates(entry.image.file_name)}
    rule = defects.rule_of(config, "unlisted_file")
    return [
        Found("unlisted_file", rule, path.rsplit("/", 1)[-1], None, [], path)
        for path in read.folder.paths
        if path not in listed
    ]


def _covered(read: _Source, entry: Entry) -> float:
    return outlines.covered(coco.decode_cells(read.payload(entry)))


def _examine(read: _Source) -> dict[str, Facts]:
    """What every listed image file holds, by path."""
    paths = sorted({entry.path for entry in read.entries if entry.path})
    jobs = [
        {"source": read.uri, "paths": paths[first : first + EXAMINE_TOGETHER]}
        for first in range(0, len(paths), EXAMINE_TOGETHER)
    ]
    facts = {}
    done = (one for result in _on_ray(_examine_task, jobs) for one in result["facts"].items())
    for path, fact in progress.track(done, "examining images", len(paths)):
        facts[path] = Facts(**fact)
    return facts


def _plan(
    read: _Source, kept: list[Entry], facts: dict[str, Facts], out: str, config: PrepareConfig
) -> list[dict[str, Any]]:
    """One job a shard, in the order of the dataset."""
    bits = max((facts[entry.path or ""].bits for entry in kept), default=8)
    jobs = []
    for split in shards.SPLITS:
        mine = [entry for entry in kept if entry.split == split]
        for number, first in enumerate(range(0, len(mine), config.shard_images)):
            jobs.append(
                {
                    "source": read.uri,
                    "out": out,
                    "split": split,
                    "file": f"{split}/part-{number:05d}.parquet",
                    "bits": bits,
                    "border_sigma": config.targets.border_sigma,
                    "images": [_image_job(e, facts, config) for e in mine[first : first + config.shard_images]],
                }
            )
    return jobs


def _image_job(entry: Entry, facts: dict[str, Facts], config: PrepareConfig) -> dict[str, Any]:
    fact = facts[entry.path or ""]
    if entry.cells > MAX_CELLS:
        raise UserError(f"{entry.image.file_name} has {entry.cells} cells, labels hold {MAX_CELLS}; cut it into tiles")
    told = (entry.image.width or fact.width, entry.image.height or fact.height)
    scale = (fact.width / told[0], fact.height / told[1]) if config.wrong_size == "scale" else (1.0, 1.0)
    return {
        "file_name": entry.image.file_name,
        "path": entry.path,
        "split": entry.split,
        "annotation": entry.annotation,
        "id": entry.image.id,
        "cell_type": entry.cell_type,
        "sha256": fact.sha256,
        "scale": scale,
    }


def _statements(read: _Source) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`info` and `licenses` of the annotation files, the first one's first."""
    info: dict[str, Any] = {}
    for annotations in read.files.values():
        info = annotations.info | info
    return info, [licence for annotations in read.files.values() for licence in annotations.licences]


def _provenance(read: _Source, jobs: list[dict[str, Any]], head: dict[str, Any]) -> dict[str, Any]:
    """Annotation files with their checksums, and the fingerprint of everything that the dataset's bytes depend on."""
    files = [
        {
            "split": split,
            "file": path,
            "sha256": annotations.sha256,
            "bytes": annotations.size,
            "images": len(annotations.images),
            "cells": sum(annotations.counts().values()),
        }
        for (split, path), annotations in read.files.items()
    ]
    version = [__version__, shards.FORMAT_VERSION, str(shards.SCHEMA)]
    plan = [{key: value for key, value in job.items() if key not in ("source", "out")} for job in jobs]
    text = json.dumps([version, head["source"], head["targets"], head["rules"], files, plan], sort_keys=True)
    return {"files": files, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}


def _write(
    read: _Source,
    jobs: list[dict[str, Any]],
    head: dict[str, Any],
    found: list[Found],
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
    told = description.describe(ordered, head, [asdict(one) for one in found])
    _show(told["defects"]["found"])
    if strict and told["defects"]["found"]:
        raise UserError(
            f"{_summary([Found(**one) for one in told['defects']['found']])}; mend them or leave out --strict"
        )
    storage.write_json(storage.join(out, "dataset.json"), told)
    _clean(out, jobs)
    return told


def _finished(job: dict[str, Any]) -> dict[str, Any] | None:
    """The account of a shard that an earlier run finished, if its file is there whole."""
    if not storage.exists(job["account"]):
        return None
    account: dict[str, Any] = storage.read_json(job["account"])
    if not account["rows"]:
        return account
    uri = storage.join(job["out"], job["file"])
    whole = storage.exists(uri) and hashlib.sha256(storage.read_bytes(uri)).hexdigest() == account["sha256"]
    return account if whole else None


def _draw(read: _Source, jobs: list[dict[str, Any]], config: PrepareConfig) -> dict[str, dict[str, Any]]:
    """Write the shards of `jobs`; their accounts by file."""
    entries = {(entry.split, entry.annotation, entry.image.id): entry for entry in read.entries}
    for job in progress.track(jobs, "sorting outlines", len(jobs)):
        payloads = [read.payload(entries[job["split"], one["annotation"], one["id"]]) for one in job["images"]]
        job["images"] = [one | {"cells_bytes": len(data)} for one, data in zip(job["images"], payloads)]
        storage.write_bytes(job["cells"], b"".join(payloads))
    rules = config.model_dump(include=set(DefectRules.model_fields))
    accounts = {}

    def images() -> Iterator[None]:
        for account in _on_ray(_draw_task, [job | {"rules": rules} for job in jobs]):
            accounts[account["file"]] = account
            yield from [None] * sizes[account["file"]]

    sizes = {job["file"]: len(job["images"]) for job in jobs}
    for _ in progress.track(images(), "drawing images", sum(sizes.values())):
        pass
    return accounts


def _examine_task(batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
    job = json.loads(batch["job"][0])
    facts = {path: asdict(samples.examine(storage.join(job["source"], path))) for path in job["paths"]}
    return {"result": [json.dumps({"facts": facts})]}


def _draw_task(batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
    job = json.loads(batch["job"][0])
    return {"result": [json.dumps(samples.write_part(job, DefectRules(**job["rules"])))]}


def _on_ray(task: Callable[..., Any], jobs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`task` of each job as a Ray Data task of its own; results as they come. A task's UserError is raised here."""
    if not jobs:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = 1800
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = [{"job": json.dumps(job)} for job in jobs]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        task, batch_size=1, batch_format="numpy"
    )
    try:
        for row in dataset.iter_rows():
            yield json.loads(row["result"])
    except ray.exceptions.RayTaskError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise cause or error from None


def _clean(out: str, jobs: list[dict[str, Any]], keep: str = "") -> None:
    """Delete what is no part of the dataset of `jobs` and was left by other or broken runs: ours, by name."""
    for name in storage.list_names(out):
        path = storage.join(out, name)
        if (name.startswith(".prepare-") and path != keep) or re.fullmatch(r"\.dataset\.json\..*\.partial", name):
            storage.delete(path)
    wanted = {job["file"] for job in jobs}
    for split in shards.SPLITS:
        for name in storage.list_names(storage.join(out, split)):
            ours = re.fullmatch(r"part-\d{5}\.parquet|\.part-\d{5}\.parquet\..*\.partial", name)
            if ours and f"{split}/{name}" not in wanted:
                storage.delete(storage.join(out, split, name))


def _refuse(found: Sequence[Found], strict: bool) -> None:
    """UserError for defects whose rule says so, and for all where `strict`, after listing them."""
    refused = [one for one in found if one.rule == "refuse" or strict]
    if refused:
        _show([asdict(one) for one in found])
        raise UserError(f"{_summary(refused)}; mend them, {'leave out --strict' if strict else 'or change the rule'}")


def _summary(found: Sequence[Found]) -> str:
    """`3 defects (leak 2: NAME, ...; missing_file 1: NAME)`."""
    by_defect: dict[str, list[str]] = defaultdict(list)
    for one in found:
        by_defect[one.defect].append(one.file_name)
    parts = [
        f"{defect} {len(names)}: {names[0]}{', ...' if len(names) > 1 else ''}" for defect, names in by_defect.items()
    ]
    return f"{len(found)} defect{'s' * (len(found) != 1)} ({'; '.join(parts)})"


def _show(found: Sequence[dict[str, Any]]) -> None:
    """Print the table of defects, if any."""
    by_defect: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        by_defect[one["defect"]].append(one)
    if not by_defect:
        return
    table = Table("defect", "images", "ids", "what was done", "first", title="Defects (all are named in dataset.json)")
    for defect, meaning in defects.MEANING.items():
        if several := by_defect.get(defect):
            ids = sum(len(one["ids"]) for one in several)
            names = ", ".join(dict.fromkeys(one["file_name"] for one in several[:2]))
            table.add_row(f"{defect}: {meaning}", str(len(several)), str(ids), several[0]["rule"], names)
    progress.console.print(table)
