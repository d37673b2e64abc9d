"""`train`, `sweep` and `check`: their own flags, and one flag for every field of the recipe.

The recipe file is read before the flags are parsed; its values are the defaults of the flags.
"""

import os
from collections.abc import Sequence
from typing import Annotated

import tyro

from raylivecell.cli.arguments import Resume, base_recipe, call, join_repeated, recipe_file, resumes, workers_in


def train(arguments: Sequence[str]) -> None:
    """Train a recipe on a prepared dataset with Ray Train."""
    import psutil

    from raylivecell import recipe as recipes
    from raylivecell.training.train import train as run

    base = base_recipe(arguments)

    def command(
        data: tuple[str, ...],
        out: str,
        fields: Annotated[recipes.Recipe, tyro.conf.arg(name="")] = base,
        recipe: str | None = None,
        workers: str = "1",
        resume: Resume = "never",
        retries: int = 3,
        start_from: str | None = None,
        data_weights: tuple[float, ...] = (),
        teacher: str | None = None,
    ) -> None:
        """Train a recipe on a prepared dataset with Ray Train.

        Args:
            data: URI of a prepared dataset. Several (--data A --data B) are trained on together, with the intensity
                rule of the first.
            out: URI of the run's folder: checkpoints, metrics.jsonl, tensorboard/, report.html.
            fields: the recipe's fields; a flag overrides the recipe file.
            recipe: name of a shipped recipe (`raylivecell recipes`), or a YAML file.
            workers: training processes, N or MIN:MAX (elastic).
            resume: `always` continues the run in --out from its last checkpoint; `auto` does so if there is one and
                otherwise starts a run, for jobs that the cluster may restart; `never` refuses a folder in use.
            retries: restarts from the last checkpoint after a worker has died.
            start_from: fine-tune: start with the weights of this run (its best checkpoint) or checkpoint folder, where
                their shapes fit. The default recipe is then `finetune`, with the parent's network and targets. A
                resumed run does not read it again.
            data_weights: one weight for each --data, in this order: its share of the samples of an epoch. Default:
                every image of all sets once.
            teacher: distillation: also learn the maps of the network of this run (its best checkpoint) or checkpoint
                folder, on images with and without annotations. The default recipe is then `distill`.
        """
        run(
            data,
            out,
            fields,
            workers_in(workers),
            resumes(resume, out),
            retries,
            began=psutil.Process().create_time(),
            start_from=start_from,
            data_weights=data_weights,
            teacher=teacher,
        )

    call(command, "train", join_repeated("--data", arguments))


def sweep(arguments: Sequence[str]) -> None:
    """Search for a better recipe with Ray Tune and Optuna."""
    from raylivecell import recipe as recipes
    from raylivecell.core import addresses
    from raylivecell.sweep import space
    from raylivecell.sweep.sweep import sweep as run

    file = recipe_file(arguments)
    base, config = space.load(file) if file else (recipes.Recipe(), space.SweepConfig())
    options = space.SearchConfig.model_validate(config.model_dump(include=set(space.SearchConfig.model_fields)))

    def command(
        data: str,
        out: str,
        fields: Annotated[recipes.Recipe, tyro.conf.arg(name="")] = base,
        search: Annotated[space.SearchConfig, tyro.conf.arg(name="sweep")] = options,
        recipe: str | None = None,
        trials: int = 16,
        resume: Resume = "never",
        storage: str | None = None,
        max_concurrent: int | None = None,
        retries: int = 1,
        final_seeds: int = 0,
        mlflow: str | None = None,
    ) -> None:
        """Search for a better recipe: study.db, best.yaml, checkpoint_best/, trials.csv and report.html in --out.

        Args:
            data: URI of a prepared dataset.
            out: URI of the sweep's folder.
            fields: the starting recipe's fields; a flag overrides the recipe file.
            search: search settings; a flag overrides the `sweep:` part of the recipe file, which also contains the
                search space.
            recipe: name of a shipped recipe with a `sweep:` part (sweep), or a YAML file.
            trials: number of trials, including those finished before --resume.
            resume: `always` continues the sweep in --out, also to more --trials; `auto` does so if there is one and
                otherwise starts a sweep, for jobs that the cluster may restart; `never` refuses a folder in use.
            storage: Optuna storage URL, instead of study.db in --out; with a password: set RAYLIVECELL_STORAGE.
            max_concurrent: maximum number of concurrent trials; default: as many as the cluster has CPUs and GPUs for.
            retries: restarts of a trial from its last checkpoint after a crash.
            final_seeds: train the starting and the best recipe again with N new seeds; best.yaml is the better one.
            mlflow: MLflow tracking URI, to log the trials there too.
        """
        settings = config.model_copy(update=search.model_dump())
        run(
            data,
            out,
            fields,
            settings,
            trials,
            resumes(resume, out),
            storage or os.environ.get(addresses.STORAGE),
            max_concurrent,
            retries,
            final_seeds,
            mlflow,
        )

    call(command, "sweep", arguments)


def check(arguments: Sequence[str]) -> int:
    """Find what would fail or hang before a run starts."""
    from raylivecell import recipe as recipes
    from raylivecell.cli import check as checks
    from raylivecell.core import storage
    from raylivecell.data import combined

    base = base_recipe(arguments)

    def command(
        data: tuple[str, ...],
        fields: Annotated[recipes.Recipe, tyro.conf.arg(name="")] = base,
        recipe: str | None = None,
        out: str | None = None,
        workers: str = "1",
        start_from: str | None = None,
        data_weights: tuple[float, ...] = (),
        teacher: str | None = None,
    ) -> int:
        """Find what would fail or hang before a run starts; print numbered findings, exit with 1 at any `fail`.

        Args:
            data: URI of a prepared dataset, or several: --data A --data B.
            fields: the recipe's fields; a flag overrides the recipe file.
            recipe: name of a shipped recipe (`raylivecell recipes`), or a YAML file.
            out: URI of the folder of the run to check.
            workers: training processes, N or MIN:MAX (elastic).
            start_from: the run or checkpoint folder of `train --start-from`.
            data_weights: those of `train`.
            teacher: the run or checkpoint folder of `train --teacher`.
        """
        datasets, out = combined.of(data, data_weights), out and storage.absolute(out)
        return checks.check(checks.CheckRequest(datasets, out, fields, workers_in(workers), start_from, teacher))

    return call(command, "check", join_repeated("--data", arguments))
