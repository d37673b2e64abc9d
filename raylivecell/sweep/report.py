"""report.html of a sweep: scores, importance of the fields, off against on, segmentations of best and worst trial.

It needs only the study and the trials' folders, so it can be written again at any time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from raylivecell.core import addresses, storage
from raylivecell.recipe import Recipe
from raylivecell.reports import page, pictures
from raylivecell.reports.page import BLACK, BLUE, GRAY, GREEN, PINK, RED
from raylivecell.runs import checkpoint
from raylivecell.sweep import space, statistics
from raylivecell.sweep.space import OBJECTIVES, SCORES, SweepConfig
from raylivecell.sweep.statistics import Group
from raylivecell.sweep.study import finished, folder_of, values

MARKS = {TrialState.COMPLETE: ("o", BLUE, "trained to the end"), TrialState.PRUNED: ("v", GRAY, "stopped early")}
PICTURES = 2


def write(
    out: str,
    data: str,
    recipe: Recipe,
    config: SweepConfig,
    study: optuna.Study,
    best: FrozenTrial,
    final_scores: dict[str, list[float]],
) -> None:
    """Write OUT/report.html.

    Args:
        out: the sweep's folder.
        data: the dataset, for segmentations.
        recipe: the starting recipe.
        config: the search.
        study: its trials.
        best: the best trial.
        final_scores: candidate -> validation scores of its runs with fresh seeds.
    """
    score = SCORES[recipe.targets]
    rows = statistics.trial_rows(study, recipe, config)
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "failed"))
    columns += ["failed"] if any(row["failed"] for row in rows) else []
    text = page.render(
        "sweep",
        f"Sweep {addresses.name(out)}",
        "Search for a better recipe with Ray Tune and Optuna",
        headline=headline(study, config, best),
        search=_embedded([_history(study, config), *_front(study, config)]),
        final_seeds=_final_seeds_table(final_scores, score) if final_scores else None,
        final_seed_figures=_embedded([_final_seeds_figure(final_scores, score)]) if final_scores else [],
        comparisons=_comparisons(study, config, score),
        importance=_embedded(_importances(study)),
        least_trials=statistics.LEAST_TRIALS,
        fields=_embedded(_slices(study, config, best)),
        changes=page.Table(["field", "start", "best"], _changes(recipe, values(best, recipe, config))),
        pictures=_pictures(out, data, study, config, best),
        trials=page.number_table(rows, columns),
    )
    storage.write_bytes(storage.join(out, "report.html"), text)


def headline(study: optuna.Study, config: SweepConfig, best: FrozenTrial) -> list[tuple[str, str]]:
    """Summary figures of the sweep: label and value."""
    unit = OBJECTIVES[config.objectives[0]].unit
    start_score = next((statistics.score(trial) for trial in finished(study) if trial.number == 0), None)
    states = [trial.state for trial in finished(study)]
    wall, training_fraction = statistics.time_spent(study)
    tiles = [(f"best {unit}, trial {best.number}", page.number(best.values[0]))]
    if start_score is not None:
        tiles.append((f"{unit} of the start, trial 0", page.number(start_score)))
    return [
        *tiles,
        ("trials trained to the end", str(states.count(TrialState.COMPLETE))),
        ("stopped early", str(states.count(TrialState.PRUNED))),
        ("failed", str(states.count(TrialState.FAIL))),
        ("time of all trials", page.duration(wall)),
        ("spent on training", f"{training_fraction:.0%}"),
    ]


def _embedded(figures: Sequence[tuple[str, bytes]]) -> list[page.Image]:
    return page.images(figures, "svg+xml")


def _history(study: optuna.Study, config: SweepConfig) -> tuple[str, bytes]:
    """Plot the score over the trial number, and the running best."""
    figure, axes = page.axes_of(6.4, 3.0)
    _points(axes, [(trial.number, trial) for trial in finished(study)])
    best = max if OBJECTIVES[config.objectives[0]].mode == "max" else min
    scores = [(trial.number, trial.values[0]) for trial in statistics.complete(study)]
    steps = [(number, best(score for earlier, score in scores if earlier <= number)) for number, _ in scores]
    axes.step(*zip(*steps), where="post", color=GREEN, linewidth=1.6, label="best so far")
    failed = [trial.number for trial in finished(study) if statistics.score(trial) is None]
    low = axes.get_ylim()[0]
    axes.plot(failed, [low] * len(failed), "x", color=RED, label="failed" if failed else None)
    axes.set(xlabel="trial", ylabel=OBJECTIVES[config.objectives[0]].unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    return "Score of each trial", page.svg(figure)


def _points(axes: Axes, trials: Sequence[tuple[Any, FrozenTrial]]) -> None:
    """Plot a marker for each trial that has a score."""
    for state, (marker, colour, label) in MARKS.items():
        points = [(x, statistics.score(trial)) for x, trial in trials if trial.state is state]
        points = [(x, score) for x, score in points if score is not None]
        if points:
            axes.plot(*zip(*points), marker, color=colour, markersize=5, alpha=0.8, label=label)


def _front(study: optuna.Study, config: SweepConfig) -> list[tuple[str, bytes]]:
    """Plot two objectives against each other, with the Pareto front."""
    if len(config.objectives) < 2:
        return []
    figure, axes = page.axes_of(6.4, 3.0)
    pairs = [trial.values[:2] for trial in statistics.complete(study)]
    axes.plot([b for _, b in pairs], [a for a, _ in pairs], "o", color=GRAY, markersize=5, label="trials")
    front = sorted(trial.values[1::-1] for trial in study.best_trials)
    axes.plot(*zip(*front), "o-", color=BLUE, markersize=5, label="Pareto front")
    for trial in study.best_trials:
        axes.annotate(str(trial.number), trial.values[1::-1], xytext=(4, 4), textcoords="offset points", fontsize=8)
    first, second = (OBJECTIVES[name].unit for name in config.objectives[:2])
    axes.set(xlabel=second, ylabel=first)
    axes.legend(frameon=False, fontsize=9)
    return [("Pareto front: numbers are trials", page.svg(figure))]


def _ordered(final_scores: Mapping[str, list[float]]) -> list[tuple[str, list[float]]]:
    """Candidates with their scores, the starting recipe first."""
    return sorted(final_scores.items(), key=lambda entry: entry[0] != "start")


def _final_seeds_table(final_scores: Mapping[str, list[float]], score: str) -> page.Table:
    """Each candidate's scores with fresh seeds: mean, standard deviation, difference from the start by seed."""
    start = final_scores.get("start", [])
    rows = []
    for name, scores in _ordered(final_scores):
        gains = np.subtract(scores, start) if len(scores) == len(start) and name != "start" else np.array([])
        deviation = f"{np.std(scores, ddof=1):.4f}" if len(scores) > 1 else ""
        gain = f"{gains.mean():+.4f} ({gains.min():+.4f} to {gains.max():+.4f})" if len(gains) else ""
        by_seed = ", ".join(f"{score:.4f}" for score in scores)
        rows.append([name.replace("-", " "), f"{np.mean(scores):.4f}", deviation, gain, by_seed])
    head = ["candidate", f"mean {score}", "standard deviation", "gain over the start, by seed (least to most)", "seeds"]
    return page.Table(head, rows)


