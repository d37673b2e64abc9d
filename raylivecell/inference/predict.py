"""Images in, cells out, by Ray Data batch inference: a folder or an S3 prefix of any size.

1. The files are listed; those that an earlier run in the same place has segmented already are left out.
2. A pool of actors, each with the network loaded once, takes block after block: on GPUs where there are some, else
   on the cluster's CPUs. An actor writes an image's pictures and then its part of the tables.
3. The driver merges the parts into the tables: it holds one image's cells at a time.

The tables depend on the model, the settings and the images alone: not on how often the run was killed, nor on when
each image came. No picture is deleted: those of images that have gone stay.
"""

import hashlib
import posixpath
import time
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import fs as pafs

from raylivecell.core import addresses, storage
from raylivecell.core import console as progress
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.core.version import __version__
from raylivecell.data import sources
from raylivecell.images import formats
from raylivecell.inference import actors, image_file, results, segmenter
from raylivecell.inference.image_file import OUTPUTS, PICTURES, Job, Output
from raylivecell.runs import progress as run_state
from raylivecell.runtime import session

SETTINGS, RECIPE = "predict.json", "recipe.yaml"


def predict(
    model_uri: str,
    images_uri: str,
    out: str,
    write: Collection[Output] = OUTPUTS,
    tta: bool = False,
    threshold: float | None = None,
    overwrite: bool = False,
    follow_links: bool = False,
) -> dict[str, Any]:
    """Segment images of any size; killed at any moment and called again, it goes on and ends with the same files.

    Written into `out`, where NAME is an image's path without its suffix (`output_names`):

        labels/NAME.tif     each cell's number, 0 background (`image_file.label_tiff`)
        masks/NAME.png      255 where the foreground's probability is over the threshold, else 0
        overlays/NAME.png   the image with each cell's outline
        cells.csv           a row a cell (`measure.Measurements`)
        coco.json           the cells as COCO results; image_id as in images.csv
        images.csv          a row an image: cells, confluence (share of its own pixels, without padding, in cells,
                            0 to 1), what is unusual about it (`warning`), or its error
        predict.json, recipe.yaml    the settings; the recipe of the network

    Stored grey values become the network's 8-bit scale by the rule of the set that it was trained on (`intensity`). An
    image whose background is outside the training images' range is multiplied first (`gain` in images.csv) and has a
    warning; a black, constant or saturated one has 0 cells and a warning. Of colour images the luma is used.
    An image that cannot be read is named in images.csv and does not stop the rest. An image
    counts as done while its size and its time of change stay the same; the tables are of the images that are there.

    Args:
        model_uri: a checkpoint's folder, a run's (then its best), or an .onnx file, which needs no torch.
        images_uri: a folder, searched through and through, or one image file: TIFF, PNG, JPEG or BMP.
        out: URI of a folder. Pictures lie in it as the images do in theirs.
        write: what to write beside images.csv.
        tta: average over the image and its three flips.
        threshold: a pixel is foreground where its probability is over it; default: the model's.
        overwrite: delete what an earlier run wrote into `out`.
        follow_links: follow links that lead out of the folder to any file.

    Returns:
        {"images", "segmented", "cells", "confluence" (mean over images), "failed": [{"file", "error"}], "seconds",
        "out"}.

    Raises:
        UserError: no model, no image there, none that can be read, or `out` is of other settings.
    """
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"--threshold {threshold}: give a probability between 0 and 1, such as 0.5")
    began = time.monotonic()
    out, images_uri = storage.absolute(out), storage.absolute(images_uri)
    model, weights = _model(storage.absolute(model_uri))
    root, files = _image_files(images_uri, out, follow_links)
    job = Job(model, root, out, tuple(name for name in OUTPUTS if name in write), tta, threshold)
    network = image_file.load(job, "cpu")
    _claim(out, _settings(job, images_uri, weights, network), overwrite)  # before the work: may we?
    if not storage.exists(storage.join(out, RECIPE)):
        storage.write_bytes(storage.join(out, RECIPE), network.recipe.encode())
    _segment(job, files)
    return {**_summary(out, images_uri), "seconds": time.monotonic() - began, "out": out}


def output_names(files: Sequence[str]) -> list[str]:
    """What each of `files` is called in the outputs: its path without the suffix.

    Where two files would then share a name (a.tif and a.png, or A.tif and a.tif on a disk that ignores case or how an
    umlaut is encoded), or one the name of another's folder (a.png and a.tif/b.png), all keep their suffix, so that the
    names of one run follow one rule.
    """
    short = [posixpath.splitext(file)[0] for file in files]
    written = [unicodedata.normalize("NFC", name).casefold() for name in short]
    folders = {part for name in written for part in accumulate(name.split("/")[:-1], posixpath.join)}
    ends = {end for end, _ in PICTURES.values()}
    shared = len(set(written)) < len(written) or any(name + end in folders for name in written for end in ends)
    return list(files) if shared else short


