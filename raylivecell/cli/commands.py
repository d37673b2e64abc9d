"""What each command takes, generated from the types of these functions: one a command, each of a few lines.

What a command needs is imported when it runs, so that `--help` does not wait for torch and Ray.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from raylivecell.cli.arguments import call, local
from raylivecell.core.errors import UserError


def synth(out: Path, images: int = 40, seed: int = 0, defects: bool = False) -> None:
    """Write a LIVECell-shaped dataset of synthetic phase-contrast images.

    Args:
        out: folder to write; it must not exist or be empty.
        images: how many, over train, val and test together.
        seed: image number i depends on (seed, i) alone.
        defects: plant every defect that `prepare` must find, listed in planted.json.
    """
    from raylivecell.core.console import console, track
    from raylivecell.runtime import session
    from raylivecell.synthetic import writer

    local(out)

    def on_ray(draw: Callable[[Any], Any], frames: Sequence[Any]) -> Iterable[Any]:
        session.connect()  # not before the request is known to be one that can be met
        return track(session.ordered_map(draw, frames), "drawing", len(frames))

    told = writer.write_dataset(out, images, seed, defects, mapper=on_ray)
    console.print(f"written: {out}, {sum(split['images'] for split in told['splits'].values())} images", markup=False)


def evaluate(
    data: str,
    out: str,
    checkpoint: str | None = None,
    predictions: str | None = None,
    split: Literal["train", "val", "test"] = "test",
    tta: bool = False,
    calibrate: bool = False,
) -> None:
    """Score a checkpoint, or any tool's cells, on whole images: metrics.json and report.html.

    Args:
        data: a prepared dataset.
        out: folder for metrics.json, report.html and overlays.
        checkpoint: a checkpoint's folder, or a run's (then its best).
        predictions: instead of a checkpoint, a COCO results file (JSON) of anybody's cells.
        split: which images.
        tta: average over the four flips.
        calibrate: first choose on validation images the thresholds that make cells, and keep them in the checkpoint.
    """
    from raylivecell.inference import evaluate as room

    if predictions is not None:
        if checkpoint is not None or tta or calibrate:
            raise UserError("--predictions is scored by itself: leave out --checkpoint, --tta and --calibrate")
        room.compare(predictions, data, split, out)
    elif checkpoint is None:
        raise UserError("nothing to score: give --checkpoint, or --predictions with a COCO results file")
    else:
        room.evaluate(checkpoint, data, split, out, tta=tta, calibrated=calibrate)


def predict(
    checkpoint: str,
    images: str,
    out: str,
    write: tuple[Literal["labels", "masks", "overlays", "coco", "cells"], ...] = (
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
) -> None:
    """Find the cells in a folder of images; killed and started again, it goes on. Writes images.csv, a row an image.

    Args:
        checkpoint: a run (its best checkpoint is used), a checkpoint folder, or an .onnx file (runs without torch).
        images: a folder (nested too) or a file; TIFF or PNG, 8 or 16 bits, as stored.
        out: folder to write.
        write: labels/ (TIFF), masks/ and overlays/ (PNG), coco.json (results), cells.csv (a row a cell).
        tta: average over the four flips.
        threshold: probability over which a pixel is foreground; default: the model's.
        overwrite: delete what an earlier predict wrote into --out.
        follow_links: follow links that lead out of the folder to any file, not to git-annex's and DVC's stores alone.
    """
    from raylivecell.inference import predict as room

    room.predict(checkpoint, images, out, write, tta, threshold, overwrite, follow_links)


def export(checkpoint: str, out: str) -> None:
    """Export a network to one file for other programs, opened again and compared; `predict` runs the .onnx file.

    Args:
        checkpoint: a checkpoint's folder, or a run's (then its best).
        out: FILE.onnx, or FILE.pt2 for torch.export.
    """
    from raylivecell.inference import export as room

    room.export(checkpoint, out)


def download(arguments: Sequence[str]) -> None:
    """Fetch LIVECell, resumable and checked."""
    from raylivecell.download import livecell as room

    def command(
        out: Path,
        files: tuple[room.Group, ...] = ("images", "train", "val", "test"),
        base_url: str = room.BASE_URL,
        sha256: tuple[str, ...] = (),
        size: tuple[str, ...] = (),
    ) -> None:
        """Fetch LIVECell (3.4 GB; CC BY-NC 4.0) into a folder that `prepare --source` takes; resumes where it stopped.

        Args:
            out: folder to write.
            files: what to fetch.
            base_url: where from.
            sha256: expected checksums, FILE=VALUE.
            size: expected sizes in bytes, FILE=VALUE.
        """
        room.download(local(out), files, base_url, sha256, size)

    call(command, "download", arguments)


def demo(out: Path = Path("demo"), recipe: str = "demo", images: int = 64, seed: int = 0) -> None:
    """Draw cells, prepare, train, score, predict: some minutes on a CPU.

    Args:
        out: folder to write; a former demo's is emptied.
        recipe: name of a shipped recipe, or a YAML file.
        images: how many to draw.
        seed: of the images.
    """
    from raylivecell.cli import demo as room

    room.demo(local(out), recipe, images, seed)


def recipes(name: tyro.conf.Positional[str | None] = None) -> None:
    """List the shipped recipes, with what each is for, costs and reaches; with a name, print that recipe's file.

    Args:
        name: of the recipe to print, such as `raylivecell recipes small > mine.yaml`.
    """
    import shutil
    import textwrap

    from raylivecell import recipe

    if name:
        print(Path(recipe.find(name)).read_text(), end="")
        return
    known = recipe.shipped()
    indent = max(map(len, known)) + 2
    width = min(shutil.get_terminal_size().columns, 120)
    for title, path in known.items():
        text = recipe.describe(path)
        print(textwrap.fill(text, width, initial_indent=title.ljust(indent), subsequent_indent=" " * indent))


def bench(
    what: tyro.conf.Positional[
        Literal["augment", "feed", "step", "train", "prepare", "predict", "evaluate", "startup", "scale"]
    ],
    out: Path | None = None,
    repeats: int = 5,
    images: int = 200,
) -> None:
    """Measure one part beside its rivals, in one run; writes bench.json and bench.png.

    Args:
        what: `augment`: milliseconds an image. `feed`: images/s into the loop. `step`: images/s of a training step by
            setting and batch size, and of what the processor can. `train`: images/s of loader, step, both. `prepare`:
            images/s and peak memory. `predict`: milliseconds a stage. `evaluate`: milliseconds an image. `startup`:
            seconds to the first step. `scale`: images/s over 1, 2 and 3 simulated nodes.
        out: folder of the results; default: runs/bench/WHAT.
        repeats: runs of each rival, in turn.
        images: size of the set of `feed`, `train`, `prepare`, `evaluate` and `scale`.
    """
    from raylivecell.bench import run as room

    room.bench(what, local(out or Path("runs/bench") / what), repeats, images)


def prepare(arguments: Sequence[str]) -> None:
    """Validate images and annotations, write Parquet shards."""
    from raylivecell.data.prepare import PrepareConfig
    from raylivecell.data.prepare import prepare as run
    from raylivecell.inference import segmenter

    def command(
        source: str,
        out: str,
        fields: Annotated[PrepareConfig, tyro.conf.arg(name="")] = PrepareConfig(),  # noqa: B008
        strict: bool = False,
    ) -> None:
        """Read LIVECell, or any set with COCO annotations; write OUT/{train,val,test}/*.parquet and OUT/dataset.json.

        Args:
            source: folder or URI of images and annotation files.
            out: URI of the dataset to write.
            fields: what to read and what to do with each kind of defect.
            strict: list the defects and stop, if there are any.
        """
        run(source, out, fields, strict, segmenter.intensity_rule)

    call(command, "prepare", arguments)


def submit(arguments: Sequence[str]) -> int:
    """Run a stage as a job of a Ray cluster."""
    import inspect

    from raylivecell.cli import submit as room

    def command(
        address: str | None = None,
        working_dir: Path = Path("."),
        name: str | None = None,
        env: tuple[str, ...] = (),
        cpus: float = 0,
        label: str = "",
        wait: bool = True,
        stop_on_interrupt: bool = False,
        max_upload_mib: float = room.MAX_UPLOAD_MIB,
    ) -> int:
        """submit [its flags] prepare|train|sweep|evaluate|predict [the stage's flags]: a stage as a job of a cluster.

        Uploads the project's code and recipes, prints what the job prints, ends with its exit code. Ctrl-C leaves it
        running.

        Args:
            address: the cluster's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS.
            working_dir: the project's folder, with jobs/ and the recipe.
            name: of the job; default: the stage, the name of --out and six random digits.
            env: NAME=VALUE for the job's processes; shown in the dashboard, so no secrets.
            cpus: CPUs that the job's own process reserves; 0 puts it on the head.
            label: NAME=VALUE of the nodes on which that process may run.
            wait: follow the log to the end.
            stop_on_interrupt: Ctrl-C stops the job.
            max_upload_mib: refuse to upload more.
        """
        wanted = room.request(stage or "", stage_flags, working_dir, name, env, cpus, label)
        return room.run(wanted, working_dir.absolute(), address, wait, stop_on_interrupt, max_upload_mib)

    options = inspect.signature(command).parameters.values()
    with_value = {f"--{one.name.replace('_', '-')}" for one in options if one.annotation is not bool}
    own, stage, stage_flags = room.split(arguments, with_value)
    if stage is None and not {"-h", "--help"} & set(own):
        raise UserError(f"no stage among {' '.join(own) or 'no words'}; give one of {', '.join(room.STAGES)}")
    return call(command, "submit", own)