def _final_seeds_figure(final_scores: Mapping[str, list[float]], score: str) -> tuple[str, bytes]:
    figure, axes = page.axes_of(6.4, 0.8 + 0.45 * len(final_scores))
    for place, (_, scores) in enumerate(_ordered(final_scores)):
        axes.plot(scores, [place] * len(scores), "o", color=BLUE, alpha=0.7)
        axes.plot(np.mean(scores), place, "|", color=BLACK, markersize=18, markeredgewidth=2)
    names = [name.replace("-", " ") for name, _ in _ordered(final_scores)]
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel=f"validation {score}")
    axes.invert_yaxis()
    return "Each run, and the mean", page.svg(figure)


class Comparison(NamedTuple):
    """A section of the report: trials with a field off compared with those with it on."""

    field: str
    off: Any
    verdict: str
    figures: list[page.Image]


def _comparisons(study: optuna.Study, config: SweepConfig, score: str) -> list[Comparison]:
    """Compare off with on for each field of `compare_off`, at the last step that every trial reached."""
    sections = []
    percent, scores = statistics.early_scores(study)
    for path, off in config.compare_off.items():
        groups = statistics.off_on_groups(study, path, off)
        if not groups:
            continue
        gain, low, high = statistics.difference(groups[0], groups[1])
        effect = "better" if low > 0 else "worse" if high < 0 else "neither clearly better nor clearly worse"
        verdict = (
            f"On is {effect}: {gain:+.4f} (95 % interval {low:+.4f} to {high:+.4f}), over {len(groups[0].scores)} "
            f"trials without and {len(groups[1].scores)} with, after {percent:.0f} % of the training, which every "
            "trial reached. The other fields also differ between trials."
        )
        figures = [("Off and on: trials, mean, 95 % interval", page.svg(_groups(groups, score)))]
        strength = space.strength_fields(config, path)[:2]
        trials = [t for t in finished(study) if t.number in scores and t.params.keys() >= set(strength)]
        if len(strength) == 2 and len(trials) > 2 and all(config.space[name].choices is None for name in strength):
            figures.append(("Strength", page.svg(_strength(trials, scores, strength, config, score))))
        sections.append(Comparison(path, off, verdict, _embedded(figures)))
    return sections