class _Predictor:
    """Paths of images -> the same: what is found is written. An actor with a network."""

    def __init__(self, job: Job, names: Mapping[str, str], versions: Mapping[str, str]) -> None:
        actors.use_threads(job.with_torch)
        self.job, self.names, self.versions, self.network = job, names, versions, image_file.load(job)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        for file in batch["item"].tolist():
            found = image_file.part(self.job, self.network, file, self.names[file], self.versions[file])
            results.write(self.job.out, self.versions[file], found)
        return {"item": batch["item"].tolist()}


def _segment(job: Job, files: Mapping[str, pafs.FileInfo]) -> None:
    """Everything that is not there yet, and the tables."""
    names = dict(zip(files, output_names(list(files))))
    versions = {file: results.version(file, names[file], info.size, info.mtime_ns) for file, info in files.items()}
    if not results.is_complete(job.out, versions):
        waiting = results.begin(job.out, versions)
        if len(waiting) < len(files):
            console.print(f"{len(files) - len(waiting)} of {len(files)} images are segmented already", markup=False)
        if waiting:
            session.connect()
            arguments = {
                "job": job,
                "names": {file: names[file] for file in waiting},
                "versions": {file: versions[file] for file in waiting},
            }
            actors.run(_Predictor, arguments, waiting, "predict", use_gpus=job.with_torch)
        results.merge(job.out, versions, job.write)
    results.clear(job.out)


def _summary(out: str, images_uri: str) -> dict[str, Any]:
    """What images.csv says in all, printed too; UserError where no image could be read."""
    shares, failed, cells = [], [], 0
    warnings: dict[str, list[str]] = {}
    for row in results.rows(out):
        if row.get("warning"):
            warnings[row["file"]] = row["warning"].split("; ")
        if row["error"]:
            failed.append({"file": row["file"], "error": row["error"]})
            console.print(f"not segmented: {row['file']}: {row['error']}", markup=False, soft_wrap=True)
            continue
        with storage.validating(storage.join(out, results.IMAGES), "start anew with --overwrite"):
            shares.append(float(row["confluence"]))
            cells += int(row["cells"])
    count = len(shares) + len(failed)
    if not shares:
        raise UserError(
            f"none of the {count} images at {images_uri} can be read: {failed[0]['error']}; see {out}/{results.IMAGES}"
        )
    progress.show_warnings(warnings, f"{out}/{results.IMAGES}")
    told = f"{len(shares)} of {count} images segmented, {cells:,} cells: {out}/{results.IMAGES}"
    console.print(told, soft_wrap=True, markup=False)
    found = {"images": count, "segmented": len(shares), "cells": cells, "confluence": float(np.mean(shares))}
    return {**found, "failed": failed}


def _claim(out: str, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Make `out` a place of these settings; UserError where it is of others."""
    where = storage.join(out, SETTINGS)
    written = (results.IMAGES, results.FOLDER, *PICTURES, results.CELLS, results.COCO, RECIPE)
    if not storage.exists(where):
        foreign = sorted(set(written) & set(storage.list_names(out)))
        if foreign:
            raise UserError(f"{out} holds {', '.join(foreign)}, and no {SETTINGS} of `predict`; choose another --out")
    elif overwrite:
        for name in (*written, SETTINGS):  # images.csv first: what is left says nothing is done; the claim last
            storage.delete(storage.join(out, name))
    else:
        with storage.validating(where, "choose another --out, or --overwrite it"):
            before, now = ({**one, "model": one["model"]["sha256"]} for one in (storage.read_json(where), settings))
        if other := [name for name in now if before.get(name) != now[name]]:
            raise UserError(
                f"{out} holds results of other settings ({', '.join(other)}); choose another --out, or --overwrite them"
            )
        return
    storage.write_json(where, settings)


def _settings(job: Job, images_uri: str, weights: str, network: segmenter.Segmenter) -> dict[str, Any]:
    """What the results depend on: what predict.json holds. A model is known by its checksum."""
    return {
        "model": {"uri": job.model, "sha256": hashlib.sha256(storage.read_bytes(weights)).hexdigest()},
        "images": images_uri,
        "write": list(job.write),
        "thresholds": network.config.model_dump(),
        "tta": job.tta,
        "intensity": network.intensity.model_dump(mode="json"),
        "raylivecell": __version__,
    }


def _model(uri: str) -> tuple[str, str]:
    """Where the model is that `uri` means, and the file of its weights."""
    if uri.endswith(segmenter.ONNX):
        return uri, uri
    folder = run_state.find(uri)
    return folder, storage.join(folder, run_state.MODEL)


def _image_files(uri: str, out: str, follow_links: bool = False) -> tuple[str, dict[str, pafs.FileInfo]]:
    """The folder of the images, and by its path in it each one, sorted; what lies in `out` is a result, no input."""
    filesystem, path = storage.open_uri(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.File:
        return addresses.parent(uri), {addresses.name(uri): info}
    inside = addresses.relative(out, uri)
    if inside == "":
        raise UserError(f"--out {out} is the folder of the images; choose another --out")
    found = {
        file: info
        for file, info in sorted(sources.list_infos(uri, follow_links).items())
        if formats.is_image_name(file)
    }
    files = {file: info for file, info in found.items() if inside is None or not file.startswith(inside + "/")}
    if not files:
        raise UserError(f"no images at {uri}; give a folder of TIFF, PNG, JPEG or BMP files, or one such file")
    return uri, files
