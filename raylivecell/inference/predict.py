"""Segment a folder or an S3 prefix of images of any size, by Ray Data batch inference.

1. The files are listed; those that an earlier run with the same output folder has segmented are skipped.
2. A pool of actors, each with the network loaded once, segments the images in blocks, on the cluster's GPUs if it has
   any, else on its CPUs. An actor writes an image's output images, then its result file.
3. The driver merges the result files into the tables, with the cells of one image in memory at a time.

The tables depend only on the model, the settings and the images, not on kills or the order in which images were
segmented. Output images are never deleted: those of images that no longer exist remain.

Each plane of a file with several (time, depth, pages) is an image, FILE#PLANE in the tables (`images.planes`).
Written into `out`, where NAME is an image's path without its suffix, plus `_PLANE` (`output_names`):

    labels/NAME.tif     label image: 1 to N for cells, 0 for background (`image_file.label_tiff`)
    masks/NAME.png      255 where the foreground probability is above the threshold, else 0
    overlays/NAME.png   the image with outlines of the cells
    rois/NAME.zip       outlines for ImageJ's ROI Manager (`imagej_rois.write`); not by default
    geojson/NAME.geojson    outlines and scores for QuPath (`geojson.write`); not by default
    cells.csv           one row per cell (`measure.Measurements`)
    coco.json           the cells as COCO results; image_id as in images.csv
    images.csv          one row per image: cells, confluence (fraction of its pixels, without padding, in cells,
                        0 to 1), warnings about unusual properties (`warning`), or its error
    growth.csv, growth_fits.csv, growth.html    if names contain well and time: growth curves (`growth`)
    predict.json, recipe.yaml    the settings; the recipe of the network

Stored pixel values are converted to the network's 8-bit scale by the intensity rule of its training dataset
(`intensity`). An image whose background is outside the range of the training images is scaled first (`gain` in
images.csv) and has a warning; a black, constant or saturated one has 0 cells and a warning. Colour images are
reduced to luma. An unreadable image is listed in images.csv and does not stop the run. An image is skipped while
its size and modification time are unchanged; the tables list only images that exist.

The image is scaled like the training images (`Scale.pixel_scale`), or by `diameter`; all outputs are in the pixels
of the image file. An image whose cells have a median diameter far from that of the training cells has a warning.
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
from raylivecell.core.console import console, show_warnings
from raylivecell.core.errors import UserError
from raylivecell.core.version import __version__
from raylivecell.data import listing
from raylivecell.growth.names import NamePattern
from raylivecell.images import formats, planes
from raylivecell.images.planes import EVERYTHING, Choice
from raylivecell.images.scale import CELL_SIZE_WARNING
from raylivecell.inference import actors, growth, image_file, results, segmenter, stacks
from raylivecell.inference.image_file import DEFAULT_OUTPUTS, OUTPUTS, PICTURES, Output, PredictJob
from raylivecell.runs import progress
from raylivecell.runtime import session

SETTINGS, RECIPE = "predict.json", "recipe.yaml"


def predict(
    model_uri: str,
    images_uri: str,
    out: str,
    write: Collection[Output] = DEFAULT_OUTPUTS,
    tta: bool = False,
    threshold: float | None = None,
    overwrite: bool = False,
    follow_links: bool = False,
    choice: Choice = EVERYTHING,
    name_pattern: str | None = None,
    frame_hours: float | None = None,
    diameter: float | None = None,
) -> dict[str, Any]:
    """Segment images of any size; if killed and called again, it resumes and writes the same files.

    The module's docstring lists the files written into `out`, and how images are converted.

    Args:
        model_uri: folder of a checkpoint, of a run (for its best), or an .onnx file, which needs no torch.
        images_uri: a folder, searched recursively, or one image file (`formats.SUFFIXES`).
        out: URI of a folder, in which output images have the same relative paths as the input images.
        write: outputs to write in addition to images.csv.
        tta: average eight versions of the image (`averaging.VERSIONS`).
        threshold: lower limit of the probability of foreground pixels; default: the model's.
        overwrite: delete the results of an earlier run in `out`.
        follow_links: also follow links to files outside the folder.
        choice: planes and channel of files with several; default: all planes.
        name_pattern: regular expression for wells and times in names (`growth.names`); default: those of LIVECell and
            Incucyte.
        frame_hours: hours between frames, if names have frame numbers or files are time stacks.
        diameter: typical diameter of the cells in these images, in their pixels: each image is scaled so that they are
            as large as the training cells.

    Returns:
        {"images", "segmented", "cells", "confluence" (mean over images), "failed": [{"file", "error"}], "seconds",
        "out"}.

    Raises:
        UserError: no model; no readable image; `out` contains results of other settings; a name pattern without well or
            time.
    """
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"--threshold {threshold}: give a probability between 0 and 1, such as 0.5")
    began = time.monotonic()
    names = NamePattern(name_pattern, frame_hours)
    out, images_uri, model = storage.absolute(out), storage.absolute(images_uri), storage.absolute(model_uri)
    if not model.endswith(segmenter.ONNX):
        model = progress.find(model)
    root, files = _list_images(images_uri, out, follow_links)
    reasons: dict[str, str] = {}
    files = stacks.expand(root, files, choice, reasons)
    growth.check_names(names, list(files), reasons)
    write = tuple(name for name in OUTPUTS if name in write)
    job = PredictJob(model, root, out, write, tta, threshold, choice, diameter)
    network = image_file.load(job, "cpu")
    network.factor(diameter)  # a UserError before anything is written
    _initialise(out, _settings(job, network, images_uri), overwrite)  # fails early if `out` is not writable
    if not storage.exists(storage.join(out, RECIPE)):
        storage.write_bytes(storage.join(out, RECIPE), network.recipe.encode())
    _segment(job, files)
    summary = _summary(out, images_uri)
    growth.write(out, names)
    return {**summary, "seconds": time.monotonic() - began, "out": out}


def _settings(job: PredictJob, network: segmenter.Segmenter, images_uri: str) -> dict[str, Any]:
    """The content of predict.json: everything that the results depend on, apart from the images themselves."""
    weights = storage.join(job.model, progress.MODEL) if job.with_torch else job.model
    return {
        "model": {"uri": job.model, "sha256": hashlib.sha256(storage.read_bytes(weights)).hexdigest()},
        "images": images_uri,
        "write": list(job.write),
        "thresholds": network.config.model_dump(),
        "tta": job.tta,
        **job.choice._asdict(),
        "intensity": network.intensity.model_dump(mode="json"),
        "pixel_scale": network.factor(job.diameter),
        "raylivecell": __version__,
    }


def _list_images(uri: str, out: str, follow_links: bool = False) -> tuple[str, dict[str, pafs.FileInfo]]:
    """The folder of the images, and the images by relative path, sorted; without files in `out`, which are outputs."""
    filesystem, path = storage.open_uri(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.File:
        return addresses.parent(uri), {addresses.name(uri): info}
    results_folder = addresses.relative(out, uri)
    if results_folder == "":
        raise UserError(f"--out {out} is the folder of the images; choose another --out")
    files = {
        file: info
        for file, info in sorted(listing.list_infos(uri, follow_links).items())
        if formats.is_image_name(file) and (results_folder is None or not file.startswith(results_folder + "/"))
    }
    if not files:
        raise UserError(
            f"no images at {uri}; give a folder of TIFF, PNG, JPEG, BMP, CZI, LIF or ND2 files, or one such file"
        )
    return uri, files


def _initialise(out: str, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Write the settings into `out`; UserError if it contains results of others. Models are compared by checksum."""
    uri = storage.join(out, SETTINGS)
    written = (results.IMAGES, results.FOLDER, *PICTURES, results.CELLS, results.COCO, RECIPE, *growth.FILES)
    if not storage.exists(uri):
        existing = sorted(set(written) & set(storage.list_names(out)))
        if existing:
            raise UserError(f"{out} contains {', '.join(existing)} but no `predict` {SETTINGS}; choose another --out")
    elif overwrite:
        for name in (*written, SETTINGS):  # images.csv, which marks the run as complete, first; the settings last
            storage.delete(storage.join(out, name))
    else:
        with storage.validating(uri, "choose another --out, or --overwrite it"):
            old, new = ({**values, "model": values["model"]["sha256"]} for values in (storage.read_json(uri), settings))
        if changed := [name for name in new if old.get(name) != new[name]]:
            raise UserError(
                f"{out} contains results of other settings ({', '.join(changed)}); choose another --out, or "
                "--overwrite them"
            )
        return
    storage.write_json(uri, settings)