def _groups(groups: Sequence[Group], score: str) -> Figure:
    figure, axes = page.axes_of()
    rng = np.random.default_rng(0)
    for place, group in enumerate(groups):
        jitter = place + rng.uniform(-0.08, 0.08, len(group.scores))
        axes.plot(jitter, group.scores, "o", color=BLUE, alpha=0.5, markersize=5)
        error = [[group.mean - group.low], [group.high - group.mean]]
        axes.errorbar(place + 0.25, group.mean, error, fmt="s", color=BLACK, capsize=4)
    axes.set(xticks=range(len(groups)), xticklabels=[group.name for group in groups], ylabel=f"validation {score}")
    axes.set_xlim(-0.4, len(groups) - 0.3)
    return figure


def _strength(
    trials: Sequence[FrozenTrial], scores: Mapping[int, float], fields: Sequence[str], config: SweepConfig, score: str
) -> Figure:
    """Plot scores as colours over the two fields that are searched only while a field is on."""
    figure, axes = page.axes_of()
    x, y = ([trial.params[name] for trial in trials] for name in fields)
    points = axes.scatter(x, y, c=[scores[trial.number] for trial in trials], cmap="viridis", s=36)
    figure.colorbar(points, ax=axes, label=f"validation {score}")
    axes.set(xlabel=fields[0], ylabel=fields[1])
    for name, axis, set_scale in zip(fields, (axes.xaxis, axes.yaxis), (axes.set_xscale, axes.set_yscale)):
        if config.space[name].log:
            set_scale("log")
            page.log_axis(axis)
    return figure


def _importances(study: optuna.Study) -> list[tuple[str, bytes]]:
    """Bar chart of each parameter's importance, with interval and chance level; [] if there are too few trials."""
    importances = statistics.importances(study)
    if not importances:
        return []
    figure, axes = page.axes_of(6.4, 1.0 + 0.32 * len(importances))
    places = np.arange(len(importances))
    axes.barh(places, [bar.value for bar in importances], color=BLUE, height=0.6)
    error = [
        [max(0.0, bar.value - bar.low) for bar in importances],
        [max(0.0, bar.high - bar.value) for bar in importances],
    ]
    axes.errorbar([bar.value for bar in importances], places, xerr=error, fmt="none", color=BLACK, capsize=3)
    axes.plot([bar.chance for bar in importances], places, "|", color=RED, markersize=16, label="chance alone, 95 %")
    axes.set(yticks=places, yticklabels=[f"{bar.name} ({bar.trials})" for bar in importances], xlabel="importance")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9)
    return [("Importance", page.svg(figure))]


def _slices(study: optuna.Study, config: SweepConfig, best: FrozenTrial) -> list[tuple[str, bytes]]:
    """Plot the score over each parameter, with rings around the starting and the best trial."""
    names = dict.fromkeys(name for trial in finished(study) for name in trial.params)
    figures = []
    for name in names:
        figure, axes = page.axes_of()
        trials = [trial for trial in finished(study) if name in trial.params]
        categorical = isinstance(trials[0].distributions[name], optuna.distributions.CategoricalDistribution)
        _points(axes, [(str(t.params[name]) if categorical else t.params[name], t) for t in trials])
        for trial, colour in ((study.trials[0], RED), (best, PINK)):
            score = statistics.score(trial)
            if name in trial.params and score is not None:
                value = str(trial.params[name]) if categorical else trial.params[name]
                ring: dict[str, Any] = {"markersize": 11, "fillstyle": "none", "color": colour, "markeredgewidth": 1.8}
                axes.plot([value], [score], "o", **ring)
        if getattr(trials[0].distributions[name], "log", False):
            axes.set_xscale("log")
            page.log_axis(axes.xaxis)
        axes.set_ylabel(OBJECTIVES[config.objectives[0]].unit)
        figures.append((name, page.svg(figure)))
    return figures


def _changes(recipe: Recipe, chosen: space.Values) -> list[list[str]]:
    return [[path, page.number(space.get(recipe, path)), page.number(value)] for path, value in chosen.items()]


def _pictures(out: str, data: str, study: optuna.Study, config: SweepConfig, best: FrozenTrial) -> list[page.Image]:
    """Segmentations of the best and the worst trial on the same validation images."""
    pick = min if OBJECTIVES[config.objectives[0]].mode == "max" else max
    scored = [trial for trial in finished(study) if statistics.score(trial) is not None]
    worst = pick(scored, key=lambda trial: statistics.score(trial) or 0.0)
    panels = []
    for name, trial in {"Best": best, "Worst": worst}.items():
        network, _ = checkpoint.load_model(storage.join(out, folder_of(trial.number)))
        for title, png in pictures.overlays(network, data, "val", PICTURES):
            panels.append((f"{name}, trial {trial.number}: {title}", png))
    return page.images(panels, "png")
