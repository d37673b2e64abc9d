"""One function per command; its parameters, types and docstring define the flags and the help text.

Imports are inside the functions, so that `--help` does not wait for torch and Ray.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from raylivecell.cli.arguments import call, local, workers_in
from raylivecell.core.errors import UserError


def synth(out: Path, images: int = 40, seed: int = 0, defects: bool = False) -> None:
    """Write a LIVECell-shaped dataset of synthetic phase-contrast images.

    Args:
        out: folder to write; it must be empty or not exist.
        images: total number of images in train, val and test.
        seed: image i depends only on (seed, i).
        defects: include every kind of defect that `prepare` detects, listed in planted.json.
    """
    from raylivecell.core.console import console, track
    from raylivecell.runtime import session
    from raylivecell.synthetic import writer

    local(out)

    def on_ray(draw: Callable[[Any], Any], frames: Sequence[Any]) -> Iterable[Any]:
        session.connect()  # after the arguments have been checked
        return track(session.ordered_map(draw, frames), "drawing", len(frames))

    description = writer.write_dataset(out, images, seed, defects, mapper=on_ray)
    console.print(
        f"written: {out}, {sum(split['images'] for split in description['splits'].values())} images", markup=False
    )


def evaluate(
    data: str,
    out: str,
    checkpoint: str | None = None,
    predictions: str | None = None,
    labels: str | None = None,
    split: Literal["train", "val", "test"] = "test",
    tta: bool = False,
    calibrate: bool = False,
) -> None:
    """Score a checkpoint, or the results of another tool, on complete images; write metrics.json and report.html.

    Args:
        data: a prepared dataset.
        out: folder for metrics.json, report.html and overlays.
        checkpoint: a run (its best checkpoint is used) or a checkpoint folder.
        predictions: a COCO results file (JSON) to score instead of a checkpoint.
        labels: a folder of label images to score instead of a checkpoint: TIFF, PNG or NPY, named like the images, also
            with a suffix such as _cp_masks, _masks or _labels.
        split: images to score.
        tta: test-time augmentation: average the predictions for eight versions of the image, turned, mirrored and
            scaled; the network takes eight times as long.
        calibrate: first tune the thresholds of the watershed on validation images, and store them in the checkpoint.
    """
    from raylivecell.inference import evaluate as evaluation

    if predictions is not None or labels is not None:
        flag = "--labels" if predictions is None else "--predictions"
        if predictions is not None and labels is not None:
            raise UserError("--predictions and --labels are two results to score: give one of them")
        if checkpoint is not None or tta or calibrate:
            raise UserError(f"{flag} needs no network: leave out --checkpoint, --tta and --calibrate")
    if predictions is not None:
        evaluation.compare(predictions, data, split, out)
    elif labels is not None:
        evaluation.compare_labels(labels, data, split, out)
    elif checkpoint is None:
        raise UserError("nothing to score: give --checkpoint, --predictions with a COCO results file, or --labels")
    else:
        evaluation.evaluate(checkpoint, data, split, out, tta=tta, calibrated=calibrate)


def predict(
    checkpoint: str,
    images: str,
    out: str,
    write: tuple[Literal["labels", "masks", "overlays", "coco", "cells", "rois", "geojson"], ...] = (
        "labels",
        "masks",
        "overlays",
        "coco",
        "cells",
    ),
    tta: bool = False,
    threshold: float | None = None,
    overwrite: bool = False,
    follow_links: bool = False,
    plane: str | None = None,
    channel: int | None = None,
    name_pattern: str | None = None,
    frame_hours: float | None = None,
    diameter: float | None = None,
) -> None:
    """Segment the cells in a folder of images; resumable. Write images.csv, one row per image.

    Args:
        checkpoint: a run (its best checkpoint is used), a checkpoint folder, or an .onnx file (runs without torch).
        images: a folder (with subfolders), a file or a URI; TIFF (also stacks), PNG, JPEG or BMP as stored, and
            CZI, LIF or ND2 with the extra `formats`.
        out: folder to write.
        write: labels/ (TIFF), masks/ and overlays/ (PNG), coco.json (results), cells.csv (one row per cell), rois/
            (ImageJ's RoiSet.zip), geojson/ (QuPath).
        tta: test-time augmentation: average the predictions for eight versions of the image, turned, mirrored and
            scaled; the network takes eight times as long.
        threshold: foreground probability above which a pixel belongs to a cell; default: that of the checkpoint.
        overwrite: delete the results of an earlier predict in --out.
        follow_links: follow links to any file outside the folder, not only to git-annex, DVC and Hugging Face stores.
        plane: plane of files with several: its number from 0 (3), or indices of axes (z2, t3_z2); default: all planes.
        channel: channel of files with several, from 0.
        name_pattern: for growth curves: a regular expression, searched in each path without suffix, with the named
            groups `well` and a time: `hours`, or `d`, `h`, `m`, or `year`, `month`, `day`, `h`, `m`, or `frame`; and,
            optionally, `site`, `crop`, `condition`, `plate`. Default: names of LIVECell and Incucyte.
        frame_hours: hours between frames, for names with the group `frame` and for time stacks.
        diameter: typical diameter of the cells in these images, in their pixels, if it differs from that of the
            training images; results are in the pixels of the images.
    """
    from raylivecell.images.planes import Choice
    from raylivecell.inference import predict as prediction

    prediction.predict(
        checkpoint,
        images,
        out,
        write,
        tta,
        threshold,
        overwrite,
        follow_links,
        choice=Choice(plane, channel),
        name_pattern=name_pattern,
        frame_hours=frame_hours,
        diameter=diameter,
    )


def serve(
    checkpoint: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: str | None = None,
    max_request_mib: float = 512,
) -> None:
    """Serve a network as a page, http://HOST:PORT, and a REST interface, until interrupted.

    Args:
        checkpoint: a run (its best checkpoint is used), a checkpoint folder, or an .onnx file; a path or URI.
        host: address to listen on. Any other than 127.0.0.1 needs a token in RAYLIVECELL_SERVE_TOKEN, which each
            request must have.
        port: port to listen on.
        replicas: processes with the network, N or MIN:MAX by load; each needs a GPU, or a CPU if there is none. As many
            processes find the cells. Default: 1 to half of the CPUs, or to the number of GPUs.
        max_request_mib: larger requests are refused.
    """
    from raylivecell.serving import service

    numbers = workers_in(replicas, "--replicas") if replicas is not None else None
    service.run(checkpoint, host, port, numbers, max_request_mib)


def export(
    checkpoint: str,
    out: str,
    author: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    scores: str | None = None,
) -> None:
    """Export a network to one file for other programs; the file is loaded again and its output compared.

    Args:
        checkpoint: a run (its best checkpoint is used) or a checkpoint folder.
        out: FILE.onnx, which `predict --checkpoint` can run; FILE.pt2 for torch.export; or FILE.zip, a bioimage.io
            package.
        author: bioimage.io package: name of an author; may be repeated.
        scores: bioimage.io package: folder written by `evaluate`; default: one in the run's folder, if any.
    """
    from raylivecell.inference import export as exporter

    exporter.export(checkpoint, out, author, scores)


def download(arguments: Sequence[str]) -> None:
    """Download LIVECell, resumable and verified."""
    from raylivecell.download import livecell

    def command(
        out: Path,
        files: tuple[livecell.Group, ...] = ("images", "train", "val", "test"),
        base_url: str = livecell.BASE_URL,
        sha256: tuple[str, ...] = (),
        size: tuple[str, ...] = (),
    ) -> None:
        """Download LIVECell (3.4 GB; CC BY-NC 4.0) into a folder for `prepare --source`; resumable.

        Args:
            out: folder to write.
            files: parts to download.
            base_url: URL of the folder to download from.
            sha256: expected checksums, FILE=VALUE.
            size: expected sizes in bytes, FILE=VALUE.
        """
        livecell.download(local(out), files, base_url, sha256, size)

    call(command, "download", arguments)


def demo(out: Path = Path("demo"), recipe: str = "demo", images: int = 64, seed: int = 0) -> None:
    """Draw cells, prepare, train, evaluate and predict, in minutes on a CPU.

    Args:
        out: folder to write; the files of an earlier demo are deleted.
        recipe: name of a shipped recipe, or a YAML file.
        images: number of images to draw.
        seed: seed of the images.
    """
    from raylivecell.cli import demo as demonstration

    demonstration.demo(local(out), recipe, images, seed)


def recipes(name: tyro.conf.Positional[str | None] = None) -> None:
    """List the shipped recipes with purpose, cost and scores; with a name, print that recipe's file.

    Args:
        name: recipe to print, for example `raylivecell recipes small > mine.yaml`.
    """
    import shutil
    import textwrap

    from raylivecell import recipe

    if name:
        print(Path(recipe.find(name)).read_text(), end="")
        return
    recipes = recipe.shipped()
    indent = max(map(len, recipes)) + 2
    width = min(shutil.get_terminal_size().columns, 120)
    for title, path in recipes.items():
        text = recipe.describe(path)
        print(textwrap.fill(text, width, initial_indent=title.ljust(indent), subsequent_indent=" " * indent))


def bench(
    name: tyro.conf.Positional[
        Literal["augment", "feed", "step", "train", "prepare", "predict", "evaluate", "startup", "scale", "serve"]
    ],
    out: Path | None = None,
    repeats: int = 5,
    images: int = 200,
) -> None:
    """Measure one part against its baselines, in one run; write bench.json and bench.png.

    Args:
        name: `augment`: milliseconds per image. `feed`: images/s into the training loop. `step`: images/s of a training
            step by setting and batch size, and as a fraction of the processor's peak. `train`: images/s of the loader,
            the step and both. `prepare`: images/s and peak memory. `predict`: milliseconds per stage. `evaluate`:
            milliseconds per image. `startup`: seconds to the first step. `scale`: images/s on 1, 2 and 3 simulated
            nodes. `serve`: images/s and seconds per request next to `predict`, start and memory.
        out: folder for the results; default: runs/bench/NAME.
        repeats: runs of each baseline, interleaved.
        images: size of the dataset of `feed`, `train`, `prepare`, `evaluate`, `scale` and `serve`.
    """
    from raylivecell.bench import run as benchmark

    benchmark.bench(name, local(out or Path("runs/bench") / name), repeats, images)


def prepare(arguments: Sequence[str]) -> None:
    """Validate images and annotations, and write Parquet shards."""
    from raylivecell.cli.arguments import PREPARE_FLAGS, join_repeated
    from raylivecell.data.prepare import PrepareConfig
    from raylivecell.data.prepare import prepare as run
    from raylivecell.inference import segmenter

    def command(
        source: str,
        out: str,
        fields: Annotated[PrepareConfig, tyro.conf.arg(name="")] = PrepareConfig(),  # noqa: B008
        strict: bool = False,
    ) -> None:
        """Read images and annotations, LIVECell or your own; write OUT/SPLIT/*.parquet and OUT/dataset.json.

        Args:
            source: folder or URI with images and annotation files.
            out: URI of the dataset to write.
            fields: settings of the source, and the rule for each kind of defect.
            strict: if there are defects, list them and stop.
        """
        run(source, out, fields, strict, segmenter.intensity_rule, segmenter.scale_of)

    call(command, "prepare", join_repeated("--on-defect", arguments), PREPARE_FLAGS)


def submit(arguments: Sequence[str]) -> int:
    """Run a stage as a job on a Ray cluster."""
    import inspect

    from raylivecell.cli import submit as jobs

    def command(
        address: str | None = None,
        working_dir: Path = Path("."),
        name: str | None = None,
        env: tuple[str, ...] = (),
        cpus: float = 0,
        label: str = "",
        wait: bool = True,
        stop_on_interrupt: bool = False,
        max_upload_mib: float = jobs.MAX_UPLOAD_MIB,
    ) -> int:
        """Run a stage as a job: submit [flags] prepare|train|sweep|evaluate|predict [flags of the stage].

        Uploads the project's code and recipes, prints the job's output and exits with its code. Ctrl-C leaves the job
        running.

        Args:
            address: the cluster's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.
            working_dir: the project's folder, which contains jobs/ and the recipe.
            name: name of the job; default: the stage, the name of --out and six random hexadecimal digits.
            env: environment variables of the job, NAME=VALUE; the dashboard shows them, so give no secrets.
            cpus: CPUs reserved for the job's driver; with 0 it runs on the head.
            label: NAME=VALUE of the nodes on which the driver may run.
            wait: follow the log until the job ends.
            stop_on_interrupt: Ctrl-C stops the job.
            max_upload_mib: maximum upload in MiB; a larger upload is rejected.
        """
        job = jobs.request(stage or "", stage_flags, working_dir, name, env, cpus, label)
        return jobs.run(job, working_dir.absolute(), address, wait, stop_on_interrupt, max_upload_mib)

    options = inspect.signature(command).parameters.values()
    with_value = {f"--{option.name.replace('_', '-')}" for option in options if option.annotation is not bool}
    submit_flags, stage, stage_flags = jobs.split(arguments, with_value)
    if stage is None and not {"-h", "--help"} & set(submit_flags):
        command_line = " ".join(submit_flags) or "an empty command"
        raise UserError(f"no stage in {command_line}; give one of {', '.join(jobs.STAGES)}")
    return call(command, "submit", submit_flags)