def _segment(job: PredictJob, files: Mapping[str, pafs.FileInfo]) -> None:
    """Segment the files that have no result, and write the tables."""
    names = dict(zip(files, output_names(list(files))))
    versions = {file: results.version(file, names[file], info.size, info.mtime_ns) for file, info in files.items()}
    if not results.is_complete(job.out, versions):
        growth.delete(job.out)  # of an earlier run: a killed run must not leave curves that lack its images
        pending = results.pending(job.out, versions)
        if len(pending) < len(files):
            console.print(f"{len(files) - len(pending)} of {len(files)} images were segmented before", markup=False)
        if pending:
            session.connect()
            arguments = {
                "job": job,
                "names": {file: names[file] for file in pending},
                "versions": {file: versions[file] for file in pending},
            }
            actors.run(_Predictor, arguments, pending, "predict", use_gpus=job.with_torch)
        results.merge(job.out, versions, job.write)
    results.clear(job.out)


def output_names(files: Sequence[str]) -> list[str]:
    """Output path of each image: its path without the suffix, or with it for all if any outputs would collide.

    The name of a plane is appended: `well_A1_t03` for `well_A1.tif#t03`.

    Outputs collide if two have the same name (a.tif and a.png, or A.tif and a.tif on a disk that ignores case or
    Unicode normalisation), or if one has the name of another's folder (a.png and a.tif/b.png).
    """
    split_names = [planes.split_address(file) for file in files]
    short = [f"{posixpath.splitext(file)[0]}{f'_{plane}' if plane else ''}" for file, plane in split_names]
    normalised = [unicodedata.normalize("NFC", name).casefold() for name in short]
    folders = {folder for name in normalised for folder in accumulate(name.split("/")[:-1], posixpath.join)}
    suffixes = {suffix for suffix, _ in PICTURES.values()}
    ambiguous = len(set(normalised)) < len(normalised) or any(
        name + suffix in folders for name in normalised for suffix in suffixes
    )
    return [f"{file}_{plane}" if plane else file for file, plane in split_names] if ambiguous else short


