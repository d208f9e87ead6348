"""All costs of all arms in one tidy table, resumable metric by metric and arm by arm."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.behaviour import ArmSpec
from sgworkbench.evaluation.costs.arms import VANILLA, is_vanilla
from sgworkbench.evaluation.costs.choice_items import load_choice_items
from sgworkbench.evaluation.costs.divergence import Divergence, VanillaAnswers, divergence, vanilla_answers
from sgworkbench.evaluation.costs.generated_accuracy import GeneratedAccuracy, generated_accuracy
from sgworkbench.evaluation.costs.multiple_choice import READINGS, MultipleChoice, multiple_choice
from sgworkbench.evaluation.costs.perplexity import Perplexity, perplexity
from sgworkbench.evaluation.costs.puzzles import load_puzzles
from sgworkbench.evaluation.costs.question_sets import QuestionSet, load_questions
from sgworkbench.evaluation.costs.quick_checks import performance_kept
from sgworkbench.evaluation.costs.spec import CostSpec, GeneratedSpec
from sgworkbench.evaluation.costs.texts import load_texts
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import Renderer
from sgworkbench.prompting.prompt_files import load_prompts
from sgworkbench.runs import RunDirectory
from sgworkbench.statistics import PairedComparison, Rate, compare_paired, holm, rate
from sgworkbench.steering import GenerationSettings

COLUMNS = (
    "arm", "metric", "value", "low", "high", "n", "unparsed", "vanilla", "difference", "difference_low",
    "difference_high", "p_value", "p_holm", "test", "better", "is_rate",
)  # fmt: skip
_BOOTSTRAP = "paired bootstrap"
_MCNEMAR = "exact McNemar"
_WILCOXON = "Wilcoxon signed-rank"


@dataclass(frozen=True)
class Costs:
    """The cost side of an experiment.

    Attributes:
        table: one row per arm and metric: value with its 95 % interval, n, answers without anything to check
            (`unparsed`), vanilla's value, the difference from vanilla with its 95 % paired interval, the p-value of
            `test`, the same after Holm's correction over all tests of the table, whether `higher` or `lower` is better
            (`none` for divergences), and whether the value is a rate.
        records: per metric, one row per arm and item.
    """

    table: pd.DataFrame
    records: Mapping[str, pd.DataFrame]

    def to_dataframe(self) -> pd.DataFrame:
        """Return the tidy table."""
        return self.table.copy()

    def kept(self, **options: Any) -> pd.DataFrame:
        """Return which performance is kept, lost or undecided; options as for `performance_kept`."""
        return performance_kept(self.table, **options)

    def _repr_html_(self) -> str:
        shown = self.table[["arm", "metric", "value", "low", "high", "n", "difference", "p_holm", "test"]]
        return "<b>Costs</b> against vanilla, 95 % intervals" + str(
            shown.to_html(index=False, float_format="{:.4g}".format)
        )


def measure_costs(
    loaded: LoadedModel,
    renderer: Renderer,
    arms: Sequence[ArmSpec],
    spec: CostSpec,
    report: Reporter = silent,
    *,
    run: RunDirectory | None = None,
) -> Costs:
    """Measure every metric of a specification in every arm, and compare with vanilla item by item.

    Args:
        loaded: the model, without active steering.
        renderer: renders prompts and questions.
        arms: the arms; the one that changes nothing is vanilla, and is added as "vanilla" when there is none.
        spec: what to measure.
        report: progress callback.
        run: where finished metrics of finished arms are kept; its configuration must name arms and specification.

    Raises:
        WorkbenchError: two arms of one name, an unknown source, or as the metrics raise.
    """
    chosen = list(arms)
    if not any(is_vanilla(arm) for arm in chosen):
        chosen.insert(0, VANILLA)
    if len({arm.name for arm in chosen}) < len(chosen):
        raise WorkbenchError("Two arms have the same name; name every arm once.")
    chosen.sort(key=lambda arm: not is_vanilla(arm))
    runner = _Runner(loaded, renderer, chosen, spec, report, run)
    runner.measure()
    table = pd.DataFrame(runner.rows, columns=list(COLUMNS))
    tested = table["p_value"].notna()
    table.loc[tested, "p_holm"] = holm(table.loc[tested, "p_value"].tolist())
    return Costs(table, runner.records)


class _Runner:
    """Runs one specification; the arms begin with vanilla."""

    def __init__(
        self,
        loaded: LoadedModel,
        renderer: Renderer,
        arms: Sequence[ArmSpec],
        spec: CostSpec,
        report: Reporter,
        run: RunDirectory | None,
    ) -> None:
        self.loaded, self.renderer, self.arms, self.spec, self.report, self.run = (
            loaded,
            renderer,
            arms,
            spec,
            report,
            run,
        )
        self.rows: list[dict[str, Any]] = []
        self.records: dict[str, pd.DataFrame] = {}

    def measure(self) -> None:
        # Sources are read first, so that a wrong name or file ends the run before the model works.
        puzzles = [(each, self._questions(each)) for each in self.spec.generated]
        items = texts = None
        if (choices := self.spec.multiple_choice) is not None:
            items = load_choice_items(choices.items, fields=choices.fields, n=choices.n, seed=self.spec.seed)
        if (plain := self.spec.perplexity) is not None:
            texts = load_texts(plain.texts, fields=plain.fields)
        self._divergence()
        if plain is not None and texts is not None:
            for framing in plain.framings:
                tables = self._tables(
                    f"perplexity_{framing}",
                    lambda arm, framing=framing: (  # type: ignore[misc]
                        perplexity(
                            self.loaded,
                            self.renderer,
                            texts,
                            arm,
                            framing=framing,
                            window=plain.window,
                            stride=plain.stride,
                            report=self.report,
                        ).table
                    ),
                )
                found = [Perplexity(table, plain.window, plain.stride) for table in tables]
                self._perplexity_rows(framing, found)
        if items is not None:
            tables = self._tables(
                "multiple_choice",
                lambda arm: multiple_choice(self.loaded, self.renderer, items, arm, report=self.report).table,
            )
            picked = [MultipleChoice(table) for table in tables]
            for reading in READINGS:
                for arm, one in zip(self.arms, picked, strict=True):
                    self._rate_row(
                        arm, f"multiple_choice_{reading}", one.accuracy(reading), one.against(picked[0], reading)
                    )
        for each, questions in puzzles:
            self._generated(each, questions)

    def _questions(self, each: GeneratedSpec) -> QuestionSet:
        if each.puzzles is not None:
            return load_puzzles(each.puzzles, n=each.n, seed=self.spec.seed, options=each.options)
        return load_questions(str(each.benchmark), str(each.file), fields=each.fields, n=each.n, seed=self.spec.seed)

    def _tables(self, metric: str, compute: Callable[[ArmSpec], pd.DataFrame]) -> list[pd.DataFrame]:
        """Return one table per arm, from the run directory where it is there already."""
        tables = []
        for arm in self.arms:
            tables.append(self._stage(f"costs-{metric}-{_slug(arm.name)}", lambda arm=arm: compute(arm)))  # type: ignore[misc]
        self.records[metric] = pd.concat(tables, ignore_index=True)
        return tables

    def _stage(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        return compute() if self.run is None else self.run.table(name, compute)

    def _divergence(self) -> None:
        wanted = self.spec.divergence
        if wanted is None:
            return
        prompts = load_prompts(wanted.prompts).sample(wanted.n, seed=self.spec.seed)
        ready: list[VanillaAnswers] = []

        def written() -> pd.DataFrame:
            ready.append(
                vanilla_answers(self.loaded, self.renderer, prompts, n_tokens=wanted.tokens, report=self.report)
            )
            ids = [list(each) for each in ready[0].token_ids]
            return pd.DataFrame({"prompt_id": [prompt.id for prompt in prompts], "token_ids": ids})

        answers = self._stage("costs-vanilla-answers", written)

        def compute(arm: ArmSpec) -> pd.DataFrame:
            if not ready:
                # A resumed run: the answers are known, what their distributions are read from is not.
                ids = [list(map(int, each)) for each in answers["token_ids"]]
                ready.append(vanilla_answers(self.loaded, self.renderer, prompts, token_ids=ids))
            return divergence(self.loaded, self.renderer, ready[0], arm, report=self.report).table

        found = [Divergence(table) for table in self._tables("divergence", compute)]
        for metric, column in (
            ("kl_first_token", "first_kl"),
            ("kl_answer", "answer_kl"),
            ("top1_answer", "answer_top1"),
        ):
            for arm, one in zip(self.arms, found, strict=True):
                mean, change = one.mean(column), one.minus(found[0], column)
                self._row(
                    arm,
                    metric,
                    (float(mean.mean), float(mean.low), float(mean.high)),
                    mean.n,
                    (float(change.mean), float(change.low), float(change.high)),
                    test=f"none ({_BOOTSTRAP} interval)",
                    better="none",
                    vanilla=float(found[0].mean(column).mean),
                )
        kept = [[bool(value) for value in one.table["first_top1"]] for one in found]
        for arm, same in zip(self.arms, kept, strict=True):
            share, versus = rate(sum(same), len(same)), compare_paired(kept[0], same)
            self._row(
                arm,
                "top1_first_token",
                (share.value, share.low, share.high),
                share.n,
                (versus.difference, versus.low, versus.high),
                # Vanilla agrees with itself by definition, so there is nothing to test.
                test="none (Newcombe interval)",
                better="none",
                vanilla=sum(kept[0]) / len(kept[0]),
                is_rate=True,
            )

    def _perplexity_rows(self, framing: str, found: Sequence[Perplexity]) -> None:
        for metric in ("perplexity", "bits_per_byte"):
            for arm, one in zip(self.arms, found, strict=True):
                difference, interval, p_value = one.minus(found[0], metric)
                self._row(
                    arm,
                    f"{metric}_{framing}",
                    (one.value(metric), *one.interval(metric)),
                    len(one.table),
                    (difference, *interval),
                    # Both measures are functions of the same nats, so one test speaks for both.
                    p_value=p_value if metric == "perplexity" else None,
                    test=f"{_WILCOXON}, {_BOOTSTRAP}" if metric == "perplexity" else f"none ({_BOOTSTRAP} interval)",
                    better="lower",
                    vanilla=found[0].value(metric),
                )

    def _generated(self, each: GeneratedSpec, questions: QuestionSet) -> None:
        settings = GenerationSettings(
            max_new_tokens=each.tokens, temperature=each.temperature, top_p=each.top_p, seed=self.spec.seed
        )
        tables = self._tables(
            f"generated-{each.name}",
            lambda arm: (
                generated_accuracy(self.loaded, self.renderer, questions, arm, settings, report=self.report).table
            ),
        )
        found = [GeneratedAccuracy(table) for table in tables]
        for measure in found[0].measures:
            for arm, one in zip(self.arms, found, strict=True):
                self._rate_row(arm, f"{each.name}_{measure}", one.rate(measure), one.against(found[0], measure))

    def _rate_row(self, arm: ArmSpec, metric: str, value: Rate, change: PairedComparison) -> None:
        self._row(
            arm,
            metric,
            (value.value, value.low, value.high),
            value.n,
            (change.difference, change.low, change.high),
            p_value=change.p_value,
            test=_MCNEMAR,
            better="higher",
            vanilla=value.value - change.difference,
            unparsed=value.unparsed,
            is_rate=True,
        )

    def _row(
        self,
        arm: ArmSpec,
        metric: str,
        value: tuple[float, float, float],
        n: int,
        change: tuple[float, float, float],
        *,
        test: str,
        better: str,
        vanilla: float,
        p_value: float | None = None,
        unparsed: int = 0,
        is_rate: bool = False,
    ) -> None:
        # Vanilla has no difference from itself.
        own = arm is self.arms[0]
        difference = (math.nan,) * 3 if own else change
        self.rows.append(
            {
                "arm": arm.name,
                "metric": metric,
                **dict(zip(("value", "low", "high"), value, strict=True)),
                "n": n,
                "unparsed": unparsed,
                "vanilla": vanilla,
                **dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True)),
                "p_value": math.nan if own or p_value is None else p_value,
                "p_holm": math.nan,
                "test": "" if own else test,
                "better": better,
                "is_rate": is_rate,
            }
        )


def _slug(name: str) -> str:
    """Return a file name for an arm's name; the hash keeps names apart that differ only in punctuation."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