class _Predictor:
    """Actor with a network: segments images by their paths and writes the results."""

    def __init__(self, job: PredictJob, names: Mapping[str, str], versions: Mapping[str, str]) -> None:
        actors.use_threads(job.with_torch)
        self.job, self.names, self.versions, self.network = job, names, versions, image_file.load(job)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        for file in batch["item"].tolist():
            version = self.versions[file]
            result = image_file.segment_file(self.job, self.network, file, self.names[file], version)
            results.write(self.job.out, version, result)
        return {"item": batch["item"].tolist()}


def _summary(out: str, images_uri: str) -> dict[str, Any]:
    """Compute and print totals of images.csv; UserError if no image could be read."""
    confluences, failed, cells = [], [], 0
    warnings: dict[str, list[str]] = {}
    for row in results.rows(out):
        if row.warning:
            warnings[row.file] = row.warning.split("; ")
        if row.cells is None or row.confluence is None:
            failed.append({"file": row.file, "error": row.error})
            console.print(f"not segmented: {row.file}: {row.error}", markup=False, soft_wrap=True)
            continue
        confluences.append(row.confluence)
        cells += row.cells
    images, segmented, table = len(confluences) + len(failed), len(confluences), f"{out}/{results.IMAGES}"
    if not segmented:
        raise UserError(f"none of the {images} images at {images_uri} can be read: {failed[0]['error']}; see {table}")
    show_warnings(warnings, table)
    if far := sum(any(text.startswith(CELL_SIZE_WARNING) for text in texts) for texts in warnings.values()):
        console.print(
            f"cells of another size than the training cells: {far} of {segmented} images. If the magnification "
            "differs, give the typical diameter of their cells in pixels (--diameter PX); otherwise the network does "
            "not fit these images: look at overlays/, and fine-tune it (train --start-from)",
            soft_wrap=True,
            markup=False,
        )
    console.print(f"{segmented} of {images} images segmented, {cells:,} cells: {table}", soft_wrap=True, markup=False)
    confluence = float(np.mean(confluences))
    return {"images": images, "segmented": segmented, "cells": cells, "confluence": confluence, "failed": failed}
